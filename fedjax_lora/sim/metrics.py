"""What is observed of a round: its metrics, from what its steps hand on."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax import Array

from fedjax_lora.core import count
from fedjax_lora.core.count import Count
from fedjax_lora.core.exchange import Aggregate
from fedjax_lora.core.types import FedState, Metrics
from fedjax_lora.sim.parts import Cohort, Local, Offers, Uplink

_OWN = ("queue_s", "energy_queue_j")
"""What of a controller's report is a metric of its own."""


def observe(
    after: FedState,
    cohort: Cohort,
    local: Local,
    offers: Offers,
    uplink: Uplink,
    aggregate: Aggregate,
    report: Mapping[str, Array],
    everyone: Array,
) -> Metrics:
    """The metrics of the round; evaluation, which is not of every round, adds its own.

    report: of the controller, see `Controller.update`. everyone: the weight of all clients together.
    """
    upload, delivery, arrived, trained = uplink.upload, uplink.delivery, uplink.arrived, local.trained
    heard = cohort.radio.snr_hz > 0
    up, down = (cohort.exchange.up, cohort.exchange.down) if cohort.exchange else (Count.of(0), Count.of(0))
    over_arrived, not_measured, nothing = mean_over(arrived), jnp.float32(jnp.nan), Count.of(0)
    queue_s, energy_queue_j = (jnp.asarray(report.get(name, 0.0), jnp.float32) for name in _OWN)
    return Metrics(
        round=after.round,
        train_loss=over_arrived(trained.loss),
        eval_loss=not_measured,
        eval_accuracy=not_measured,
        personal_accuracy=not_measured,
        latency_s=uplink.latency_s,
        elapsed_s=after.elapsed_s,
        uplink=count.where(cohort.present & jnp.isfinite(delivery.latency_s), upload.bits + up, nothing),
        downlink=count.where(cohort.present, cohort.downlink + count.where(heard, down, nothing), nothing),
        energy_j=jnp.sum(delivery.energy_j),
        queue_s=queue_s,
        energy_queue_j=energy_queue_j,
        keep_ratio_mean=over_arrived(uplink.decision.kept / cohort.clients.rank),
        kept_ranks_mean=over_arrived(upload.kept_ranks),
        participants=jnp.sum(arrived),
        absent_weight=(everyone - jnp.sum(local.weight * arrived)) / everyone,
        outages=jnp.sum(local.active & ~delivery.delivered),
        nonfinite_clients=jnp.sum(cohort.present & ~local.finite),
        sparsification_error=aggregate.sparsification_error,
        covariance_error=aggregate.covariance_error,
        dropped_energy=over_arrived(upload.dropped_energy),
        tail_energy=jax.vmap(over_arrived, in_axes=1)(offers.tail_energy),
        orthogonality=over_arrived(trained.orthogonality),
        methods={f"control/{name}": value for name, value in report.items() if name not in _OWN}
        | _of_server(cohort)
        | _of_arrivals(cohort, over_arrived),
    )


def _of_arrivals(cohort: Cohort, over_arrived: Callable[[Array], Array]) -> dict[str, Array]:
    """Where clients begin at times of their own: the mean number of steps since the participants did."""
    if cohort.arrivals is None:
        return {}
    return {"arrival/staleness": over_arrived((cohort.round - cohort.arrivals.version).astype(jnp.float32))}


def _of_server(cohort: Cohort) -> dict[str, Array]:
    """Of split training: the server's energy for who can be heard, J, and the mean share of the FLOP at the devices."""
    if cohort.exchange is None or cohort.radio.server_j is None:
        return {}
    heard = cohort.present & (cohort.radio.snr_hz > 0)
    energy_j = jnp.sum(jnp.where(heard, cohort.radio.server_j, 0.0))
    share = mean_over(heard)(jnp.broadcast_to(cohort.exchange.device_share, heard.shape))
    return {"training/server_energy_j": energy_j, "training/device_share": share}


def mean_over(included: Array) -> Callable[[Array], Array]:
    """A mean over the included clients; NaN ("not measured") where there are none."""
    number = jnp.sum(included)

    def mean(value: Array) -> Array:
        total = jnp.sum(jnp.where(included, value, 0.0))
        return jnp.where(number > 0, total / jnp.maximum(number, 1), jnp.nan)

    return mean
