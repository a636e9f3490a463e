"""Bandwidth shares that let a cohort finish its uploads as early as possible."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from fedjax_lora.wireless.rate import LN2, log_gap, marginal_rates, spectral_efficiency

_ITERATIONS = 30
_TINY = float(jnp.finfo(jnp.float32).tiny)
_NEVER_S = 1e15  # thirty million years: an upload that needs longer cannot be sent, and squares of times stay finite
_MIN_SLOPE = 1e-20  # dr/db at c/b = 1e-10, far beyond any radio: keeps pulls finite


class Allocation(NamedTuple):
    """Shares of least latency.

    latency_s: scalar, when the last client ends; 0 where nobody sends, inf where somebody cannot.
    bandwidth_hz: `[K]` shares; 0 for a client that sends nothing or cannot.
    feasible: scalar bool, False where some client has bits to send and no way to.
    """

    latency_s: Array
    bandwidth_hz: Array
    feasible: Array


def min_max_latency(bits: ArrayLike, snr_hz: ArrayLike, start_s: ArrayLike, bandwidth_hz: ArrayLike) -> Allocation:
    """Minimise over shares b the time `max_k start_k + bits_k / r_k(b_k)`, with `sum b_k <= bandwidth_hz`.

    At the optimum all clients end together and the band is used up. A client without bits is left out. One that
    cannot send (no gain, no start, no band; 1e15 s counts as never) makes the allocation infeasible and its
    latency inf; the shares are then those of the others. Latency and shares have exact gradients, through the
    optimality conditions.

    Args:
      bits: `[K]` payloads, bit, >= 0.
      snr_hz: `[K]` received power over noise density p·g/N0, Hz, >= 0.
      start_s: `[K]` when a client can begin, s; inf for never.
      bandwidth_hz: scalar, the band, Hz.

    Raises:
      ValueError: if bits, snr_hz and start_s are not of one shape `[K]` or bandwidth_hz is no scalar.
    """
    bits, snr_hz, start_s, bandwidth_hz = (
        jnp.asarray(value, jnp.float32) for value in (bits, snr_hz, start_s, bandwidth_hz)
    )
    shapes = bits.shape, snr_hz.shape, start_s.shape
    if bits.ndim != 1 or len(set(shapes)) != 1:
        raise ValueError(f"bits, snr_hz and start_s must be of one shape [K], got {shapes}")
    if bandwidth_hz.ndim:
        raise ValueError(f"bandwidth_hz must be a scalar, got shape {bandwidth_hz.shape}")
    sends = bits > 0
    able = sends & (bits < _NEVER_S * snr_hz) & (start_s < _NEVER_S) & (bandwidth_hz > 0)
    latency_s, _, share_hz = _solve(
        jnp.where(able, bits, 0.0),
        jnp.where(able, snr_hz, 1.0),
        jnp.where(able, start_s, 0.0),
        jnp.where(bandwidth_hz > 0, bandwidth_hz, 1.0),
    )
    feasible = jnp.all(able | ~sends)
    return Allocation(jnp.where(feasible, latency_s, jnp.inf), share_hz, feasible)


@jax.custom_jvp
@jax.jit  # traced once for all programs that use it
def _solve(bits: Array, snr_hz: Array, start_s: Array, bandwidth_hz: Array) -> tuple[Array, Array, Array]:
    """Latency, upload times `[K]` and shares `[K]`; a client with 0 bits is left out, all others can send.

    Near a client's ceiling its share turns on the small time left beyond `floor = bits ln2 / snr_hz`, which
    float32 loses in the latency itself. So the unknown is `excess`, latency beyond the largest
    `start + floor`, and what is left to each client is carried as `excess + lead`.
    """
    active = bits > 0
    nats = jnp.where(active, bits * LN2, 1.0)
    floor_s = nats / snr_hz
    # Starts count from the latest, so that a long wait before it does not round short uploads away.
    origin_s = _max(start_s, active)
    earliest_s = start_s - origin_s + floor_s
    bound_s = _max(earliest_s, active)
    lead_s = jnp.where(active, bound_s - earliest_s, 0.0)

    def shares(excess_s: Array) -> tuple[Array, Array]:
        slack_s = excess_s + lead_s
        upload_s = slack_s + floor_s
        efficiency = spectral_efficiency(floor_s / upload_s, slack_s / upload_s)
        return upload_s, jnp.where(active, nats / (upload_s * efficiency), 0.0)

    def excess_on(share_hz: Array) -> Array:
        ratio = snr_hz / share_hz
        return jnp.maximum(_max(floor_s * log_gap(ratio) / jnp.log1p(ratio) - lead_s, active), _TINY)

    # Nobody beats having the whole band, and the equal split is one allocation: they bracket the optimum.
    highest_s = excess_on(bandwidth_hz / jnp.maximum(active.sum(), 1))
    lowest_s = jnp.maximum(excess_on(bandwidth_hz), 1e-30 * highest_s)  # so that their ratio is finite

    def halve(_: int, bracket: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bracket
        middle = 0.5 * (low + high)
        fits = shares(lowest_s * jnp.exp(middle))[1].sum() <= bandwidth_hz
        return jnp.where(fits, low, middle), jnp.where(fits, middle, high)

    bracket = jnp.zeros_like(lowest_s), jnp.log(jnp.maximum(highest_s / lowest_s, 1.0))
    _, exponent = jax.lax.fori_loop(0, _ITERATIONS, halve, bracket)
    excess_s = lowest_s * jnp.exp(exponent)
    upload_s, share_hz = shares(excess_s)
    share_hz *= bandwidth_hz / jnp.where(active.any(), share_hz.sum(), bandwidth_hz)
    latency_s = jnp.where(active.any(), origin_s + (bound_s + excess_s), 0.0)
    return latency_s, upload_s, share_hz


@_solve.defjvp
def _solve_jvp(
    primals: tuple[Array, Array, Array, Array], tangents: tuple[Array, Array, Array, Array]
) -> tuple[tuple[Array, Array, Array], tuple[Array, Array, Array]]:
    """Implicit, from `sum b_k = B` and `r_k(b_k) = bits_k / upload_k` with `upload_k = latency - start_k`.

    `pull_k = bits_k / (dr/db upload_k^2)` is the band that client k frees for a second of latency more. Ends with
    the shares held, `d_alone`, are taken relative to the client of largest pull: where it has nearly all
    of it, its share's tangent would otherwise be lost in a difference.
    """
    bits, snr_hz, _, _ = primals
    d_bits, d_snr, d_start, d_band = tangents
    latency_s, upload_s, share_hz = _solve(*primals)
    active = bits > 0
    safe_bits, safe_share_hz = jnp.where(active, bits, 1.0), jnp.where(share_hz > 0, share_hz, 1.0)
    by_band, by_snr = marginal_rates(safe_share_hz, snr_hz)
    pull = bits / upload_s / jnp.maximum(by_band, _MIN_SLOPE) / upload_s
    total = jnp.where(active.any(), pull.sum(), 1.0)
    weight = pull / total

    d_alone = d_start + upload_s * (d_bits - upload_s * by_snr * d_snr) / safe_bits
    dominant = active & (pull >= jnp.max(pull, initial=0.0))
    d_reference = jnp.sum(jnp.where(dominant, d_alone, 0.0)) / jnp.maximum(dominant.sum(), 1)
    d_apart = d_alone - d_reference
    d_common = jnp.sum(weight * d_apart)
    d_latency = d_reference + d_common - jnp.where(active.any(), d_band / total, 0.0)
    d_share = pull * (d_apart - d_common) + weight * d_band
    return (latency_s, upload_s, share_hz), (d_latency, d_latency - d_start, d_share)


def _max(values: Array, active: Array) -> Array:
    """Largest of the active values; 0 where there is none."""
    return jnp.where(active.any(), jnp.max(values, initial=-jnp.inf, where=active), 0.0)
