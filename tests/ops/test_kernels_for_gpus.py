"""Every kernel as the Pallas compiler for GPUs takes it, which needs no GPU: its rules are the oracle."""

import jax
import pytest

from oracles.kernel_calls import Size, calls

pytestmark = pytest.mark.skipif(jax.__version_info__ >= (0, 12), reason="JAX 0.12 lowers for a GPU only beside one")

SIZE = Size(clients=2, layers=3, rows=16, n_in=48, n_out=96, ranks=8, slots=2)
CALLS = calls(SIZE)


@pytest.mark.parametrize("name", CALLS)
def test_a_kernel_is_lowered_for_a_gpu(name):
    """Widths that no power of two divides above 16 or 32; ranks and slots are powers of two, as a GPU wants them."""
    function, shapes = CALLS[name]
    lowered = jax.jit(function).trace(*shapes).lower(lowering_platforms=("cuda",))
    assert "triton" in lowered.as_text()


def test_ranks_that_are_no_power_of_two_are_refused():
    """As the READMEs of kernels say; the message is the compiler's."""
    function, shapes = calls(SIZE._replace(ranks=3))["masked_mean of b"]
    with pytest.raises(Exception, match="power of"):
        jax.jit(function).trace(*shapes).lower(lowering_platforms=("cuda",))
