"""Min-max latency against reference vectors, float64 solvers, finite differences and its edge cases."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

from fedjax_lora import wireless
from fedjax_lora.wireless import uplink_rate
from oracles import wireless_oracle

CASES = json.loads((pathlib.Path(__file__).parents[1] / "vectors" / "wireless.json").read_text())["min_max_latency"]


min_max_latency = jax.jit(wireless.min_max_latency)  # compiles once a cohort size, where eager would once an operation


def inputs(case):
    return *(jnp.array(case[name]) for name in ("bits", "snr_hz", "start_s")), case["bandwidth_hz"]


def random_case(seed, clients):
    """Payloads over two decades, gains over five, starts within two seconds, 20 MHz."""
    rng = np.random.default_rng(seed)
    bits, snr = 10 ** rng.uniform(5, 7, clients), 10 ** rng.uniform(6, 11, clients)
    return *(np.float32(x) for x in (bits, snr, rng.uniform(0, 2, clients))), 2e7


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_reference_vectors(case):
    allocation = min_max_latency(*inputs(case))
    np.testing.assert_allclose(allocation.latency_s, case["latency_s"], rtol=5e-7)
    np.testing.assert_allclose(allocation.bandwidth_hz, case["shares_hz"], rtol=2e-6)
    assert allocation.feasible


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_equal_split_and_time_division_of_the_reference_vectors(case):
    bits, snr, start, band = inputs(case)
    equal = jnp.max(start + bits / uplink_rate(band / bits.size, snr))
    np.testing.assert_allclose(equal, case["equal_split_latency_s"], rtol=1e-6)
    if "tdma_latency_s" in case:
        np.testing.assert_allclose(jnp.sum(bits / uplink_rate(band, snr)), case["tdma_latency_s"], rtol=1e-6)


def test_gradients_of_the_reference_vectors():
    case = CASES[1]
    gradient = jax.jit(jax.grad(lambda *args: min_max_latency(*args).latency_s, (0, 3)))(*inputs(case))
    np.testing.assert_allclose(gradient[0], case["dlatency_dbits"], rtol=5e-6)
    np.testing.assert_allclose(gradient[1], case["dlatency_dbandwidth"], rtol=5e-6)


@pytest.mark.parametrize(("seed", "clients"), [(0, 2), (1, 4), (2, 40)])
def test_random_cohorts_match_scipy_in_float64(seed, clients):
    case = random_case(seed, clients)
    latency, shares = wireless_oracle.min_max_latency(*case)
    allocation = min_max_latency(*case)
    np.testing.assert_allclose(allocation.latency_s, latency, rtol=1e-6)
    np.testing.assert_allclose(allocation.bandwidth_hz, shares, rtol=1e-4)


@pytest.mark.parametrize("seed", [4, 5])
def test_scipy_slsqp_finds_no_lower_latency(seed):
    """SLSQP over shares and latency at once, from the equal split, knows nothing of the optimality conditions."""
    bits, snr, start, band = (np.float64(x) for x in random_case(seed, 3))
    result = optimize.minimize(
        lambda x: x[-1],
        np.append(np.full(3, 1 / 3), 10.0),
        bounds=[(1e-6, 1)] * 3 + [(0, None)],
        constraints=[
            {"type": "ineq", "fun": lambda x: 1 - x[:3].sum()},
            {"type": "ineq", "fun": lambda x: x[-1] - start - bits / wireless_oracle.rate(x[:3] * band, snr)},
        ],
        options={"ftol": 1e-10, "maxiter": 300},
    )
    assert result.success
    np.testing.assert_allclose(min_max_latency(bits, snr, start, band).latency_s, result.x[-1], rtol=1e-5)


def test_brute_force_over_a_simplex_finds_no_lower_latency():
    bits, snr, start, band = (np.float64(x) for x in random_case(6, 3))
    first, second = np.meshgrid(*[np.linspace(0.002, 0.998, 499)] * 2, indexing="ij")
    split = np.stack([first, second, 1 - first - second], -1)[first + second < 0.999]
    best = np.max(start + bits / wireless_oracle.rate(split * band, snr), axis=-1).min()
    latency = float(min_max_latency(bits, snr, start, band).latency_s)
    assert best * 0.98 < latency <= best * (1 + 1e-6)


@pytest.mark.parametrize("seed", [7, 8])
def test_every_client_ends_at_the_latency_and_the_band_is_used_up(seed):
    """The optimality conditions, evaluated in float64 at the float32 answer."""
    bits, snr, start, band = random_case(seed, 40)
    allocation = min_max_latency(bits, snr, start, band)
    shares = np.float64(allocation.bandwidth_hz)
    np.testing.assert_allclose(start + bits / wireless_oracle.rate(shares, snr), allocation.latency_s, rtol=2e-6)
    np.testing.assert_allclose(shares.sum(), band, rtol=1e-6)


def finite_difference(function, args, index, h=1e-5):
    """Central differences in float64, relative step, one element at a time; the element's axis comes last."""
    columns = []
    for place in np.ndindex(np.shape(args[index])):
        moved = [[np.array(x, np.float64) for x in args] for _ in range(2)]
        step = h * max(abs(moved[0][index][place]), 1e-2)
        moved[0][index][place] += step
        moved[1][index][place] -= step
        columns.append((np.asarray(function(*moved[0])) - np.asarray(function(*moved[1]))) / (2 * step))
    return np.stack(columns, -1).reshape((*np.shape(columns[0]), *np.shape(args[index])))


@pytest.mark.parametrize("index", range(4), ids=["bits", "snr_hz", "start_s", "bandwidth_hz"])
def test_latency_and_share_gradients_match_float64_finite_differences(index):
    args = random_case(9, 4)
    jacobian = jax.jit(jax.jacrev(lambda *args: min_max_latency(*args)[:2], index))(*args)
    for output, got in enumerate(jacobian):
        expected = finite_difference(lambda *x, i=output: wireless_oracle.min_max_latency(*x)[i], args, index)
        np.testing.assert_allclose(got, expected, rtol=2e-4, atol=2e-4 * np.abs(expected).max())


def test_a_loss_of_the_shares_has_the_chain_rules_gradient():
    """jax.grad of a nonlinear loss of the shares, against float64 differences of the same loss."""
    args = random_case(10, 4)
    gradient = jax.jit(jax.grad(lambda bits: jnp.sum(jnp.log(min_max_latency(bits, *args[1:]).bandwidth_hz) ** 2)))(
        args[0]
    )
    expected = finite_difference(lambda *x: np.sum(np.log(wireless_oracle.min_max_latency(*x)[1]) ** 2), args, 0)
    np.testing.assert_allclose(gradient, expected, rtol=2e-3, atol=2e-4 * np.abs(expected).max())


def test_gradients_by_start_sum_to_one_and_shares_gradients_to_the_bands():
    """Invariance: a common delay delays the end by itself; what the band gains, the shares gain."""
    bits, snr, start, band = random_case(11, 4)
    by_start = jax.jit(jax.grad(lambda start: min_max_latency(bits, snr, start, band).latency_s))(start)
    np.testing.assert_allclose(by_start.sum(), 1, rtol=1e-6)
    by_band = jax.jit(jax.jacfwd(lambda band: min_max_latency(bits, snr, start, band).bandwidth_hz))(band)
    np.testing.assert_allclose(by_band.sum(), 1, rtol=1e-5)


def test_a_client_alone_gets_the_band():
    """Closed form for K = 1: start + bits / r(B)."""
    allocation = min_max_latency(jnp.array([3e6]), jnp.array([4e7]), jnp.array([0.7]), 1e6)
    np.testing.assert_allclose(allocation.latency_s, 0.7 + 3e6 / wireless_oracle.rate(1e6, 4e7), rtol=1e-6)
    np.testing.assert_allclose(allocation.bandwidth_hz, [1e6], rtol=1e-6)


@pytest.mark.parametrize("weak_hz", [1e4, 1e6])
def test_one_power_limited_client_matches_scipy_in_float64(weak_hz):
    """The weak client sits at 1 - R ln2/c of 1e-4 to 1e-2, where float32 loses the answer by direct bisection."""
    case = np.full(5, 1e6), np.array([1e10, 3e9, weak_hz, 1e9, 2e10]), np.array([0.1, 0.2, 0, 0.3, 0.1]), 2e7
    latency, shares = wireless_oracle.min_max_latency(*case)
    allocation = min_max_latency(*case)
    np.testing.assert_allclose(allocation.latency_s, latency, rtol=1e-6)
    np.testing.assert_allclose(allocation.bandwidth_hz, shares, rtol=1e-4)


def test_hugely_different_magnitudes_match_scipy_in_float64():
    """Payloads over six decades, gains over nine, one start far behind the others."""
    case = np.array([1e3, 1e9, 3e5, 1e7]), np.array([5e3, 1e11, 1e12, 2e6]), np.array([0.0, 0.5, 900.0, 1.0]), 1e7
    latency, shares = wireless_oracle.min_max_latency(*case)
    allocation = min_max_latency(*case)
    np.testing.assert_allclose(allocation.latency_s, latency, rtol=1e-6)
    np.testing.assert_allclose(allocation.bandwidth_hz, shares, rtol=3e-4)


def test_a_long_common_wait_does_not_round_the_uploads_away():
    """Invariance under a common delay of 4096 s, against the shares without it."""
    bits, snr, start, band = jnp.array([1e5, 3e5, 2e5]), jnp.array([1e9, 3e7, 1e8]), jnp.zeros(3), 2e7
    early, late = min_max_latency(bits, snr, start, band), min_max_latency(bits, snr, start + 4096, band)
    np.testing.assert_allclose(late.bandwidth_hz, early.bandwidth_hz, rtol=1e-6)
    np.testing.assert_allclose(late.latency_s - 4096, early.latency_s, atol=3e-4)


def test_clients_without_bits_change_nothing_and_get_nothing():
    """Invariance under padding, whatever the padded client's gain and start are; gradients too."""
    bits, snr, start, band = random_case(12, 3)
    alone = min_max_latency(bits, snr, start, band)
    padded = np.append(bits, [0, 0]), np.append(snr, [0, 1e12]), np.append(start, [np.inf, 50])
    allocation = min_max_latency(*padded, band)
    np.testing.assert_array_equal(allocation.bandwidth_hz[3:], 0)
    np.testing.assert_allclose(allocation.bandwidth_hz[:3], alone.bandwidth_hz, rtol=1e-6)
    np.testing.assert_allclose(allocation.latency_s, alone.latency_s, rtol=1e-6)
    assert allocation.feasible
    gradient = jax.jit(jax.grad(lambda *args: min_max_latency(*args, band).latency_s, (0, 1, 2)))(
        *map(jnp.float32, padded)
    )
    np.testing.assert_array_equal(np.stack(gradient)[:, 3:], 0)
    assert np.isfinite(np.stack(gradient)).all()


@pytest.mark.parametrize(("column", "value"), [(1, 0), (1, 1e-30), (2, np.inf)], ids=["no gain", "faint", "no start"])
def test_a_client_that_cannot_send_is_infeasible_and_leaves_the_others_alone(column, value):
    """Invariance: the others' shares are those of a cohort without it; gradients stay finite."""
    bits, snr, start, band = case = random_case(13, 5)
    others = np.arange(5) != 2
    case[column][2] = value
    allocation = min_max_latency(bits, snr, start, band)
    assert np.isposinf(allocation.latency_s) and not allocation.feasible
    expected = min_max_latency(bits[others], snr[others], start[others], band).bandwidth_hz
    np.testing.assert_allclose(allocation.bandwidth_hz[others], expected, rtol=1e-6)
    assert allocation.bandwidth_hz[2] == 0
    gradient = jax.jit(jax.grad(lambda bits: min_max_latency(bits, snr, start, band).bandwidth_hz[0]))(bits)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("clients", [0, 3])
def test_an_empty_cohort_takes_no_time(clients):
    """By definition: latency 0, feasible, no shares, gradients 0."""
    empty = jnp.zeros(clients)
    allocation = min_max_latency(empty, empty, empty, 2e7)
    assert allocation.latency_s == 0 and allocation.feasible
    np.testing.assert_array_equal(allocation.bandwidth_hz, 0)
    gradient = jax.jit(jax.grad(lambda *args: min_max_latency(*args).latency_s, (0, 1, 2)))(empty, empty, empty, 2e7)
    np.testing.assert_array_equal(np.stack(gradient), 0)


def test_no_band_is_infeasible():
    """By definition: with bits to send and nothing to send them on, latency is inf."""
    allocation = min_max_latency(jnp.ones(2), jnp.ones(2), jnp.zeros(2), 0.0)
    assert np.isposinf(allocation.latency_s) and not allocation.feasible
    np.testing.assert_array_equal(allocation.bandwidth_hz, 0)


def test_order_of_the_cohort_is_immaterial():
    """Invariance under permutation."""
    *args, band = random_case(14, 5)
    order = np.array([3, 0, 1, 4, 2])
    direct = min_max_latency(*args, band).bandwidth_hz[order]
    np.testing.assert_allclose(min_max_latency(*(x[order] for x in args), band).bandwidth_hz, direct, rtol=2e-6)


def test_jit_equals_eager():
    case = random_case(15, 4)
    for jitted, eager in zip(min_max_latency(*case), wireless.min_max_latency(*case), strict=True):
        np.testing.assert_allclose(jitted, eager, rtol=1e-5)


def test_vmap_equals_a_loop():
    cohorts = [random_case(seed, 4)[:3] for seed in range(15, 19)]
    stacked = [jnp.stack(column) for column in zip(*cohorts, strict=True)]
    mapped = jax.jit(jax.vmap(min_max_latency, (0, 0, 0, None)))(*stacked, 2e7)
    for row, cohort in enumerate(cohorts):
        single = min_max_latency(*cohort, 2e7)
        np.testing.assert_allclose(mapped.latency_s[row], single.latency_s, rtol=1e-6)
        np.testing.assert_allclose(mapped.bandwidth_hz[row], single.bandwidth_hz, rtol=1e-5)


def test_shapes_are_checked():
    with pytest.raises(ValueError, match=r"one shape \[K\], got"):
        min_max_latency(jnp.ones(3), jnp.ones(2), jnp.ones(3), 1.0)
    with pytest.raises(ValueError, match="bandwidth_hz must be a scalar"):
        min_max_latency(jnp.ones(3), jnp.ones(3), jnp.ones(3), jnp.ones(3))
