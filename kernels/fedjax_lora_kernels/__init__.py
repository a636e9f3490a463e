"""Pallas kernels of fedjax-lora; they import jax and nothing of `fedjax_lora`."""
