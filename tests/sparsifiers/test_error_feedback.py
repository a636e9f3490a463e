"""Error feedback of SOFT, against a loop in NumPy over two rounds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_lora.sparsifiers import soft
from oracles.contexts import context, upload
from oracles.sparsifier_oracle import LAYERS, MAX_RANK, RANK, WIDTHS, random_adapters, scope, trained_from

STARTS = [random_adapters(0), random_adapters(10)]
TRAINED = [trained_from(start, seed) for seed, start in enumerate(STARTS, start=1)]
KEYS = jax.random.split(jax.random.key(0), 2)
CONFIG = soft.SoftConfig(error_feedback=True)
HALF = jnp.float32(RANK / 2)


def two_rounds(bits=32, scopes=None):
    """What is sent and remembered after either round, and the memory at the start."""
    method = soft.make(CONFIG, context(STARTS[0]))
    send, memory, rounds = jax.jit(upload(method, bits)), method.init(STARTS[0]), []
    for start, trained, used, key in zip(STARTS, TRAINED, scopes or [scope(), scope()], KEYS, strict=True):
        sent = send(start, used.select(trained, start), memory, HALF, used, key)
        memory = sent.memory
        rounds.append((sent, memory))
    return rounds


def matrices(adapters, name, layer):
    f = adapters.modules[name]
    return np.asarray(f.a, np.float64)[layer], np.asarray(f.b, np.float64)[layer]


def test_two_rounds_equal_numpy_loop():
    """Component by component: what was left out is added to the next update, and its norm decides again."""
    memory = {(name, layer): (0.0, 0.0) for name in WIDTHS for layer in range(LAYERS)}
    for (sent, remembered), start, trained in zip(two_rounds(), STARTS, TRAINED, strict=True):
        for name, layer in memory:
            a0, b0 = matrices(start, name, layer)
            a, b = (x + m for x, m in zip(matrices(trained, name, layer), memory[name, layer], strict=True))
            sigma = [np.linalg.norm(np.outer(a[:, i], b[i]) - np.outer(a0[:, i], b0[i])) for i in range(RANK)]
            chosen = sorted(range(RANK), key=lambda i: -sigma[i])[: RANK // 2]
            decoded_a, decoded_b = a0.copy(), b0.copy()
            decoded_a[:, chosen], decoded_b[chosen] = a[:, chosen], b[chosen]
            memory[name, layer] = (a - decoded_a, b - decoded_b)
            found = matrices(sent.adapters, name, layer), matrices(remembered, name, layer)
            for x, expected in zip(found, ((decoded_a, decoded_b), memory[name, layer]), strict=True):
                np.testing.assert_allclose(x[0], expected[0], atol=1e-6)
                np.testing.assert_allclose(x[1], expected[1], atol=1e-6)
    assert any(np.any(m) for pair in memory.values() for m in pair)


@pytest.mark.parametrize("bits", [32, 4])
def test_sent_and_remembered_are_all_that_was_trained(bits):
    """Conservation, of the head too: over both rounds, changes sent plus the memory are the changes trained."""
    rounds = two_rounds(bits)
    sent = [jax.tree.map(jnp.subtract, sent.adapters, start) for (sent, _), start in zip(rounds, STARTS, strict=True)]
    changes = [jax.tree.map(jnp.subtract, trained, start) for trained, start in zip(TRAINED, STARTS, strict=True)]
    jax.tree.map(
        lambda s0, s1, memory, c0, c1: np.testing.assert_allclose(s0 + s1 + memory, c0 + c1, atol=2e-6),
        *sent,
        rounds[1][1],
        *changes,
    )
    left = np.max(np.abs(rounds[1][1].head["kernel"]))
    assert left < 1e-6 if bits == 32 else left > 1e-3


def test_memory_of_a_factor_waits_while_it_is_frozen():
    """Conservation with alternating factors: the second round touches nothing of what the first left of a."""
    (_, first), (_, second) = two_rounds(scopes=[scope(factors="a"), scope(factors="b")])
    for name, f in second.modules.items():
        np.testing.assert_array_equal(f.a, first.modules[name].a)
        assert np.any(f.a) and np.any(f.b) and not np.any(first.modules[name].b)
        assert not np.any(f.a[..., RANK:MAX_RANK])


def test_only_changes_can_be_remembered():
    """The message itself."""
    with pytest.raises(ValueError, match="error_feedback must be false where send is factors, got True"):
        soft.SoftConfig(send="factors", error_feedback=True)
