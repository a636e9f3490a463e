"""The linear model of RoLoRA: y = X a* b*^T of rank 1, whose clients share a*, b* and have designs of their own.

Alternation turns a towards a* by a constant factor a round, while a frozen a keeps its angle, and with it a loss
proportional to its squared sine (S. Chen et al., arXiv 2502.01755, whose clients also solve for b and step along a).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_lora.aggregation import ffa, rolora
from fedjax_lora.core.exchange import Received
from fedjax_lora.core.methods import Context
from fedjax_lora.core.types import Adapters, Factors

CLIENTS, EXAMPLES, WIDTH, OUT = 5, 200, 10, 4
CONTEXT = Context(num_clients=CLIENTS, cohort_size=CLIENTS)
WEIGHTS = jnp.full(CLIENTS, 1 / CLIENTS)
GENERATOR = np.random.default_rng(0)
DESIGNS = GENERATOR.standard_normal((CLIENTS, EXAMPLES, WIDTH))
TRUE_A, ASIDE = np.linalg.qr(GENERATOR.standard_normal((WIDTH, 2)))[0].T
TRUE_B = 2.0 * GENERATOR.standard_normal(OUT)
TARGETS = DESIGNS @ np.outer(TRUE_A, TRUE_B)


def start(sine):
    """A unit a at that angle to a*, and b = 0."""
    a = np.sqrt(1 - sine**2) * TRUE_A + sine * ASIDE
    factors = Factors(a=jnp.float32(a.reshape(1, WIDTH, 1)), b=jnp.zeros((1, 1, OUT)))
    return Adapters(modules={"x": factors}, head={})


def local(live, adapters, k):
    """Client k: b by least squares where it is live; one gradient step along a, of half the inverse curvature."""
    a, b = np.float64(adapters.modules["x"].a[0]), np.float64(adapters.modules["x"].b[0])
    x, y = DESIGNS[k], TARGETS[k]
    if live.b:
        b = (x @ a).T @ y / np.sum((x @ a) ** 2)
    if live.a:
        a = a - 0.5 / np.sum(b**2) * x.T @ (x @ a @ b - y) @ b.T / EXAMPLES
    return Adapters(modules={"x": Factors(a=jnp.float32(a[None]), b=jnp.float32(b[None]))}, head={})


def run(aggregator, sine, rounds):
    """Sine of the angle between a and a*, and the mean loss over the clients, after each round."""
    adapters, sines, losses = start(sine), [sine], []
    aggregate = jax.jit(aggregator.aggregate)
    counted = {"x": jnp.ones((CLIENTS, 1, 1))}
    for number in range(rounds):
        trained = [local(aggregator.trains(jnp.int32(number)), adapters, k) for k in range(CLIENTS)]
        trained = jax.tree.map(lambda *leaves: jnp.stack(leaves), *trained)
        received = Received(adapters=trained, counted=counted)
        result = aggregate(adapters, trained, received, WEIGHTS, jnp.float32(1), jax.random.key(0))
        assert result.covariance_error == 0.0
        adapters = result.adapters
        a, b = np.float64(adapters.modules["x"].a[0]), np.float64(adapters.modules["x"].b[0])
        rest = a[:, 0] - TRUE_A * (TRUE_A @ a[:, 0])
        sines.append(np.linalg.norm(rest) / np.linalg.norm(a))
        losses.append(np.mean(np.sum((DESIGNS @ a @ b - TARGETS) ** 2, axis=-1)))
    return np.array(sines), np.array(losses)


@pytest.mark.parametrize("sine", [0.5, 0.9])
def test_alternation_turns_a_by_a_constant_factor_every_two_rounds(sine):
    """Closed form: with identity covariance, half a step along a halves its part that is aside of a*."""
    sines, _ = run(rolora.make(rolora.RoLoraConfig(), CONTEXT), sine, 30)
    after_a = sines[::2]  # the start, and after each odd round, which trains a
    np.testing.assert_allclose(sines[1::2], sines[:-1:2], rtol=1e-6)  # b's rounds leave a as it is
    falling = after_a[1:][after_a[:-1] > 1e-3] / after_a[:-1][after_a[:-1] > 1e-3]
    assert np.all((falling > 0.3) & (falling < 0.65))
    assert after_a[-1] < 1e-3


def test_a_frozen_a_stalls_at_a_loss_proportional_to_its_squared_sine():
    """Closed form: |b*|^2 sin^2 in expectation over the designs, to a tenth at a thousand examples."""
    last = {}
    for sine in (0.3, 0.6):
        sines, losses = run(ffa.make(ffa.FfaConfig(), CONTEXT), sine, 6)
        np.testing.assert_allclose(sines, sine, rtol=1e-5)
        np.testing.assert_allclose(losses[1:], losses[0], rtol=1e-4)
        last[sine] = losses[-1]
        np.testing.assert_allclose(last[sine], np.sum(TRUE_B**2) * sine**2, rtol=0.1)
    np.testing.assert_allclose(last[0.6] / last[0.3], 4.0, rtol=0.1)
    _, losses = run(rolora.make(rolora.RoLoraConfig(), CONTEXT), 0.6, 30)
    assert losses[-1] < 1e-5 * last[0.6]
