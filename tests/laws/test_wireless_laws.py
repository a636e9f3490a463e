"""Laws that every network obeys beside those of `fedjax_lora.testing`, over one table of them."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_lora.core import trees
from fedjax_lora.core.learning import Work
from fedjax_lora.core.methods import Context
from fedjax_lora.core.network import Wireless
from fedjax_lora.core.numbers import fill, split
from fedjax_lora.wireless import cell

# Each pair of values of two options is in some row, see the first test.
ROWS = [
    ("3gpp128", "none", "perfect", 0, False),
    ("3gpp128", "rayleigh", "mean", 2, True),
    ("3gpp128", "rician", "estimated", 2, False),
    ("umi", "none", "mean", 2, True),
    ("umi", "rayleigh", "estimated", 0, False),
    ("umi", "rician", "perfect", 2, True),
    ("uma", "none", "estimated", 2, True),
    ("uma", "rayleigh", "perfect", 2, False),
    ("uma", "rician", "mean", 0, False),
    ("3gpp128", "rician", "mean", 0, True),
]
TABLE = {
    "cell " + " ".join(map(str, row)): (
        cell.METHOD,
        cell.WirelessConfig(
            path_loss=row[0],
            fading=row[1],
            csi=row[2],
            retransmissions=row[3],
            downlink=row[4],
            fading_correlation=0.4,
            fade_margin_db=1.0,
            fade_threshold=0.1,
        ),
    )
    for row in ROWS
}
IDS = jnp.array([7, 2, 40, 11, 0, 3])
KEY, NEXT = jax.random.key(3), jax.random.key(4)
PRESENT = jnp.array([1.0, 1.0, 0.0, 1.0, 1.0, 1.0])
WORK = Work(jnp.array([80.0, 24.0, 8.0, 80.0, 16.0, 40.0]))
BITS = jnp.array([1e6, 3e4, 2e5, 0.0, 4e5, 1e3])
DOWN = jnp.full(6, 1e7)
CONTEXT = Context(num_clients=6, cohort_size=6)


def one_round(network: Wireless, ids=IDS, present=PRESENT, work=WORK, bits=BITS, down=DOWN):
    """States, radio and delivery of a round in which those who are present share the band alike."""
    first = network.init(KEY, ids)
    state = network.step(first, NEXT, ids)
    radio = network.observe(state, work, down, present)
    share_hz = radio.band_hz / 6.0 * present
    return first, state, radio, network.deliver(state, work, bits, share_hz, radio.start_s, present)


ALWAYS = ROWS[1], ROWS[5], ROWS[6], ROWS[8]
"""In which each value of each option is; the other rows, for their pairs, are slow."""
ALL = [
    pytest.param(name, marks=[] if row in ALWAYS else pytest.mark.slow) for name, row in zip(TABLE, ROWS, strict=True)
]


@pytest.fixture(scope="module", params=ALL)
def row(request):
    return TABLE[request.param]


@pytest.fixture(scope="module")
def network(row):
    method, options = row
    return method.make(options, CONTEXT)


@pytest.fixture(scope="module")
def program(row):
    """`numbers, ... -> one_round`: the method is made inside."""
    method, options = row
    structure, _ = split(options)

    def run(numbers, ids=IDS, present=PRESENT, work=WORK, bits=BITS, down=DOWN):
        return one_round(method.make(fill(structure, numbers), CONTEXT), ids, present, work, bits, down)

    return run


@pytest.fixture(scope="module")
def numbers(row):
    return split(row[1])[1]


@pytest.fixture(scope="module")
def jitted(program):
    return jax.jit(program)


@pytest.fixture(scope="module")
def found(jitted, numbers):
    return jitted(numbers, IDS, PRESENT, WORK, BITS, DOWN)


@pytest.fixture(scope="module")
def ends(network, found):
    """`bits, band a client, start after the earliest -> Delivery` of the round's state."""
    _, state, radio, _ = found
    deliver = jax.jit(network.deliver)
    return lambda bits, share_hz, late_s=0.0: deliver(
        state, WORK, bits, share_hz, radio.start_s + late_s * PRESENT, PRESENT
    )


def assert_close(x, y):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7), x, y)


def assert_equal(x, y):
    jax.tree.map(np.testing.assert_array_equal, x, y)


def test_each_pair_of_values_is_in_the_table():
    """Oracle: enumeration."""
    for i, j in itertools.combinations(range(5), 2):
        every = itertools.product({row[i] for row in ROWS}, {row[j] for row in ROWS})
        assert {(row[i], row[j]) for row in ROWS} == set(every)
    for i in range(5):
        assert {row[i] for row in ALWAYS} == {row[i] for row in ROWS}


def test_shapes_and_dtypes(found):
    """Structure: a step keeps those of the state; what is handed on is `[C]` float32, bool for who was heard."""
    first, state, radio, delivery = found
    assert jax.tree.structure(first) == jax.tree.structure(state)
    jax.tree.map(lambda x, y: np.testing.assert_equal((x.shape, x.dtype), (y.shape, y.dtype)), first, state)
    assert all(leaf.shape[0] == 6 for leaf in jax.tree.leaves(state))
    for leaf in (radio.snr_hz, radio.start_s, delivery.latency_s, delivery.energy_j):
        assert (leaf.shape, leaf.dtype) == ((6,), jnp.float32)
    for leaf in (radio.band_hz, radio.power_w):
        assert (leaf.shape, leaf.dtype) == ((), jnp.float32)
    assert (delivery.delivered.shape, delivery.delivered.dtype) == ((6,), bool)


def test_a_channel_is_that_of_the_client_whatever_its_place(jitted, numbers, found):
    """Invariance under permutation, and a client is not told who else there is but by the broadcast."""
    order = jnp.array([4, 1, 0, 5, 3, 2])
    rest = trees.take((PRESENT, WORK, BITS, DOWN), order)
    first, state, radio, delivery = jitted(numbers, IDS[order], *rest)
    assert_equal((first, state), trees.take(found[:2], order))
    assert_close(
        (radio.snr_hz, radio.start_s, delivery), trees.take((found[2].snr_hz, found[2].start_s, found[3]), order)
    )


def test_padding_by_absent_clients_changes_nothing(jitted, numbers, found):
    """Invariance: two more who are absent, of whatever work and bits."""

    def pad(leaf, value):
        return jnp.append(leaf, jnp.full(2, value, leaf.dtype))

    more = pad(PRESENT, 0), Work(pad(WORK.samples, 1e6)), pad(BITS, 1e9), pad(DOWN, 1e7)
    first, state, radio, delivery = jitted(numbers, pad(IDS, 99), *more)
    cut = jax.tree.map(lambda leaf: leaf[:6], (first, state, radio.snr_hz, radio.start_s, delivery))
    assert_equal(cut[:2], found[:2])
    assert_close(cut[2:], (found[2].snr_hz, found[2].start_s, found[3]))
    np.testing.assert_array_equal(delivery.latency_s[6:], 0)


def test_who_is_absent_costs_nothing_and_is_not_heard(found):
    """By definition."""
    _, _, radio, delivery = found
    assert radio.start_s[2] == delivery.latency_s[2] == delivery.energy_j[2] == 0
    assert not delivery.delivered[2]


def test_no_bits_take_no_time_on_the_air(found, ends):
    """Closed form: an upload of nothing ends where it begins, arrives, and costs what computing costs, at any band."""
    _, _, radio, delivery = found
    assert delivery.latency_s[3] == radio.start_s[3]
    assert delivery.delivered[3]
    for share_hz in (jnp.zeros(6), jnp.full(6, 1e5)):
        nothing = ends(jnp.zeros(6), share_hz)
        assert_equal(nothing.latency_s, radio.start_s)
        assert_equal(nothing.delivered, PRESENT > 0)
        assert_close(nothing.energy_j[3], delivery.energy_j[3])
        assert np.all(nothing.energy_j <= ends(BITS, share_hz).energy_j)


def test_more_bits_never_end_earlier(found, ends):
    """Monotonicity, of time and energy; whether a client is heard does not turn on it."""
    share_hz = found[2].band_hz / 6.0 * PRESENT
    before = ends(BITS, share_hz)
    for factor in (1.0001, 2.0, 1e3):
        after = ends(factor * BITS, share_hz)
        assert np.all(after.latency_s >= before.latency_s)
        assert np.all((after.energy_j >= before.energy_j) | ~np.isfinite(after.latency_s))
        assert_equal(after.delivered, before.delivered)
        before = after


def test_a_wider_share_and_an_earlier_start_never_end_later(found, ends):
    """Monotonicity."""
    share_hz = found[2].band_hz / 6.0 * PRESENT
    delivery = ends(BITS, share_hz)
    assert np.all(ends(BITS, 2 * share_hz).latency_s <= delivery.latency_s)
    assert np.all(ends(BITS, share_hz, late_s=1.0).latency_s >= delivery.latency_s)


def test_a_plan_holds_where_the_channel_is_known(row, found):
    """Oracle: who is planned with an snr above 0 is heard at once under perfect knowledge, and who is not, is not."""
    _, options = row
    _, _, radio, delivery = found
    able = (np.asarray(radio.snr_hz) > 0) | (np.asarray(BITS) == 0)
    if options.csi == "perfect":
        np.testing.assert_array_equal(delivery.delivered, able & (np.asarray(PRESENT) > 0))
    assert not np.any(np.asarray(delivery.delivered) & ~able)
