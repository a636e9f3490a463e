"""What a client sends: one file a method, each with a config and `make(config, like) -> base.Sparsifier`."""

from fedjax_lora.sparsifiers import dense as dense
from fedjax_lora.sparsifiers import soft as soft
from fedjax_lora.sparsifiers import soft_rotated as soft_rotated
