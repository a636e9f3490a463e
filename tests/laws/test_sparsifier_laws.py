"""Laws that every sparsifier obeys, over one table of all of them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_lora.config.assemble import SPARSIFIERS
from fedjax_lora.sparsifiers import dense, flasc, lora_a2, random_rank, soft, soft_rotated, svd, top_k
from fedjax_lora.sparsifiers.wire import FLOAT32, Wire, WireConfig, make_wire
from oracles.sparsifier_oracle import (
    LAYERS,
    MAX_RANK,
    RANK,
    WIDTHS,
    common_bits,
    element_bits,
    payload_bits,
    random_adapters,
    rank_mask,
    scope,
    stack,
    trained_from,
)


class Row(NamedTuple):
    """A method, and what tells it from the others in these laws.

    wire: how its numbers travel. index: whether a matrix is sent with an index. extra: values in full that each
    factor's part of a component comes with. seed_bits: sent once. factor_bits: sent once for each factor.
    elements: whether single values are sent, not
    components. everything: whether all ranks are sent at any ratio. global_budget: whether components are chosen over
    the whole adapter. factors_apart: whether they are chosen for each factor by itself. keeps_broadcast: whether what
    is not sent stays as it was. download: the share of values that is broadcast. error: how far from the trained values
    those that are sent may arrive; 0 to the bit where nothing changed.
    """

    module: Any
    config: Any
    wire: Wire = FLOAT32
    index: bool = True
    extra: int = 0
    seed_bits: int = 0
    factor_bits: int = 0
    elements: bool = False
    everything: bool = False
    global_budget: bool = False
    factors_apart: bool = False
    keeps_broadcast: bool = True
    download: float = 1.0
    error: float = 0.0

    def bits(self, kept, counts, factors="ab"):
        """The independent count, for k of r ranks and the components sent of each matrix, by factor."""
        value_bits = self.wire.bits_per_value
        if self.elements:
            return element_bits(kept / RANK, value_bits, factors)
        bits = self.seed_bits + len(factors) * self.factor_bits
        if self.factors_apart:
            parts = [payload_bits(counts[f], self.index, self.extra, value_bits, f) for f in factors]
            return bits + sum(parts) - (len(factors) - 1) * common_bits(value_bits, "")  # one head goes with both
        return bits + payload_bits(
            counts[factors[0]], self.index, self.extra, value_bits, factors, known=not self.global_budget
        )

    def bits_of_all(self, rank):
        """The independent count of everything at a structural rank."""
        if self.elements:
            return element_bits(1.0, self.wire.bits_per_value, rank=rank)
        extra = rank if self.extra else 0
        counts = {name: [rank] * LAYERS for name in WIDTHS}
        bits = payload_bits(counts, self.index, extra, self.wire.bits_per_value, known=not self.global_budget)
        return bits + self.seed_bits + 2 * self.factor_bits


WIRE8, WIRE4 = make_wire(WireConfig(bits=8)), make_wire(WireConfig(bits=4))
SVD = Row(svd, svd.SvdConfig(), index=False, extra=RANK, keeps_broadcast=False, error=1e-5)
TABLE = {
    "dense": Row(dense, dense.DenseConfig(), index=False, everything=True),
    "dense 8 bits": Row(dense, dense.DenseConfig(), WIRE8, index=False, everything=True),
    "soft factors": Row(soft, soft.SoftConfig(send="factors")),
    "soft factors 8 bits": Row(soft, soft.SoftConfig(send="factors"), WIRE8, error=0.05),
    "soft factors zero": Row(soft, soft.SoftConfig(send="factors", missing="zero"), keeps_broadcast=False),
    "soft": Row(soft, soft.SoftConfig()),
    "soft 4 bits": Row(soft, soft.SoftConfig(), WIRE4),
    "soft zero": Row(soft, soft.SoftConfig(missing="zero", form="identity")),
    "soft factors global": Row(
        soft, soft.SoftConfig(budget="global", send="factors", form="a_only"), global_budget=True
    ),
    "soft global": Row(soft, soft.SoftConfig(budget="global", form="none", orthogonality=0.0), global_budget=True),
    "soft feedback": Row(soft, soft.SoftConfig(error_feedback=True)),
    "soft_rotated": Row(soft_rotated, soft_rotated.SoftRotatedConfig(), index=False, extra=RANK),
    "soft_rotated norm": Row(
        soft_rotated,
        soft_rotated.SoftRotatedConfig(keep_norm=True),
        index=False,
        extra=RANK,
        factor_bits=32 * LAYERS * len(WIDTHS),
    ),
    "soft_rotated global": Row(
        soft_rotated,
        soft_rotated.SoftRotatedConfig(budget="global"),
        index=False,
        extra=RANK,
        factor_bits=3 * LAYERS * len(WIDTHS),  # each matrix says how many of 6
        global_budget=True,
        factors_apart=True,
    ),
    "top_k": Row(top_k, top_k.TopKConfig(), elements=True),
    "top_k 4 bits": Row(top_k, top_k.TopKConfig(), WIRE4, elements=True),
    "random_rank": Row(random_rank, random_rank.RandomRankConfig(), index=False, seed_bits=32),
    "random_rank zero": Row(random_rank, random_rank.RandomRankConfig(missing="zero"), index=False, seed_bits=32),
    "svd": SVD,
    "svd 8 bits": SVD._replace(wire=WIRE8, error=0.1),
    "lora_a2": Row(lora_a2, lora_a2.LoraA2Config(), global_budget=True),
    "flasc": Row(flasc, flasc.FlascConfig(download_ratio=0.25), elements=True, download=0.25),
    "flasc whole": Row(flasc, flasc.FlascConfig(download_ratio=1.0), elements=True),
}
START = random_adapters(0)
TRAINED = trained_from(START, 1)
MASK = jnp.asarray(rank_mask())
SCOPE = scope()
HALF = jnp.float32(0.5)
KEY = jax.random.key(0)


def test_every_sparsifier_is_in_the_table():
    """Oracle: the names that a configuration may choose."""
    assert {row.config.name for row in TABLE.values()} == set(SPARSIFIERS)


@pytest.fixture(scope="module", params=TABLE, ids=list(TABLE))
def row(request):
    return TABLE[request.param]


@pytest.fixture(scope="module")
def method(row):
    return row.module.make(row.config, jax.eval_shape(lambda: START), row.wire)


@pytest.fixture(scope="module")
def eager(method):
    """What a client sends in its first round, and what it remembers from then on."""

    def compress(start, trained, keep_ratio, scope, key):
        return method.compress(start, trained, method.init(start), keep_ratio, scope, key)

    return compress


@pytest.fixture(scope="module")
def compress(eager):
    return jax.jit(eager)


@pytest.fixture(scope="module")
def tail_energy(method):
    return jax.jit(method.tail_energy)


def assert_close(x, y, atol=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=atol), x, y)


def test_jit_equals_eager(method, eager, compress, tail_energy):
    assert_close(compress(START, TRAINED, HALF, SCOPE, KEY), eager(START, TRAINED, HALF, SCOPE, KEY))
    assert_close(tail_energy(START, TRAINED, SCOPE), method.tail_energy(START, TRAINED, SCOPE), atol=1e-3)
    assert_close(jax.jit(method.penalty)(TRAINED, MASK), method.penalty(TRAINED, MASK))
    assert_close(jax.jit(method.payload_bits)(HALF, SCOPE), method.payload_bits(HALF, SCOPE))


def test_vmap_equals_loop(compress):
    """Clients of their own updates, ratios and structural ranks."""
    cohort = [trained_from(START, seed) for seed in (1, 2, 3)]
    ratios = jnp.array([0.25, 0.5, 1.0])
    scopes = stack([scope(rank) for rank in (4, 5, 6)])
    keys = jax.random.split(KEY, 3)
    mapped, _ = jax.vmap(compress, in_axes=(None, 0, 0, 0, 0))(START, stack(cohort), ratios, scopes, keys)
    looped = [compress(START, cohort[k], ratios[k], scope(4 + k), keys[k])[0] for k in range(3)]
    assert_close(mapped, stack(looped))


def test_dtypes_and_shapes_are_kept(method):
    """Structure: decoded adapters are like the trained ones, numbers are float32, bits are uint32."""
    sent, memory = jax.eval_shape(method.compress, START, TRAINED, method.init(START), HALF, SCOPE, KEY)
    assert jax.tree.structure(memory) == jax.tree.structure(method.init(START))
    assert jax.tree.structure(sent.adapters) == jax.tree.structure(START)
    jax.tree.map(lambda x, y: np.testing.assert_equal((x.shape, x.dtype), (y.shape, y.dtype)), sent.adapters, START)
    assert {name: m.shape for name, m in sent.counted.items()} == dict.fromkeys(WIDTHS, (LAYERS, MAX_RANK))
    assert (sent.bits.shape, sent.bits.dtype) == ((), jnp.uint32)
    floats = [sent.kept_ranks, sent.dropped_energy, *sent.counted.values()]
    floats += [
        jax.eval_shape(method.penalty, TRAINED, MASK),
        jax.eval_shape(method.tail_energy, START, TRAINED, SCOPE),
    ]
    assert {x.dtype for x in floats} == {jnp.dtype(jnp.float32)}
    planned = jax.eval_shape(method.payload_bits, jnp.ones((3, 2)), SCOPE)
    assert (planned.shape, planned.dtype) == ((3, 2), jnp.float32)


def test_traced_once_for_all_ratios_and_ranks(method, eager):
    """Structure: masks and ratios are data."""
    traces = []

    @jax.jit
    def counted(trained, ratio, mask):
        traces.append(1)
        sent, _ = eager(START, trained, ratio, mask, KEY)
        return sent.bits, method.tail_energy(START, trained, mask), method.payload_bits(ratio, mask)

    for ratio, rank in ((0.25, 2), (0.5, 4), (1.0, 6)):
        counted.trace(TRAINED, jnp.float32(ratio), scope(rank))
    assert len(traces) == 1


@pytest.mark.parametrize("ratio", [0.25, 1.0])
def test_zero_update_stays_zero_change(row, method, compress, tail_energy, ratio):
    """Invariance, to the bit unless the row says otherwise; also from a broadcast of zero, where every change ties.

    Ties cost no more than was planned.
    """
    for start in (START, jax.tree.map(jnp.zeros_like, START)):
        sent, _ = compress(start, start, jnp.float32(ratio), SCOPE, KEY)
        if row.keeps_broadcast or ratio == 1.0:
            jax.tree.map(lambda x, x0: np.testing.assert_allclose(x, x0, rtol=0, atol=row.error), sent.adapters, start)
        assert not any(np.any(np.isnan(leaf)) for leaf in jax.tree.leaves((sent, tail_energy(start, start, SCOPE))))
        assert sent.bits <= method.payload_bits(jnp.float32(ratio), SCOPE)


@pytest.mark.parametrize("rank", [1, 4, 6])
def test_keep_ratio_one_decodes_as_dense(row, compress, rank):
    """Oracle: the dense sparsifier on this wire, to the bit but for what is factorised or rounded by chance.

    Nothing is dropped and everyone has a say in every rank in use.
    """
    used, trained = scope(rank), trained_from(START, 1, rank=rank)
    sent, _ = compress(START, trained, jnp.float32(1.0), used, KEY)
    reference = dense.make(dense.DenseConfig(), START, FLOAT32 if row.error else row.wire)
    expected, _ = reference.compress(START, trained, (), HALF, used, KEY)
    if row.error or row.module is soft_rotated:
        assert_close(sent.adapters, expected.adapters, atol=max(row.error, 1e-5))
    else:
        jax.tree.map(np.testing.assert_array_equal, sent.adapters, expected.adapters)
    jax.tree.map(np.testing.assert_array_equal, sent.counted, expected.counted)
    assert sent.kept_ranks == rank
    assert sent.dropped_energy < 1e-6


def components_sent(row, kept, sent, factors="ab"):
    """Factor -> module -> components of each layer: told by what changed where the method chooses how many."""
    if not row.global_budget:
        return {side: {name: [RANK if row.everything else kept] * LAYERS for name in WIDTHS} for side in factors}
    changed = {factor: {} for factor in factors}
    for name, f in sent.adapters.modules.items():
        changes = {factor: np.asarray(getattr(f, factor) - getattr(START.modules[name], factor)) for factor in "ab"}
        moved = np.any(changes["a"], axis=1) | np.any(changes["b"], axis=2)
        for factor in factors:
            ranks = np.linalg.matrix_rank(changes[factor], tol=1e-3) if row.factors_apart else moved.sum(-1)
            changed[factor][name] = ranks.tolist()
    for counts in changed.values():
        assert sum(map(sum, counts.values())) == kept * LAYERS * len(WIDTHS)
    return changed


@pytest.mark.parametrize("kept", [1, 2, 4])
def test_bits_equal_independent_count(row, method, compress, kept):
    """Oracle: a count value by value; a plan never falls short of what is sent."""
    ratio = jnp.float32(kept / RANK)
    sent, _ = compress(START, TRAINED, ratio, SCOPE, KEY)
    assert sent.bits == row.bits(kept, components_sent(row, kept, sent))
    assert method.payload_bits(ratio, SCOPE) >= sent.bits


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_bits_are_those_of_the_ranks_in_use(row, method, compress, rank):
    """Oracle: the count value by value at another structural rank, of all that it has; as planned."""
    sent, _ = compress(START, trained_from(START, 1, rank=rank), jnp.float32(1), scope(rank), KEY)
    assert sent.bits == method.payload_bits(jnp.float32(1), scope(rank)) == row.bits_of_all(rank)


@pytest.mark.parametrize(("sent_factor", "frozen"), ["ab", "ba"])
def test_a_frozen_factor_is_neither_charged_nor_changed(row, method, compress, sent_factor, frozen):
    """Oracle: the count value by value without it; the other factor and the head are still sent."""
    used = scope(factors=sent_factor)
    trained = used.select(TRAINED, START)
    sent, _ = compress(START, trained, HALF, used, KEY)
    changed = []
    for name, f in sent.adapters.modules.items():
        np.testing.assert_array_equal(getattr(f, frozen), getattr(START.modules[name], frozen))
        changed.append(np.any(getattr(f, sent_factor) != getattr(START.modules[name], sent_factor)))
    assert any(changed)
    assert sent.bits == row.bits(RANK // 2, components_sent(row, RANK // 2, sent, sent_factor), sent_factor)
    assert method.payload_bits(HALF, used) >= sent.bits
    assert np.any(sent.adapters.head["kernel"] != START.head["kernel"])


@pytest.mark.parametrize("factors", ["ab", "a", "b"])
def test_broadcast_is_what_is_charged(row, method, factors):
    """Oracle: the adapters themselves or NumPy's count of their values, and the count of bits value by value."""
    adapters, bits = jax.jit(method.broadcast)(START, scope(factors=factors), MASK)
    whole = {name: [RANK] * LAYERS for name in WIDTHS}
    is_sparse = row.module is flasc
    expected = element_bits(row.download, factors=factors) if is_sparse else payload_bits(whole, False, factors=factors)
    assert bits == expected
    if row.download == 1.0:
        jax.tree.map(np.testing.assert_array_equal, adapters, START)
        return
    values = [
        (getattr(f, side) * (MASK if side == "a" else MASK[:, None]))
        for f in adapters.modules.values()
        for side in factors
    ]
    pool = sum(RANK * LAYERS * WIDTHS[name]["ab".index(side)] for name in WIDTHS for side in factors)
    assert sum(map(np.count_nonzero, values)) == int(row.download * pool)
    jax.tree.map(np.testing.assert_array_equal, adapters.head, START.head)


def test_payload_bits_maps_over_ratios(method):
    """Oracle: one ratio at a time; more ranks never cost less."""
    ratios = jnp.array([[0.01, 0.3, 0.5], [0.7, 0.9, 1.0]])
    found = method.payload_bits(ratios, SCOPE)
    assert_close(found, jnp.stack([jnp.stack([method.payload_bits(x, SCOPE) for x in line]) for line in ratios]))
    assert np.all(np.diff(found.ravel()) >= 0)


@pytest.mark.parametrize("rank", [1, 4, 6])
def test_tail_energy_falls_to_zero_at_the_structural_rank(tail_energy, rank):
    """Invariance: non-increasing to the last bit, never negative, exactly 0 from r on."""
    for seed in range(5):
        tails = np.asarray(tail_energy(START, trained_from(START, seed, rank=rank), scope(rank)))
        assert tails.shape == (MAX_RANK + 1,)
        assert np.all(np.diff(tails) <= 0)
        np.testing.assert_array_equal(tails[rank:], 0.0)


def test_ranks_not_in_use_change_nothing(compress, tail_energy, method):
    """Invariance: whatever stands in a rank beyond r of the trained factors is neither sent nor counted."""
    noise = random_adapters(7)
    modules = {
        name: f.replace(
            a=f.a + 100 * noise.modules[name].a * (1 - MASK),
            b=f.b + 100 * noise.modules[name].b * (1 - MASK)[:, None],
        )
        for name, f in TRAINED.modules.items()
    }
    noisy = TRAINED.replace(modules=modules)
    assert_close(compress(START, noisy, HALF, SCOPE, KEY), compress(START, TRAINED, HALF, SCOPE, KEY))
    assert_close(tail_energy(START, noisy, SCOPE), tail_energy(START, TRAINED, SCOPE))
    assert_close(method.penalty(noisy, MASK), method.penalty(TRAINED, MASK))
