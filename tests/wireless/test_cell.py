"""The cell against closed forms and NumPy in float64, and its invariance to order and padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from fedjax_lora.core.learning import Work
from fedjax_lora.core.methods import Context
from fedjax_lora.wireless import WirelessConfig, rayleigh_outage
from fedjax_lora.wireless.cell import CellState, make
from oracles import wireless_oracle

KEY = jax.random.key(3)
IDS = jnp.array([7, 2, 40, 11, 0])
STATE = CellState(
    mean_gain=jnp.array([1e-9, 4e-11, 2e-12]),
    fading=jnp.array([1 + 0j, 0.6 - 0.8j, 0.1 + 0.2j], jnp.complex64),
    cpu_hz=jnp.array([1e9, 2e9, 1.6e9]),
)
POWER_GAIN = np.array([1, 1, 0.05])
SHARE_HZ = jnp.array([5e6, 8e6, 2e6])
BITS = jnp.array([1e6, 3e4, 2e5])
SNR_PER_GAIN_HZ = 0.01 / 10**-20.4
ALL, AT_ONCE = jnp.ones(3), jnp.zeros(3)
SAMPLES = jnp.float32([80, 24, 8])
CYCLES = np.array([80, 24, 8]) * 1e7


def cell(**options):
    return make(WirelessConfig(**options), Context(num_clients=3, cohort_size=3))


def snr_hz(link, state=STATE):
    """As control knows it."""
    zeros = jnp.zeros_like(state.cpu_hz)
    return link.observe(state, Work(zeros), zeros, zeros).snr_hz


def start_s(link, downlink_bits, present=ALL, state=STATE):
    return link.observe(state, Work(SAMPLES), jnp.full(3, downlink_bits), jnp.float32(present)).start_s


def delivered(link, state=STATE, bits=BITS, share_hz=SHARE_HZ, start_s=AT_ONCE, present=ALL, samples=SAMPLES):
    return jax.jit(link.deliver)(state, Work(samples), bits, share_hz, start_s, present)


def assert_same(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


def test_draws_follow_the_client_and_not_its_place():
    """Invariance under permutation and padding, bit for bit, at the start and after a step."""
    link = cell(path_loss="uma", fading_correlation=0.5)
    init, step = jax.jit(link.init), jax.jit(link.step)
    state = init(KEY, IDS)
    order = jnp.array([4, 1, 0, 3, 2])
    padded_ids = jnp.append(IDS, jnp.array([100, 101]))
    assert_same(init(KEY, IDS[order]), jax.tree.map(lambda leaf: leaf[order], state))
    padded = init(KEY, padded_ids)
    assert_same(jax.tree.map(lambda leaf: leaf[:5], padded), state)
    stepped = step(state, jax.random.key(4), IDS)
    assert_same(jax.tree.map(lambda leaf: leaf[:5], step(padded, jax.random.key(4), padded_ids)), stepped)
    assert_same((stepped.mean_gain, stepped.cpu_hz), (state.mean_gain, state.cpu_hz))
    assert not np.any(np.asarray(stepped.fading) == np.asarray(state.fading))


def test_init_draws_each_quantity_from_its_own_law():
    """Kolmogorov-Smirnov for processors and distances in closed form (no shadowing: the gain is the distance)."""
    state = jax.jit(cell(shadowing_db=0, fading="none").init)(KEY, jnp.arange(5000))
    assert stats.kstest(np.asarray(state.cpu_hz) / 1e9 - 1, "uniform").pvalue > 0.01
    distance_m = 10 ** ((-10 * np.log10(np.asarray(state.mean_gain)) - 128.1) / 37.6 + 3)
    assert stats.kstest(np.clip((distance_m**2 - 35**2) / (500**2 - 35**2), 0, 1), "uniform").pvalue > 0.01
    np.testing.assert_array_equal(state.fading, 1)


def test_correlation_of_one_freezes_the_fading():
    link = cell(fading="rician", fading_correlation=1.0)
    state = jax.jit(link.init)(KEY, IDS)
    np.testing.assert_allclose(jax.jit(link.step)(state, jax.random.key(1), IDS).fading, state.fading, atol=1e-6)


def test_snr_matches_its_closed_form_with_either_knowledge():
    gain = np.asarray(STATE.mean_gain, np.float64)
    perfect = snr_hz(cell())
    np.testing.assert_allclose(perfect, SNR_PER_GAIN_HZ * gain * POWER_GAIN, rtol=1e-6)
    mean = snr_hz(cell(csi="mean", fade_margin_db=20, noise_figure_db=10))
    np.testing.assert_allclose(mean, SNR_PER_GAIN_HZ * gain / 1000, rtol=1e-6)


def test_start_is_compute_time_in_closed_form_and_zero_for_an_absent_client():
    start = start_s(cell(), 1e6, [1.0, 0.0, 0.5])
    np.testing.assert_allclose(start, [80 * 1e7 / 1e9, 0, 8 * 1e7 / 1.6e9], rtol=1e-6)


def test_downlink_runs_at_the_worst_present_clients_rate():
    """NumPy in float64, at 46 dBm over 10 dBm; the last client is the worst and leaves."""
    link = cell(downlink=True)
    snr = 10**3.6 * SNR_PER_GAIN_HZ * np.asarray(STATE.mean_gain, np.float64) * POWER_GAIN
    compute = CYCLES / np.asarray(STATE.cpu_hz)
    everyone = start_s(link, 1e8)
    np.testing.assert_allclose(everyone, compute + 1e8 / wireless_oracle.rate(2e7, snr[2]), rtol=1e-6)
    two = start_s(link, 1e8, [1, 1, 0])
    np.testing.assert_allclose(two[:2], (compute + 1e8 / wireless_oracle.rate(2e7, snr[1]))[:2], rtol=1e-6)
    np.testing.assert_array_equal(start_s(link, 1e8, [0, 0, 0]), 0)


def test_delivery_matches_numpy_in_float64():
    start = jnp.array([0.5, 0.25, 0.75])
    delivery = delivered(cell(), start_s=start)
    snr = SNR_PER_GAIN_HZ * np.asarray(STATE.mean_gain, np.float64) * POWER_GAIN
    upload = np.asarray(BITS) / wireless_oracle.rate(np.asarray(SHARE_HZ), snr)
    np.testing.assert_allclose(delivery.latency_s, start + upload, rtol=1e-6)
    compute_j = 1e-28 * CYCLES * np.asarray(STATE.cpu_hz, np.float64) ** 2
    np.testing.assert_allclose(delivery.energy_j, compute_j + 0.01 * upload, rtol=1e-6)
    np.testing.assert_array_equal(delivery.delivered, True)


def test_with_mean_knowledge_delivery_keeps_the_plan_and_fails_below_the_margin():
    """By hand: power gains 1, 1, 0.05 against a margin of 10 dB; time and energy are those of the plan."""
    link = cell(csi="mean")
    delivery = delivered(link)
    np.testing.assert_array_equal(delivery.delivered, [True, True, False])
    planned = wireless_oracle.rate(np.asarray(SHARE_HZ), SNR_PER_GAIN_HZ * np.float64(STATE.mean_gain) / 10)
    np.testing.assert_allclose(delivery.latency_s, np.asarray(BITS) / planned, rtol=1e-6)
    assert delivery.energy_j[2] > 0.01 * delivery.latency_s[2]


def test_share_of_outages_matches_the_closed_form_within_five_standard_errors():
    """The planned rate is that of c_mean / 10: outage 1 - exp(-0.1), by `rayleigh_outage` too."""
    clients, band = 20_000, 1e3
    link = cell(csi="mean")
    state = jax.jit(link.init)(KEY, jnp.arange(clients))
    bits, share_hz, present = jnp.full(clients, 10.0), jnp.full(clients, band), jnp.ones(clients)
    arrived = delivered(link, state, bits, share_hz, jnp.zeros(clients), present, jnp.full(clients, 8.0))
    expected = 1 - np.exp(-0.1)
    failed = 1 - np.mean(arrived.delivered)
    assert abs(failed - expected) < 5 * np.sqrt(expected * (1 - expected) / clients)
    planned = wireless_oracle.rate(band, 5e4)
    np.testing.assert_allclose(rayleigh_outage(planned, band, 5e5), expected, rtol=1e-5)


@pytest.mark.parametrize("csi", ["perfect", "mean"])
def test_who_cannot_send_is_late_for_ever_and_spends_on_computing_alone(csi):
    """By definition: no band, no gain, and beside them a client that has nothing to send."""
    state = STATE.replace(mean_gain=jnp.array([1e-9, 0, 0]))
    delivery = delivered(cell(csi=csi), state, jnp.array([9.0, 9.0, 0.0]), jnp.array([0.0, 1e6, 0.0]))
    np.testing.assert_array_equal(delivery.latency_s, [np.inf, np.inf, 0])
    np.testing.assert_array_equal(delivery.delivered, [False, False, True])
    np.testing.assert_allclose(delivery.energy_j, 1e-28 * CYCLES * np.asarray(STATE.cpu_hz) ** 2, rtol=1e-6)


def test_an_absent_client_takes_no_time_and_no_energy():
    delivery = delivered(cell(), present=jnp.array([1.0, 0.0, 1.0]))
    np.testing.assert_array_equal([leaf[1] for leaf in delivery], 0)
    np.testing.assert_array_equal(delivery.delivered, [True, False, True])


def test_without_bits_a_client_only_computes():
    """Closed form: latency is the start, energy the processor's, whatever band, gain and fading are."""
    link = cell(csi="mean", downlink=True, fade_threshold=0.5, retransmissions=2)
    state = STATE.replace(mean_gain=jnp.array([1e-9, 0, 1e-30]), retries=jnp.zeros((3, 2)))
    start = start_s(link, 0.0, state=state)
    np.testing.assert_allclose(start, CYCLES / np.asarray(STATE.cpu_hz), rtol=1e-6)
    delivery = delivered(link, state, jnp.zeros(3), jnp.zeros(3), start_s=start)
    np.testing.assert_array_equal(delivery.latency_s, start)
    np.testing.assert_array_equal(delivery.delivered, True)
    np.testing.assert_allclose(delivery.energy_j, 1e-28 * CYCLES * np.asarray(STATE.cpu_hz) ** 2, rtol=1e-6)


CLIENTS, BAND_HZ = 20_000, 1e3


def delivered_ten_bits(link, state):
    """Of clients that are there at once, with a part of the band each."""
    zeros = jnp.zeros_like(state.cpu_hz)
    return delivered(link, state, zeros + 10, zeros + BAND_HZ, zeros, zeros + 1, zeros + 8)


def many(csi, margin_db=0.0, **options):
    """A link, its state after a step and the delivery of 10 bits each; gains alike: outage is the fading's alone."""
    link = cell(csi=csi, fade_margin_db=margin_db, shadowing_db=0, **options)
    state = jax.jit(link.init)(KEY, jnp.arange(CLIENTS)).replace(mean_gain=jnp.full(CLIENTS, 1e-9))
    state = jax.jit(link.step)(state, jax.random.key(8), jnp.arange(CLIENTS))
    return link, state, delivered_ten_bits(link, state)


def assert_share(found, expected):
    """A mean of indicators within four standard errors."""
    assert abs(np.mean(found) - expected) < 4 * np.sqrt(expected * (1 - expected) / np.size(found))


@pytest.mark.parametrize("fading", ["rayleigh", "rician"])
def test_an_estimate_without_error_is_perfect_knowledge(fading):
    """Invariance, bit for bit: plan, delivery and the fading itself."""
    link, state, delivery = many("estimated", csi_error=0.0, fading=fading)
    perfect, known, other = many("perfect", fading=fading)
    assert_same(state.fading, known.fading)
    assert_same(snr_hz(link, state), snr_hz(perfect, known))
    assert_same(delivery, other)


def test_an_estimate_that_misses_all_is_mean_knowledge():
    """Invariance: under Rayleigh the conditional mean gain is 1 whatever the estimate was."""
    link, state, delivery = many("estimated", 10.0, csi_error=1.0)
    mean, known, other = many("mean", 10.0)
    np.testing.assert_allclose(snr_hz(link, state), snr_hz(mean, known), rtol=1e-6)
    assert_same(delivery.delivered, other.delivered)


@pytest.mark.parametrize("error", [0.1, 0.5])
def test_the_error_of_an_estimate_is_apart_from_it_and_of_its_share(error):
    """Closed form: with h - sqrt(1 - e) estimate = sqrt(e) w, w is CN(0, 1) and uncorrelated with the estimate."""
    state = many("estimated", csi_error=error)[1]
    known, true = np.asarray(state.estimate, np.complex128), np.asarray(state.fading, np.complex128)
    missed = (true - np.sqrt(1 - error) * known) / np.sqrt(error)
    assert stats.kstest(np.abs(missed) ** 2, "expon").pvalue > 0.01
    assert stats.kstest(np.abs(known) ** 2, "expon").pvalue > 0.01
    assert abs(np.mean(missed * np.conj(known))) < 4 / np.sqrt(CLIENTS)


def test_outage_under_an_estimate_is_a_noncentral_chi_squares():
    """SciPy: given the estimate, 2 |h|^2 / e is noncentral chi-square of 2 degrees; averaged over the estimates."""
    error, margin_db = 0.2, 3.0
    _, state, delivery = many("estimated", margin_db, csi_error=error)
    known = (1 - error) * np.abs(np.asarray(state.estimate, np.complex128)) ** 2
    planned = 10 ** (-margin_db / 10) * (known + error)
    assert_share(~np.asarray(delivery.delivered), stats.ncx2.cdf(2 * planned / error, 2, 2 * known / error).mean())


def test_attempts_are_geometric_and_their_time_and_energy_add_up():
    """Closed form: each fails with 1 - exp(-m), and takes the time of the plan; the third retry is the last."""
    margin_db, retransmissions = 3.0, 3
    link, state, delivery = many("mean", margin_db, retransmissions=retransmissions)
    fails = -np.expm1(-(10 ** (-margin_db / 10)))
    attempt_s = 10 / wireless_oracle.rate(BAND_HZ, np.asarray(snr_hz(link, state), np.float64))
    attempts = np.asarray(delivery.latency_s) / attempt_s
    np.testing.assert_allclose(attempts, np.round(attempts), rtol=1e-5)
    for number in range(1, retransmissions + 1):
        assert_share(np.round(attempts) == number, (1 - fails) * fails ** (number - 1))
    assert_share(np.round(attempts) == retransmissions + 1, fails**retransmissions)
    assert_share(~np.asarray(delivery.delivered), fails ** (retransmissions + 1))
    compute_j = 1e-28 * 8 * 1e7 * np.asarray(state.cpu_hz, np.float64) ** 2
    np.testing.assert_allclose(delivery.energy_j, compute_j + 0.01 * np.asarray(delivery.latency_s), rtol=1e-5)


def test_truncated_inversion_lets_go_of_a_share_and_makes_the_inverse_gain_finite():
    """Closed form under Rayleigh: outages with 1 - exp(-t); the others' mean inverse gain is exp(t) E1(t)."""
    threshold, clients = 0.05, 200_000
    link = cell(fade_threshold=threshold, shadowing_db=0)
    state = jax.jit(link.init)(KEY, jnp.arange(clients))
    delivery = delivered_ten_bits(link, state)
    heard = np.asarray(delivery.delivered)
    assert_share(~heard, -np.expm1(-threshold))
    np.testing.assert_array_equal(heard, np.isfinite(delivery.latency_s))
    np.testing.assert_array_equal(heard, np.asarray(snr_hz(link, state)) > 0)
    inverse = SNR_PER_GAIN_HZ * np.float64(state.mean_gain)[heard] / np.float64(snr_hz(link, state))[heard]
    expected = np.exp(threshold) * special.exp1(threshold)
    assert abs(inverse.mean() - expected) < 5 * inverse.std() / np.sqrt(heard.sum())
    assert inverse.max() <= 1 / threshold * (1 + 1e-5)


@pytest.mark.parametrize("csi", ["perfect", "mean", "estimated"])
def test_a_threshold_changes_nothing_for_who_is_above_it(csi):
    """Invariance, bit for bit: who is heard with a threshold is planned and delivered as without one.

    With mean knowledge nobody is known to be in a fade; with an estimate the known gain counts, without its margin.
    """
    link, plain = cell(csi=csi, csi_error=0.3, fade_threshold=0.5), cell(csi=csi, csi_error=0.3)
    state = jax.jit(link.init)(KEY, jnp.arange(500))
    kept = np.asarray(snr_hz(link, state)) > 0
    known = np.asarray(snr_hz(plain, state)) / (SNR_PER_GAIN_HZ * np.asarray(state.mean_gain))
    margin = 1.0 if csi == "perfect" else 0.1
    np.testing.assert_array_equal(kept, known >= 0.5 * margin)
    assert kept.all() == (csi == "mean")
    found, expected = delivered_ten_bits(link, state), delivered_ten_bits(plain, state)
    assert_same(*(jax.tree.map(lambda leaf: leaf[kept], x) for x in (found, expected)))
    assert not np.asarray(found.delivered)[~kept].any()


def test_the_broadcast_does_not_wait_for_who_is_let_go():
    """Invariance: the start is that of a cohort without the third client, whose power gain is 0.05."""
    link = cell(downlink=True, fade_threshold=0.1)
    everyone, two = (start_s(link, 1e8, here) for here in ([1, 1, 1], [1, 1, 0]))
    np.testing.assert_array_equal(everyone[:2], two[:2])


def test_the_first_attempt_does_not_depend_on_further_ones():
    """Invariance: same fading; who arrives at once takes the same time."""
    _, alone, first = many("mean", 3.0)
    _, state, delivery = many("mean", 3.0, retransmissions=2)
    assert_same(state.fading, alone.fading)
    once = np.asarray(first.delivered)
    np.testing.assert_array_equal(np.asarray(delivery.latency_s)[once], np.asarray(first.latency_s)[once])
    assert np.asarray(delivery.delivered)[once].all()


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("bandwidth_hz", 0.0, "positive and finite"),
        ("bandwidth_hz", float("nan"), "positive and finite"),
        ("power_dbm", 4000.0, "between -100 and 100"),
        ("power_dbm", float("nan"), "between -100 and 100"),
        ("noise_figure_db", -1.0, "between 0 and 100"),
        ("capacitance", -1.0, "at least 0 and finite"),
        ("path_loss", "rural", "one of 3gpp128, umi, uma"),
        ("fading", "nakagami", "one of none, rayleigh, rician"),
        ("csi", "none", "one of perfect, mean, estimated"),
        ("carrier_ghz", 0.1, "between 0.5 and 100"),
        ("fading_correlation", 1.1, "between 0 and 1"),
        ("csi_error", -0.1, "between 0 and 1"),
        ("retransmissions", 101, "between 0 and 100"),
        ("fade_threshold", 1.0, "at least 0 and below 1"),
        ("cell_radius_m", 20.0, "at least min_distance_m = 35.0 and finite"),
        ("cpu_hz_max", 1e8, "at least cpu_hz_min = 1000000000.0 and finite"),
    ],
)
def test_config_names_field_value_and_what_is_allowed(field, value, allowed):
    with pytest.raises(ValueError) as error:
        WirelessConfig(**{field: value})
    assert str(error.value) == f"{field} must be {allowed}, got {value!r}"
