"""Laws that every server optimizer obeys beside those of `fedjax_lora.testing`, over one table of all of them."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_lora.core.exchange import Live
from fedjax_lora.sim.parts import scope_of
from fedjax_lora.sim.round import step_server
from fedjax_lora.training.optimizers import METHODS
from oracles.contexts import context
from oracles.sparsifier_oracle import RANK, random_adapters, stack

START = random_adapters(0)
GRADIENTS = [random_adapters(seed) for seed in (1, 2, 3)]


@pytest.fixture(scope="module", params=METHODS, ids=[method.name for method in METHODS])
def optimizer(request):
    return request.param.make(request.param.options(learning_rate=0.3), context())


def rounds(optimizer, gradients, update=None):
    """The adapters after a round for each pseudo-gradient, from rest."""
    adapters, state = START, optimizer.init(START)
    for gradient in gradients:
        updates, state = (update or optimizer.update)(gradient, state, adapters)
        adapters = jax.tree.map(jnp.add, adapters, updates)
    return adapters


def assert_close(x, y):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), x, y)


def test_vmap_equals_loop(optimizer):
    """Seeds: pseudo-gradients of their own, in either order."""
    both = [stack(pair) for pair in zip(GRADIENTS[:2], GRADIENTS[1::-1], strict=True)]
    mapped = jax.jit(jax.vmap(lambda *gradients: rounds(optimizer, gradients)))(*both)
    assert_close(mapped, stack([rounds(optimizer, GRADIENTS[:2]), rounds(optimizer, GRADIENTS[1::-1])]))


def test_dtypes_and_shapes_are_kept(optimizer):
    """Structure: updates are like the adapters, the state after a round like the one before."""
    state = optimizer.init(START)
    updates, after = jax.eval_shape(optimizer.update, GRADIENTS[0], state, START)

    def same(x, y):
        np.testing.assert_equal((x.shape, x.dtype), (y.shape, y.dtype))

    jax.tree.map(same, updates, START)
    jax.tree.map(same, after, state)


def test_zero_pseudo_gradient_from_rest_moves_nothing(optimizer):
    """Invariance, to the bit, over rounds."""
    nothing = jax.tree.map(jnp.zeros_like, START)
    found = rounds(optimizer, [nothing] * 3, jax.jit(optimizer.update))
    jax.tree.map(np.testing.assert_array_equal, found, START)


@pytest.mark.parametrize("live", [Live(), Live(a=0.0), Live(b=0.0)])
def test_what_is_out_of_use_never_moves(optimizer, live):
    """Invariance, to the bit: ranks beyond r, and a factor at rest, whatever the average and the moments hold there."""
    parts, cohort = SimpleNamespace(server=optimizer, rank=jnp.float32(RANK)), SimpleNamespace(start=START)
    cohort.scope = lambda ranks: scope_of(ranks, live)
    state = SimpleNamespace(adapters=START, methods={"server": optimizer.init(START)})
    for average in GRADIENTS:
        state.adapters, state.methods["server"] = step_server(parts, state, cohort, SimpleNamespace(adapters=average))
        cohort.start = state.adapters
    for name, f in state.adapters.modules.items():
        old = START.modules[name]
        for found, before, part in ((f.a, old.a, live.a), (jnp.swapaxes(f.b, 1, 2), jnp.swapaxes(old.b, 1, 2), live.b)):
            at_rest = RANK if part else 0
            np.testing.assert_array_equal(found[..., at_rest:], before[..., at_rest:])
            assert not part or np.all(np.any(found[..., :RANK] != before[..., :RANK], axis=1))
    assert np.any(state.adapters.head["kernel"] != START.head["kernel"])
