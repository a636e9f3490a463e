"""Sparsifiers where layers differ in their ranks: what is sent, counted, offered and decoded."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_lora.core.types import Adapters
from fedjax_lora.sparsifiers import dense, lora_a2, payload, random_rank, soft
from fedjax_lora.sparsifiers.payload import dense_broadcast
from oracles.contexts import context, offered_bits, upload
from oracles.sparsifier_oracle import (
    MAX_RANK,
    WIDTHS,
    payload_bits,
    product,
    random_adapters,
    scope,
    trained_from,
)

RANKS = {"query": [2, 5], "value": [4, 1]}
MOST = 5
UNEVEN = scope(MOST).replace(layer_ranks={name: jnp.float32(ranks) for name, ranks in RANKS.items()})
KEY = jax.random.key(0)


def without_what_layers_lack(adapters):
    modules = {}
    for name, f in adapters.modules.items():
        mask = jnp.arange(MAX_RANK) < jnp.asarray(RANKS[name])[:, None]
        modules[name] = f.replace(a=f.a * mask[:, None, :], b=f.b * mask[..., None])
    return Adapters(modules=modules, head=adapters.head)


START = without_what_layers_lack(random_adapters(0))
TRAINED = without_what_layers_lack(trained_from(random_adapters(0), 1, rank=MAX_RANK))
METHODS = {
    "dense": (dense, dense.DenseConfig()),
    "soft": (soft, soft.SoftConfig()),
    "soft factors": (soft, soft.SoftConfig(send="factors", missing="zero")),
    "soft global": (soft, soft.SoftConfig(budget="global")),
    "soft feedback": (soft, soft.SoftConfig(error_feedback=True)),
    "random_rank": (random_rank, random_rank.RandomRankConfig()),
    "lora_a2": (lora_a2, lora_a2.LoraA2Config()),
}
OVERALL = ("soft global", "lora_a2")


@functools.cache
def method(name):
    module, options = METHODS[name]
    return module.make(options, context(jax.eval_shape(lambda: START)))


@functools.cache
def sent(name, bits=32):
    return jax.jit(upload(method(name), bits))


def send(name, kept, own=UNEVEN, bits=32):
    memory = method(name).init(START)
    return sent(name, bits)(START, TRAINED, memory, jnp.float32(kept), own, KEY)


def in_layers(kept):
    return {name: [min(kept, rank) for rank in ranks] for name, ranks in RANKS.items()}


def expected_bits(name, counts, bits=32):
    """Value by value, in the bits of `payload_bits`."""
    index = name not in ("dense", "random_rank")
    seed = 32 if name == "random_rank" else 0
    return seed + payload_bits(counts, index, 0, bits, known=name not in OVERALL)


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("name", METHODS)
def test_a_component_that_a_layer_lacks_is_not_sent_nor_counted(name, bits):
    """Oracle: a count value by value, of as many components as each layer has; of a choice overall, what is offered."""
    for kept in (1, 3, MOST):
        found = send(name, kept, bits=bits)
        counts = in_layers(MOST if name == "dense" else kept)
        number = sum(map(sum, counts.values()))
        if name in OVERALL:
            number = min(kept * 4, sum(map(sum, RANKS.values())))
        else:
            # A scale of each tensor goes with any of its components, and each layer sends one.
            assert found.bits.exact() == expected_bits(name, counts, bits)
            assert offered_bits(method(name), START, TRAINED, UNEVEN, bits)[kept] == found.bits.exact()
        assert offered_bits(method(name), START, TRAINED, UNEVEN, bits)[kept] >= found.bits.exact()
        np.testing.assert_allclose(found.kept_ranks, number / 4)
        for n, f in found.adapters.modules.items():
            for layer, rank in enumerate(RANKS[n]):
                assert not np.any(f.a[layer, :, rank:]) and not np.any(f.b[layer, rank:])
                assert not np.any(found.counted[n][layer, rank:])


@pytest.mark.parametrize("name", METHODS)
def test_all_that_layers_have_arrives_where_all_is_kept(name):
    """Oracle: what was trained, and a count of all of it; a client of lower rank keeps as much of each layer."""
    found = send(name, MOST)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), found.adapters, TRAINED)
    assert found.bits.exact() == expected_bits(name, in_layers(MOST))
    np.testing.assert_allclose(found.dropped_energy, 0, atol=1e-6)
    own = UNEVEN.replace(ranks=scope(2).ranks)
    less = send(name, 2, own)
    assert less.bits.exact() == expected_bits(name, in_layers(2))
    for n, f in less.adapters.modules.items():
        np.testing.assert_allclose(f.a[..., 2:], START.modules[n].a[..., 2:])


@pytest.mark.parametrize("name", METHODS)
def test_the_tail_energy_is_of_what_layers_have(name):
    """Oracle: the squared changes of the components, layer by layer and sorted, in NumPy."""
    tails = np.asarray(method(name).offer(START, TRAINED, UNEVEN).tail_energy)
    assert tails[MOST] == tails[MAX_RANK] == 0 and (np.diff(tails) <= 0).all()
    if name in ("dense", "lora_a2"):
        assert (tails[1] > 0) == (name == "lora_a2")
        return
    energies = [
        sorted(
            (np.sum((product(TRAINED.modules[n], layer, [i]) - before(n, layer, i, name)) ** 2) for i in range(rank)),
            reverse=True,
        )
        for n in WIDTHS
        for layer, rank in enumerate(RANKS[n])
    ]
    for kept in range(MAX_RANK + 1):
        if name == "random_rank":
            left = sum(sum(own) * max(1 - kept / len(own), 0) for own in energies)
        elif name == "soft global":
            left = sum(sorted((energy for own in energies for energy in own), reverse=True)[kept * len(energies) :])
        else:
            left = sum(sum(own[kept:]) for own in energies)
        np.testing.assert_allclose(tails[kept], left, rtol=1e-4, atol=1e-5)


def before(module, layer, component, name):
    return 0 if name == "soft factors" else product(START.modules[module], layer, [component])


def test_the_broadcast_is_counted_by_the_ranks_of_the_layers():
    """Oracle: a count value by value; of a client of rank 2 too."""
    for rank in (2, MOST):
        _, size = jax.jit(dense_broadcast)(START, UNEVEN, scope(rank).ranks)
        assert payload.bits(size).exact() == payload_bits(in_layers(rank), index=False)
