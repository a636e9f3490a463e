"""Laws that every sparsifier obeys beside those of `fedjax_lora.testing`, over one table of all of them."""

import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_lora import sparsifiers
from fedjax_lora.sparsifiers import dense, flasc, lora_a2, payload, random_rank, soft, soft_rotated, svd, top_k
from fedjax_lora.sparsifiers.transforms import WireConfig, chain
from oracles.contexts import context, upload
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

    wire: bits of a value. index: whether a matrix is sent with an index. extra: values in full that each
    factor's part of a component comes with. seed_bits: sent once. factor_bits: sent once for each factor.
    elements: whether single values are sent, not
    components. everything: whether all ranks are sent, however many are to be kept. global_budget: whether components
    are chosen over the whole adapter. factors_apart: whether they are chosen for each factor by itself.
    keeps_broadcast: whether what is not sent stays as it was. download: the share of values that is broadcast. error:
    how far from the trained values those that are sent may arrive; 0 for float32 rounding, and to the bit where nothing
    changed.
    """

    module: Any
    config: Any
    wire: Literal[32, 8, 4] = 32
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
        if self.elements:
            return element_bits(kept / RANK, self.wire, factors)
        bits = self.seed_bits + len(factors) * self.factor_bits
        if self.factors_apart:
            parts = [payload_bits(counts[f], self.index, self.extra, self.wire, f) for f in factors]
            return bits + sum(parts) - (len(factors) - 1) * common_bits(self.wire, "")  # one head goes with both
        return bits + payload_bits(
            counts[factors[0]], self.index, self.extra, self.wire, factors, known=not self.global_budget
        )

    def bits_of_all(self, rank):
        """The independent count of everything at a structural rank."""
        if self.elements:
            return element_bits(1.0, self.wire, rank=rank)
        extra = rank if self.extra else 0
        counts = {name: [rank] * LAYERS for name in WIDTHS}
        bits = payload_bits(counts, self.index, extra, self.wire, known=not self.global_budget)
        return bits + self.seed_bits + 2 * self.factor_bits


SVD = Row(svd, svd.SvdConfig(), index=False, extra=RANK, keeps_broadcast=False, error=1e-5)
TABLE = {
    "dense": Row(dense, dense.DenseConfig(), index=False, everything=True),
    "dense 8 bits": Row(dense, dense.DenseConfig(), 8, index=False, everything=True),
    "soft factors": Row(soft, soft.SoftConfig(send="factors")),
    "soft factors 8 bits": Row(soft, soft.SoftConfig(send="factors"), 8, error=0.05),
    "soft factors zero": Row(soft, soft.SoftConfig(send="factors", missing="zero"), keeps_broadcast=False),
    "soft": Row(soft, soft.SoftConfig()),
    "soft 4 bits": Row(soft, soft.SoftConfig(), 4),
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
    "top_k 4 bits": Row(top_k, top_k.TopKConfig(), 4, elements=True),
    "random_rank": Row(random_rank, random_rank.RandomRankConfig(), index=False, seed_bits=32),
    "random_rank zero": Row(random_rank, random_rank.RandomRankConfig(missing="zero"), index=False, seed_bits=32),
    "svd": SVD,
    "svd 8 bits": SVD._replace(wire=8, error=0.1),
    "lora_a2": Row(lora_a2, lora_a2.LoraA2Config(), global_budget=True),
    "flasc": Row(flasc, flasc.FlascConfig(download_ratio=0.25), elements=True, download=0.25),
    "flasc whole": Row(flasc, flasc.FlascConfig(download_ratio=1.0), elements=True),
}
START = random_adapters(0)
TRAINED = trained_from(START, 1)
MASK = jnp.asarray(rank_mask())
SCOPE = scope()
HALF = jnp.float32(RANK / 2)
CONTEXT = context(jax.eval_shape(lambda: START))
KEY = jax.random.key(0)


def test_every_sparsifier_is_in_the_table():
    """Oracle: the files of the package that hold a method, and each under the name of its file."""
    modules = [module for module in vars(sparsifiers).values() if hasattr(module, "METHOD")]
    assert {row.module.METHOD for row in TABLE.values()} == {module.METHOD for module in modules}
    always = [row for name, row in TABLE.items() if name not in VARIANTS]
    assert ({row.module for row in always}, {row.wire for row in always}) == (set(modules), {32, 8, 4})
    for module in modules:
        method = module.METHOD
        assert (method.slot, method.name) == ("sparsifier", module.__name__.rpartition(".")[2])
        assert (method.options().name, method.make) == (method.name, module.make)


VARIANTS = {
    *("soft factors 8 bits", "soft 4 bits", "svd 8 bits"),
    *("soft factors zero", "soft factors global", "random_rank zero", "flasc whole"),
}
"""Rows whose method and wire are in others too, all of whose tests are slow."""
ALL = [pytest.param(name, marks=pytest.mark.slow if name in VARIANTS else []) for name in TABLE]


@pytest.fixture(scope="module", params=ALL)
def row(request):
    return TABLE[request.param]


@pytest.fixture(scope="module")
def method(row):
    return row.module.make(row.config, CONTEXT)


@pytest.fixture(scope="module")
def eager(row, method):
    """What a client sends in its first round, and what it remembers from then on."""

    def send(start, trained, kept, scope, key):
        return upload(method, row.wire)(start, trained, method.init(start), kept, scope, key)

    return send


@pytest.fixture(scope="module")
def send(eager):
    return jax.jit(eager)


@pytest.fixture(scope="module")
def offer(method):
    return jax.jit(method.offer)


@pytest.fixture(scope="module")
def planned(row, offer):
    """`[R + 1]` bits that are offered for 0 ... R ranks, as whole numbers."""

    def bits(start, trained, scope):
        return payload.bits(offer(start, trained, scope).size, chain(WireConfig(bits=row.wire))).exact()

    return bits


@pytest.fixture(scope="module")
def encode(method):
    """A client's first message, and its size."""

    def encoded(start, trained, kept, scope, key):
        message = method.encode(start, trained, method.init(start), kept, scope, key)
        return message, payload.message_size(message)

    return jax.jit(encoded)


@functools.cache
def dense_upload(wire):
    return jax.jit(upload(dense.make(dense.DenseConfig(), CONTEXT), wire))


def assert_close(x, y, atol=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=atol), x, y)


def test_vmap_equals_loop(send):
    """Clients of their own updates, kept ranks and structural ranks; NaN beside them is no matter."""
    cohort = [trained_from(START, seed) for seed in (1, 2, 3)]
    kept = jnp.array([1.0, 2.5, 6.0])
    scopes = [scope(rank) for rank in (4, 5, 6)]
    keys = jax.random.split(KEY, 4)
    padding = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), START)
    mapped = jax.vmap(send, in_axes=(None, 0, 0, 0, 0))(
        START, stack([*cohort, padding]), jnp.append(kept, 1.0), stack([*scopes, scope()]), keys
    )
    looped = [send(START, cohort[k], kept[k], scopes[k], keys[k]) for k in range(3)]
    assert_close(jax.tree.map(lambda leaf: leaf[:3], mapped), stack(looped))


def test_dtypes_and_shapes_are_kept(row, method):
    """Structure: decoded adapters are like the trained ones, numbers are float32, and counts are of 64 bits."""
    memory = method.init(START)
    message = jax.eval_shape(method.encode, START, TRAINED, memory, HALF, SCOPE, KEY)
    sent = jax.eval_shape(upload(method, row.wire), START, TRAINED, memory, HALF, SCOPE, KEY)
    assert jax.tree.structure(sent.memory) == jax.tree.structure(memory)
    assert jax.tree.structure(sent.adapters) == jax.tree.structure(START)
    jax.tree.map(lambda x, y: np.testing.assert_equal((x.shape, x.dtype), (y.shape, y.dtype)), sent.adapters, START)
    assert {name: m.shape for name, m in sent.counted.items()} == dict.fromkeys(WIDTHS, (LAYERS, MAX_RANK))
    assert jax.tree.structure(message.sent) == jax.tree.structure(message.tensors)
    assert jax.tree.structure(message.exact_sent) == jax.tree.structure(message.exact)
    values, masks = (
        jax.tree.leaves(parts) for parts in ((message.tensors, message.exact), (message.sent, message.exact_sent))
    )
    for value, mask in zip(values, masks, strict=True):
        assert value.dtype == jnp.float32
        assert np.broadcast_shapes(value.shape, mask.shape) == value.shape
    offer = jax.eval_shape(method.offer, START, TRAINED, SCOPE)
    floats = [sent.kept_ranks, sent.dropped_energy, *sent.counted.values(), offer.tail_energy]
    floats.append(jax.eval_shape(method.penalty, TRAINED, MASK))
    assert {x.dtype for x in floats} == {jnp.dtype(jnp.float32)}
    assert {(word.shape, word.dtype) for word in jax.tree.leaves((sent.bits, message.index_bits))} == {
        ((), jnp.dtype(jnp.uint32))
    }
    assert {(word.shape, word.dtype) for word in jax.tree.leaves(offer.size)} == {
        ((MAX_RANK + 1,), jnp.dtype(jnp.uint32))
    }


def test_what_is_not_sent_is_zero(encode):
    """Structure: of the tensors and of what travels in full, in every scope."""
    for factors in ("ab", "a", "b"):
        used = scope(factors=factors)
        message, _ = encode(START, used.select(TRAINED, START), HALF, used, KEY)
        for values, masks in ((message.tensors, message.sent), (message.exact, message.exact_sent)):
            jax.tree.map(lambda x, mask: np.testing.assert_array_equal(x * (1.0 - mask), 0.0), values, masks)


@pytest.mark.parametrize("kept", [1.0, RANK])
def test_zero_update_stays_zero_change(row, send, offer, planned, kept):
    """Invariance, to the bit unless the row says otherwise; also from a broadcast of zero, where every change ties.

    Ties cost no more than was planned.
    """
    for start in (START, jax.tree.map(jnp.zeros_like, START)):
        sent = send(start, start, jnp.float32(kept), SCOPE, KEY)
        if row.keeps_broadcast or kept == RANK:
            jax.tree.map(lambda x, x0: np.testing.assert_allclose(x, x0, rtol=0, atol=row.error), sent.adapters, start)
        tail_energy = offer(start, start, SCOPE).tail_energy
        assert not any(np.any(np.isnan(leaf)) for leaf in jax.tree.leaves((sent, tail_energy)))
        assert sent.bits.exact() <= planned(start, start, SCOPE)[int(kept)]


@pytest.mark.parametrize("rank", [1, 4, 6])
def test_all_ranks_decode_as_dense(row, send, rank):
    """Oracle: the dense sparsifier on this wire, to the bit unless it is factorised, whole or rounded by chance.

    Nothing is dropped and everyone has a say in every rank in use.
    """
    used, trained = scope(rank), trained_from(START, 1, rank=rank)
    sent = send(START, trained, jnp.float32(rank), used, KEY)
    expected = dense_upload(32 if row.error else row.wire)(START, trained, (), HALF, used, KEY)
    whole = row.module is soft and row.config.send == "factors"  # changes are rounded once more when they are added
    if row.error or row.module is soft_rotated or whole:
        assert_close(sent.adapters, expected.adapters, atol=max(row.error, 1e-6 if whole else 1e-5))
    else:
        jax.tree.map(np.testing.assert_array_equal, sent.adapters, expected.adapters)
    if row.wire == 32 and not row.error and row.module is not soft_rotated:
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-6), sent.adapters, trained)
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
def test_bits_equal_independent_count(row, send, planned, kept):
    """Oracle: a count value by value; an offer never falls short of what is sent."""
    sent = send(START, TRAINED, jnp.float32(kept), SCOPE, KEY)
    assert sent.bits.exact() == row.bits(kept, components_sent(row, kept, sent))
    assert planned(START, TRAINED, SCOPE)[kept] >= sent.bits.exact()


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_bits_are_those_of_the_ranks_in_use(row, send, planned, rank):
    """Oracle: the count value by value at another structural rank, of all that it has; as offered, there and beyond."""
    used, trained = scope(rank), trained_from(START, 1, rank=rank)
    sent = send(START, trained, jnp.float32(rank), used, KEY)
    assert sent.bits.exact() == row.bits_of_all(rank)
    np.testing.assert_array_equal(planned(START, trained, used)[rank:], row.bits_of_all(rank))


@pytest.mark.parametrize("factors", ["ab", "a", "b"])
def test_an_offer_with_a_budget_of_each_module_is_what_is_sent(row, method, offer, encode, factors):
    """Invariance: the message's size, field by field, at every k; none costs what one does, and more cost no less."""
    used = scope(factors=factors)
    trained = used.select(TRAINED, START)
    found = offer(START, trained, used).size
    for k in range(0 if method.whole_ranks else 1, MAX_RANK + 1):
        for offered, sent in zip(found, encode(START, trained, jnp.float32(k), used, KEY)[1], strict=True):
            most = offered.exact()[k]
            assert most >= sent.exact() if row.global_budget else most == sent.exact()
    np.testing.assert_array_equal(found.values.exact()[0], found.values.exact()[1])
    for count in found:
        assert np.all(np.diff(count.exact()) >= 0)


@pytest.mark.parametrize("share", [1e-6, 0.307, 0.5, 2.993])
def test_whole_ranks_are_rounded_down(row, method, send, encode, share):
    """Oracle: what is sent of floor(kept) ranks, at least one; a method of single values sends the share of them.

    A matrix of which no value is sent needs no scale.
    """
    found, floored = (send(START, TRAINED, jnp.float32(k), SCOPE, KEY) for k in (share, max(1, int(share))))
    if method.whole_ranks:
        jax.tree.map(np.testing.assert_array_equal, found, floored)
    else:
        masks = jax.tree.leaves(encode(START, TRAINED, jnp.float32(share), SCOPE, KEY)[0].sent.modules)
        empty = sum(not np.any(matrix) for mask in masks for matrix in np.asarray(mask))
        assert (empty > 0) == (share < 0.4)
        scales = 32 * empty if row.wire < 32 else 0
        assert found.bits.exact() == element_bits(share / RANK, row.wire) - scales


@pytest.mark.parametrize(("sent_factor", "frozen"), ["ab", "ba"])
def test_a_frozen_factor_is_neither_charged_nor_changed(row, send, planned, sent_factor, frozen):
    """Oracle: the count value by value without it; the other factor and the head are still sent."""
    used = scope(factors=sent_factor)
    trained = used.select(TRAINED, START)
    sent = send(START, trained, HALF, used, KEY)
    changed = []
    for name, f in sent.adapters.modules.items():
        np.testing.assert_array_equal(getattr(f, frozen), getattr(START.modules[name], frozen))
        changed.append(np.any(getattr(f, sent_factor) != getattr(START.modules[name], sent_factor)))
    assert any(changed)
    assert sent.bits.exact() == row.bits(RANK // 2, components_sent(row, RANK // 2, sent, sent_factor), sent_factor)
    assert planned(START, trained, used)[RANK // 2] >= sent.bits.exact()
    assert np.any(sent.adapters.head["kernel"] != START.head["kernel"])


@pytest.mark.parametrize("factors", ["ab", "a", "b"])
def test_broadcast_is_what_is_charged(row, method, factors):
    """Oracle: the adapters themselves or NumPy's count of their values, and the count of bits value by value."""
    adapters, size = jax.jit(method.broadcast or payload.dense_broadcast)(START, scope(factors=factors), MASK)
    whole = {name: [RANK] * LAYERS for name in WIDTHS}
    is_sparse = row.module is flasc
    expected = element_bits(row.download, factors=factors) if is_sparse else payload_bits(whole, False, factors=factors)
    assert payload.bits(size).exact() == expected
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


@pytest.mark.parametrize("rank", [1, 4, 6])
def test_tail_energy_falls_to_zero_at_the_structural_rank(offer, rank):
    """Invariance: non-increasing to the last bit, never negative, exactly 0 from r on."""
    for seed in range(5):
        tails = np.asarray(offer(START, trained_from(START, seed, rank=rank), scope(rank)).tail_energy)
        assert tails.shape == (MAX_RANK + 1,)
        assert np.all(np.diff(tails) <= 0)
        np.testing.assert_array_equal(tails[rank:], 0.0)


def test_ranks_not_in_use_change_nothing(send, offer, method):
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
    assert_close(send(START, noisy, HALF, SCOPE, KEY), send(START, TRAINED, HALF, SCOPE, KEY))
    assert_close(offer(START, noisy, SCOPE), offer(START, TRAINED, SCOPE))
    assert_close(method.penalty(noisy, MASK), method.penalty(TRAINED, MASK))
