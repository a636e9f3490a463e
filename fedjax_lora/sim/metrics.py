"""What is observed of a round: its metrics, from what its steps hand on."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from fedjax_lora.core.methods import Aggregate
from fedjax_lora.core.types import FedState, Metrics
from fedjax_lora.sim.parts import Cohort, Local, Uplink


def observe(
    after: FedState, cohort: Cohort, local: Local, tail_energy: Array, uplink: Uplink, aggregate: Aggregate
) -> Metrics:
    """The metrics of the round; evaluation, which is not of every round, adds its own."""
    sent, delivery, arrived, trained = uplink.sent, uplink.delivery, uplink.arrived, local.trained
    over_arrived, not_measured = mean_over(arrived), jnp.float32(jnp.nan)
    return Metrics(
        round=after.round,
        train_loss=over_arrived(trained.loss),
        eval_loss=not_measured,
        eval_accuracy=not_measured,
        personal_accuracy=not_measured,
        latency_s=uplink.latency_s,
        elapsed_s=after.elapsed_s,
        client_uplink_bits=jnp.where(jnp.isfinite(delivery.latency_s), sent.bits, 0),
        client_downlink_bits=jnp.where(cohort.present, cohort.downlink_bits, 0),
        energy_j=jnp.sum(delivery.energy_j),
        queue_s=after.queue_s,
        energy_queue_j=after.energy_queue_j,
        keep_ratio_mean=over_arrived(uplink.decision.keep_ratio),
        kept_ranks_mean=over_arrived(sent.kept_ranks),
        participants=jnp.sum(arrived),
        outages=jnp.sum(local.active & ~delivery.delivered),
        nonfinite_clients=jnp.sum(cohort.present & ~local.finite),
        sparsification_error=aggregate.sparsification_error,
        covariance_error=aggregate.covariance_error,
        dropped_energy=over_arrived(sent.dropped_energy),
        tail_energy=jax.vmap(over_arrived, in_axes=1)(tail_energy),
        orthogonality=over_arrived(trained.orthogonality),
    )


def mean_over(included: Array) -> Callable[[Array], Array]:
    """A mean over the included clients; NaN ("not measured") where there are none."""
    number = jnp.sum(included)

    def mean(value: Array) -> Array:
        total = jnp.sum(jnp.where(included, value, 0.0))
        return jnp.where(number > 0, total / jnp.maximum(number, 1), jnp.nan)

    return mean
