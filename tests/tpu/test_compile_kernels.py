"""Every kernel by the compiler of TPUs, forward and, where training needs it, backward."""

import jax
import pytest
from jax.sharding import SingleDeviceSharding

from oracles.kernel_calls import Size, calls

SIZES = (
    Size(clients=16, layers=6, rows=512, n_in=384, n_out=1152, ranks=8, slots=2),
    Size(clients=5, layers=2, rows=24, n_in=768, n_out=384, ranks=16, slots=4),
    Size(clients=3, layers=2, rows=13, n_in=130, n_out=70, ranks=3, slots=1),
    Size(clients=1, layers=1, rows=8, n_in=384, n_out=384, ranks=1, slots=1),
    Size(clients=3, layers=1, rows=256, n_in=1024, n_out=256, ranks=64, slots=16),
)
NAMES = list(calls(SIZES[0]))


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_a_kernel_compiles(name, size, devices):
    """Oracle: the compiler, which must find the kernel in the program."""
    function, shapes = calls(size)[name]
    sharding = SingleDeviceSharding(devices[0])
    placed = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes)
    compiled = jax.jit(function).lower(*placed).compile()
    assert "tpu_custom_call" in compiled.as_text()
