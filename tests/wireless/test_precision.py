"""The cell in float32 against float64, over the whole allowed range of its options, all of them in one program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_lora.core.keys import client_keys
from fedjax_lora.core.learning import Work
from fedjax_lora.core.methods import Context
from fedjax_lora.core.numbers import fill, split
from fedjax_lora.wireless import WirelessConfig, channel
from fedjax_lora.wireless.cell import CellState, make
from oracles import wireless_oracle as oracle

TRIALS, CLIENTS = 400, 3
CONTEXT = Context(num_clients=CLIENTS, cohort_size=CLIENTS)
IDS, KEY = jnp.arange(CLIENTS), jax.random.key(0)
NORMAL = (1e-36, 1e36)
"""What is beyond is not asked of float32."""

DECADES = {
    "bandwidth_hz": (2, 11),
    "downlink_hz": (2, 11),
    "server_hz": (6, 15),
    "server_capacitance": (-33, -20),
    "cycles_per_sample": (0, 15),
    "capacitance": (-30, -20),
    "cpu_hz_min": (6, 15),
    "min_distance_m": (-1, 4),
}
LINEAR = {
    "power_dbm": (-100, 100),
    "downlink_power_dbm": (-100, 100),
    "noise_figure_db": (0, 100),
    "fade_margin_db": (0, 100),
    "rician_k_db": (-100, 100),
    "shadowing_db": (0, 100),
    "carrier_ghz": (0.5, 100),
    "fading_correlation": (0, 1),
    "csi_error": (0, 1),
    "fade_threshold": (0, 0.99),
}


def options_at_random(seed=0):
    """Key -> `[TRIALS]` float32 within what is allowed; both ends of each range are among them."""
    generator, found = np.random.default_rng(seed), {}

    def uniform(low, high):
        values = generator.uniform(low, high, TRIALS)
        values[generator.permutation(TRIALS)[:40]] = np.repeat([low, high], 20)
        return values

    for name, ends in DECADES.items():
        found[name] = 10.0 ** uniform(*ends)
    for name, ends in LINEAR.items():
        found[name] = uniform(*ends)
    found["cell_radius_m"] = found["min_distance_m"] * 10.0 ** uniform(0, 3)
    found["cpu_hz_max"] = found["cpu_hz_min"] * 10.0 ** uniform(0, 2)
    return {name: np.float32(values) for name, values in found.items()}


NUMBERS = options_at_random()
EXACT = {name: np.float64(values)[:, None] for name, values in NUMBERS.items()}


def trials(function, **structure):
    """`function(record)` of every trial, mapped over the traced numbers."""
    options = WirelessConfig(**structure)
    structure, numbers = split(options)
    assert set(numbers) == set(NUMBERS)
    return jax.jit(jax.vmap(lambda numbers: function(make(fill(structure, numbers), CONTEXT))))(NUMBERS)


def assert_close(found, expected, rtol=1e-5, least=0.5):
    """Wherever float64 says a number of float32's range; and a share `least` of the trials is there."""
    found, expected = np.float64(found), np.broadcast_to(expected, np.shape(found))
    inside = (np.abs(expected) > NORMAL[0]) & (np.abs(expected) < NORMAL[1])
    assert inside.mean() > least
    np.testing.assert_allclose(found[inside], expected[inside], rtol=rtol)


GAIN = np.float32([1e-7, 3e-10, 4e-13])
FADING = np.complex64([1 + 0.5j, 0.6 - 0.8j, 0.1 + 0.2j])
ESTIMATE = np.complex64([1.1 + 0.4j, 0.4 - 0.7j, 0.2 + 0.2j])
CPU_HZ = np.float32([1e9, 3e12, 2e6])
STATE = CellState(*map(jnp.asarray, (GAIN, FADING, CPU_HZ, ESTIMATE)))
SAMPLES, BITS, DOWN = np.float32([80, 24, 8]), np.float32([1e6, 3e9, 2e3]), np.float32([1e8, 1e8, 1e8])
PRESENT = jnp.ones(CLIENTS)


@pytest.mark.parametrize("fading", ["none", "rayleigh", "rician"])
@pytest.mark.parametrize("csi", ["perfect", "mean", "estimated"])
def test_what_control_knows_equals_float64(fading, csi):
    """Oracle: NumPy in float64: snr, the start with the broadcast, power and band."""
    radio = trials(
        lambda cell: cell.observe(STATE, Work(jnp.asarray(SAMPLES)), jnp.asarray(DOWN), PRESENT),
        fading=fading,
        csi=csi,
        downlink=True,
    )
    steady, _ = oracle.amplitudes(fading, EXACT["rician_k_db"])
    known = oracle.known_power(csi, np.complex128(FADING), np.complex128(ESTIMATE), steady, EXACT["csi_error"])
    known = np.broadcast_to(known, (TRIALS, CLIENTS))
    sure = np.abs(known / EXACT["fade_threshold"].clip(1e-9) - 1) > 1e-5  # not at the threshold itself
    kept = known >= EXACT["fade_threshold"]
    margin = 1.0 if csi == "perfect" else oracle.linear(-EXACT["fade_margin_db"])
    snr_hz = np.where(kept, margin * known, 0.0) * oracle.snr_per_gain(EXACT) * np.float64(GAIN)
    assert_close(np.where(sure, radio.snr_hz, 1.0), np.where(sure, snr_hz, 1.0))
    np.testing.assert_array_equal((np.asarray(radio.snr_hz) > 0)[sure & (snr_hz > NORMAL[0])], True)
    np.testing.assert_array_equal((np.asarray(radio.snr_hz) > 0)[sure & ~kept], False)

    server = snr_hz * oracle.linear(EXACT["downlink_power_dbm"] - EXACT["power_dbm"])
    worst = np.min(np.where(kept, server, np.inf), axis=1, keepdims=True)
    band = EXACT["bandwidth_hz"]
    with np.errstate(invalid="ignore"):
        rate = np.where(np.isinf(worst), np.inf, oracle.rate(band, worst))
    compute_s = np.float64(SAMPLES) * EXACT["cycles_per_sample"] / np.float64(CPU_HZ)
    sure = sure.all(1) & ((worst > NORMAL[0]) & (rate > 0))[:, 0]
    assert_close(np.asarray(radio.start_s)[sure], (compute_s + np.float64(DOWN) / rate)[sure])
    assert_close(radio.power_w, 1e-3 * oracle.linear(EXACT["power_dbm"])[:, 0])
    assert_close(radio.band_hz, band[:, 0])


def test_what_a_server_and_its_downlink_take_equals_float64():
    """Oracle: NumPy in float64: the server's cycles, and bits at the rate of the whole downlink."""
    server_samples, down = np.float32([40, 12, 0]), np.float32([1e8, 2e5, 0])
    work = Work(*map(jnp.asarray, (SAMPLES, server_samples, BITS, down)))
    radio = trials(lambda cell: cell.observe(STATE, work, jnp.zeros(CLIENTS), PRESENT), fading="rayleigh")
    power = np.abs(np.complex128(FADING)) ** 2
    gain = oracle.linear(EXACT["downlink_power_dbm"] - EXACT["power_dbm"]) * oracle.snr_per_gain(EXACT)
    snr_hz = gain * np.float64(GAIN) * power
    heard = np.asarray(radio.snr_hz) > 0
    with np.errstate(divide="ignore", invalid="ignore"):
        down_s = np.where(down > 0, np.float64(down) / oracle.rate(EXACT["downlink_hz"], snr_hz), 0.0)
    server_s = np.float64(server_samples) * EXACT["cycles_per_sample"] / EXACT["server_hz"]
    sure = heard & (snr_hz > NORMAL[0])
    assert sure.mean() > 0.3
    assert_close(np.asarray(radio.shared_s)[sure], (server_s + down_s)[sure])
    cycles = np.float64(server_samples) * EXACT["cycles_per_sample"]
    assert_close(radio.server_j, EXACT["server_capacitance"] * cycles * EXACT["server_hz"] ** 2)


@pytest.mark.parametrize("fading", ["rayleigh", "rician"])
def test_delivery_equals_float64(fading):
    """Oracle: NumPy in float64: time and energy of a plan with a margin; who is below it, and not near it, fails."""

    def deliver(cell):
        zeros, share_hz = jnp.zeros(CLIENTS), jnp.full(CLIENTS, 1e6)
        return cell.deliver(STATE, Work(jnp.asarray(SAMPLES)), jnp.asarray(BITS), share_hz, zeros, PRESENT)

    delivery = trials(deliver, fading=fading, csi="mean")
    planned = oracle.linear(-EXACT["fade_margin_db"])
    snr_hz = planned * oracle.snr_per_gain(EXACT) * np.float64(GAIN)
    upload_s = np.float64(BITS) / oracle.rate(1e6, snr_hz)
    assert_close(delivery.latency_s, upload_s)
    cycles = np.float64(SAMPLES) * EXACT["cycles_per_sample"]
    compute_j = EXACT["capacitance"] * cycles * np.float64(CPU_HZ) ** 2
    assert_close(delivery.energy_j, compute_j + 1e-3 * oracle.linear(EXACT["power_dbm"]) * upload_s)
    power = np.abs(np.complex128(FADING)) ** 2
    sure = np.abs(power / planned - 1) > 1e-5
    np.testing.assert_array_equal(np.asarray(delivery.delivered)[sure], (power >= planned)[sure])


@pytest.mark.parametrize("fading", ["none", "rayleigh", "rician"])
def test_draws_of_a_step_equal_float64(fading):
    """Oracle: the same standard normal draw in float64, by the definitions of AR(1) and of an estimate's error."""
    steady, scatter = oracle.amplitudes(fading, EXACT["rician_k_db"])
    rho, error = EXACT["fading_correlation"], EXACT["csi_error"]
    keys = client_keys(KEY, IDS)

    def normal(keys):
        return np.complex128(jax.vmap(lambda key: jax.random.normal(key, dtype=jnp.complex64))(keys))

    stepped = trials(lambda cell: cell.step(STATE, KEY, IDS), fading=fading, csi="estimated")
    expected = steady + rho * (np.complex128(FADING) - steady) + np.sqrt(1 - rho**2) * scatter * normal(keys)
    np.testing.assert_allclose(stepped.fading, np.broadcast_to(expected, (TRIALS, CLIENTS)), rtol=1e-5, atol=1e-6)
    missed = np.sqrt(error) * scatter * normal(jax.vmap(jax.random.fold_in, (0, None))(keys, 1))
    estimate = steady + np.sqrt(1 - error) * (expected - steady) + missed
    np.testing.assert_allclose(stepped.estimate, np.broadcast_to(estimate, (TRIALS, CLIENTS)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("model", ["3gpp128", "umi", "uma"])
def test_gains_and_processors_of_the_start_equal_float64(model):
    """Oracle: the same uniform and normal draws in float64, through TR 38.901 as the tables write it.

    A gain of some hundred dB is a float32 of 1.5e-5 dB resolution in the shadowing and in the loss each.
    """
    state = trials(lambda cell: cell.init(KEY, IDS), path_loss=model)
    keys = jax.vmap(lambda key: jax.random.split(key, 4))(client_keys(KEY, IDS))

    def uniform(keys):
        return np.float64(jax.vmap(jax.random.uniform)(keys))

    cpu_hz = EXACT["cpu_hz_min"] + uniform(keys[:, 3]) * (EXACT["cpu_hz_max"] - EXACT["cpu_hz_min"])
    assert_close(state.cpu_hz, cpu_hz)
    area = uniform(jax.vmap(jax.random.split)(keys[:, 0])[:, 0])
    inner, outer = EXACT["min_distance_m"] ** 2, EXACT["cell_radius_m"] ** 2
    distance_m = np.sqrt(inner + area * (outer - inner))
    sight_key, shadow_key = jax.vmap(jax.random.split, out_axes=1)(keys[:, 1])
    sight, clear = True, np.ones(distance_m.shape, bool)
    if model != "3gpp128":
        near = np.minimum(18.0 / distance_m, 1.0)
        seen = near + np.exp(-distance_m / {"umi": 36.0, "uma": 63.0}[model]) * (1 - near)
        sight, clear = uniform(sight_key) < seen, np.abs(uniform(sight_key) - seen) > 1e-5
    shadow = np.float64(jax.vmap(jax.random.normal)(shadow_key))
    loss_db = oracle.path_loss(model, distance_m, EXACT["carrier_ghz"], sight)
    gain = oracle.linear(EXACT["shadowing_db"] * shadow - loss_db)
    assert_close(np.where(clear, state.mean_gain, 1.0), np.where(clear, gain, 1.0), rtol=2e-5)


@pytest.mark.parametrize("k_db", [-100.0, -30.0, 0.0, 6.0, 100.0])
def test_amplitudes_of_rician_fading_equal_float64(k_db):
    law = channel.fading_law("rician", jnp.float32(k_db))
    np.testing.assert_allclose(law, oracle.amplitudes("rician", k_db), rtol=3e-6)
