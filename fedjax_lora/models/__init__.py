"""Pretrained and small models as pure functions of their frozen weights."""
