"""Federated LoRA fine-tuning over wireless networks, as one JAX program."""

__version__ = "0.1.0"
