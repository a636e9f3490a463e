"""What a client sends: one file a method, with its options, a `make` that returns a `Sparsifier`, and its `METHOD`."""

from fedjax_lora.sparsifiers import dense as dense
from fedjax_lora.sparsifiers import flasc as flasc
from fedjax_lora.sparsifiers import lora_a2 as lora_a2
from fedjax_lora.sparsifiers import random_rank as random_rank
from fedjax_lora.sparsifiers import soft as soft
from fedjax_lora.sparsifiers import soft_rotated as soft_rotated
from fedjax_lora.sparsifiers import svd as svd
from fedjax_lora.sparsifiers import top_k as top_k
