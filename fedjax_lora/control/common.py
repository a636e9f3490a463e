"""What the controllers that choose the keep ratio share: payloads of whole ranks, shares, and the queue's law."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from fedjax_lora.core.methods import Observation
from fedjax_lora.wireless.allocation import Allocation, min_max_latency


def payloads(observation: Observation) -> Array:
    """`[C, R + 1]` bits at 0 ... R whole ranks; beyond a client's own rank it stays, and 0 ranks cost what 1 does."""
    kept = jnp.clip(jnp.arange(observation.tail_energy.shape[-1])[:, None], 1.0, observation.rank)
    return jax.vmap(observation.payload_bits)(kept / observation.rank).T


def rank_limits(min_keep_ratio: float, max_keep_ratio: float, rank: Array) -> tuple[Array, Array]:
    """`[C]` fewest whole ranks that keep the least ratio, at least 1, and most within the largest, at least these."""
    least = jnp.clip(jnp.ceil(min_keep_ratio * rank - 1e-4), 1.0, rank)
    return least, jnp.clip(jnp.floor(max_keep_ratio * rank + 1e-4), least, rank)


def at_rank(table: Array, kept: Array) -> Array:
    """`[C]` entries of `[C, R + 1]` at whole ranks `[C]`."""
    return jnp.take_along_axis(table, kept.astype(jnp.int32)[:, None], axis=1)[:, 0]


def relative_tail(tail_energy: Array, weights: Array) -> Array:
    """`[C, R + 1]` tail energies over the weighted mean of the whole, all zeros where there is none.

    Weights `[C]` sum to 1.
    """
    # Scaled first: energies of a late round may be subnormal, or their sums too large.
    largest = jnp.max(jnp.where(weights[:, None] > 0, tail_energy, 0.0), initial=0.0)
    scaled = tail_energy / jnp.where(largest > 0, largest, 1.0)
    mean = jnp.sum(weights * jnp.where(weights > 0, scaled[:, 0], 0.0))
    return scaled / jnp.where(mean > 0, mean, 1.0)


def linear_tail(rank: Array, max_rank: int) -> Array:
    """`[..., R + 1]` share of `rank` `[...]` left out when 0 ... R ranks are kept."""
    return jnp.maximum(1.0 - jnp.arange(max_rank + 1) / rank[..., None], 0.0)


def able(observation: Observation) -> Array:
    """`[C]` who takes part and can be heard at all."""
    return (observation.weights > 0) & (observation.snr_hz > 0) & (observation.start_s < jnp.inf)


def allocate(observation: Observation, bits: Array) -> Allocation:
    """Shares of least latency for those who take part and can be heard; the others are left out."""
    heard = able(observation)
    snr_hz, start_s = observation.snr_hz, observation.start_s
    return min_max_latency(
        jnp.where(heard & (bits < 1e15 * snr_hz), bits, 0.0), snr_hz, start_s, observation.bandwidth_hz
    )


def queue_law(budget: Array | float) -> Callable[[Array, Array], Array]:
    """`Q <- max(Q + spent - budget, 0)`: the mean spent exceeds the budget by at most `(Q_T - Q_0) / T`.

    Of latency or of energy, each in its unit.
    """

    def update_queue(queue: Array, spent: Array) -> Array:
        return jnp.maximum(queue + spent - budget, 0.0)

    return update_queue
