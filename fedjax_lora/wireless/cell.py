"""The network between clients and server, as the round sees it: a record of functions over a `LinkState`."""

import dataclasses
import math
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import Array

from fedjax_lora.core import keys as prng
from fedjax_lora.core.methods import Decision, Delivery, Link
from fedjax_lora.core.types import LinkState
from fedjax_lora.core.units import THERMAL_NOISE_W_PER_HZ, db_to_linear, dbm_to_watt
from fedjax_lora.wireless import channel, energy, geometry, latency
from fedjax_lora.wireless.rate import uplink_rate

Csi = Literal["perfect", "mean", "estimated"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class WirelessConfig:
    """The cell, its radio and the clients' processors; every default is our choice.

    bandwidth_hz: uplink band, shared by FDMA; the downlink broadcast has a band of the same width.
    power_dbm: a client's transmit power.
    noise_figure_db: added to -174 dBm/Hz; 0 is an ideal receiver.
    path_loss: `3gpp128` is 128.1 + 37.6 log10(d_km); `umi` and `uma` are TR 38.901, line of sight drawn by client.
    carrier_ghz: of `umi` and `uma`.
    cell_radius_m, min_distance_m: clients are uniform in the area between.
    shadowing_db: standard deviation, one for all, with or without line of sight.
    fading: `rician` has `rician_k_db` of steady over scattered power.
    fading_correlation: of one round's scattered coefficient with the next; 0 is i.i.d., 1 is frozen.
    cycles_per_sample: processor cycles of one training example; or FLOPs, with FLOP/s as the frequency: the time is the
      same, but the energy, `capacitance * cycles * frequency^2`, is then not meant.
    cpu_hz_min, cpu_hz_max: a client's frequency is uniform between.
    capacitance: joules a cycle over frequency squared.
    downlink: whether the broadcast takes time, at `downlink_power_dbm` and the worst client's rate.
    csi: `perfect` plans with the gain of the round; `mean` with path loss and shadowing alone; `estimated` with the
      mean gain given an estimate of the fading. The latter two plan `fade_margin_db` below, and an upload fails where
      the true gain is less than planned.
    csi_error: share e of the scattered part's variance that the estimate misses: `h = sqrt(1 - e) estimate +
      sqrt(e) CN(0, 1)`; 0 is `perfect` and 1 is `mean`, but for the margin.
    fade_threshold: truncated channel inversion. A client whose power gain |h|^2 of fading, as control knows it and
      before any margin, is below this is let go for the round: it gets no band, nobody waits for it, and it is an
      outage. The mean of |h|^2 is 1; 0 lets nobody go.
    retransmissions: how often an upload that failed is sent again at the same rate, each time under fading of its own
      (same law, independent); time and energy add up.
    """

    bandwidth_hz: float = 2e7
    power_dbm: float = 10.0
    noise_figure_db: float = 0.0
    path_loss: channel.PathLoss = "3gpp128"
    carrier_ghz: float = 3.5
    cell_radius_m: float = 500.0
    min_distance_m: float = 35.0
    shadowing_db: float = 8.0
    fading: channel.FadingKind = "rayleigh"
    rician_k_db: float = 6.0
    fading_correlation: float = 0.0
    cycles_per_sample: float = 1e7
    cpu_hz_min: float = 1e9
    cpu_hz_max: float = 2e9
    capacitance: float = 1e-28
    downlink: bool = False
    downlink_power_dbm: float = 46.0
    csi: Csi = "perfect"
    csi_error: float = 0.1
    fade_margin_db: float = 10.0
    fade_threshold: float = 0.0
    retransmissions: int = 0

    def __post_init__(self):
        for name in ("bandwidth_hz", "min_distance_m", "cycles_per_sample", "cpu_hz_min"):
            self._require(name, 0 < getattr(self, name) < math.inf, "positive and finite")
        self._require("capacitance", 0 <= self.capacitance < math.inf, "at least 0 and finite")
        for name in ("noise_figure_db", "shadowing_db", "fade_margin_db"):
            self._require(name, 0 <= getattr(self, name) <= 100, "between 0 and 100")
        for name in ("power_dbm", "rician_k_db", "downlink_power_dbm"):
            self._require(name, -100 <= getattr(self, name) <= 100, "between -100 and 100")
        for name, kinds in (("path_loss", channel.PathLoss), ("fading", channel.FadingKind), ("csi", Csi)):
            self._require(name, getattr(self, name) in get_args(kinds), f"one of {', '.join(get_args(kinds))}")
        self._require("carrier_ghz", 0.5 <= self.carrier_ghz <= 100, "between 0.5 and 100")
        for name in ("fading_correlation", "csi_error"):
            self._require(name, 0 <= getattr(self, name) <= 1, "between 0 and 1")
        self._require("fade_threshold", 0 <= self.fade_threshold < 1, "at least 0 and below 1")
        self._require("retransmissions", 0 <= self.retransmissions <= 100, "between 0 and 100")
        for name, least in (("cell_radius_m", "min_distance_m"), ("cpu_hz_max", "cpu_hz_min")):
            bound = getattr(self, least)
            allowed = f"at least {least} = {bound} and finite"
            self._require(name, bound <= getattr(self, name) < math.inf, allowed)

    def _require(self, name: str, holds: bool, allowed: str) -> None:
        if not holds:
            raise ValueError(f"{name} must be {allowed}, got {getattr(self, name)!r}")


def make_link(config: WirelessConfig) -> Link:
    """An FDMA uplink."""
    cell = _Cell(config, channel.fading_law(config.fading, config.rician_k_db))
    power_w = dbm_to_watt(config.power_dbm)
    # Ratios are taken in Python's double precision: noise density over power is far below float32's range of ease.
    snr_per_gain_hz = power_w / (THERMAL_NOISE_W_PER_HZ * db_to_linear(config.noise_figure_db))
    downlink_gain = db_to_linear(config.downlink_power_dbm - config.power_dbm)

    def snr_hz(state: LinkState) -> Array:
        return snr_per_gain_hz * state.mean_gain * cell.planned_power(state)

    def start_s(state: LinkState, samples: Array, downlink_bits: Array, present: Array) -> Array:
        ready_s = latency.compute_time_s(samples * config.cycles_per_sample, state.cpu_hz)
        if config.downlink:
            server_snr_hz = downlink_gain * snr_hz(state)
            waited_for = (present > 0) & cell.is_kept(state)
            ready_s += latency.broadcast_time_s(downlink_bits, config.bandwidth_hz, server_snr_hz, waited_for)
        return jnp.where(present > 0, ready_s, 0.0)

    def deliver(
        state: LinkState, samples: Array, bits: Array, decision: Decision, start_s: Array, present: Array
    ) -> Delivery:
        attempt_s = latency.transfer_time_s(bits, uplink_rate(decision.bandwidth_hz, snr_hz(state)))
        failed = jnp.cumprod(~(cell.carried(state) | (bits == 0)[:, None]), 1)  # `[C, 1 + retransmissions]`
        upload_s = attempt_s * (1 + jnp.sum(failed[:, :-1], 1))
        end_s = start_s + upload_s
        cycles = samples * config.cycles_per_sample
        compute_j = energy.compute_energy_j(cycles, state.cpu_hz, config.capacitance)
        energy_j = compute_j + energy.transmit_energy_j(power_w, upload_s)
        here = present > 0
        return Delivery(
            latency_s=jnp.where(here, end_s, 0.0),
            energy_j=jnp.where(here, energy_j, 0.0),
            delivered=here & (failed[:, -1] == 0) & jnp.isfinite(end_s),
        )

    return Link(cell.init, cell.step, snr_hz, start_s, deliver, config.bandwidth_hz, power_w)


class _Cell(NamedTuple):
    """Where the clients are, how their channels fade, and what control knows of it."""

    config: WirelessConfig
    law: channel.FadingLaw

    def init(self, key: Array, client_ids: Array) -> LinkState:
        return jax.vmap(self._init_client)(prng.client_keys(key, client_ids))

    def _init_client(self, key: Array) -> LinkState:
        config = self.config
        position_key, gain_key, fading_key, cpu_key = jax.random.split(key, 4)
        position_m = geometry.annulus_position(position_key, config.min_distance_m, config.cell_radius_m)
        distance_m = jnp.linalg.norm(position_m)
        state = LinkState(
            mean_gain=channel.draw_mean_gain(
                gain_key, config.path_loss, distance_m, config.carrier_ghz, config.shadowing_db
            ),
            fading=channel.draw_fading(fading_key, self.law),
            cpu_hz=jax.random.uniform(cpu_key, minval=config.cpu_hz_min, maxval=config.cpu_hz_max),
        )
        return self._observe(fading_key, state)

    def step(self, state: LinkState, key: Array, client_ids: Array) -> LinkState:
        return jax.vmap(self._step_client)(prng.client_keys(key, client_ids), state)

    def _step_client(self, key: Array, state: LinkState) -> LinkState:
        fading = channel.step_fading(key, state.fading, self.law, self.config.fading_correlation)
        return self._observe(key, dataclasses.replace(state, fading=fading))

    def _observe(self, key: Array, state: LinkState) -> LinkState:
        """One client's state with what else is drawn of its fading; folded keys leave the fading itself as it is."""
        config, law = self.config, self.law
        if config.csi == "estimated":
            estimate = channel.estimate(jax.random.fold_in(key, 1), state.fading, law, config.csi_error)
            state = dataclasses.replace(state, estimate=estimate)
        if config.retransmissions:
            keys = jax.random.split(jax.random.fold_in(key, 2), config.retransmissions)
            fades = jax.vmap(lambda key: channel.draw_fading(key, law))(keys)
            state = dataclasses.replace(state, retries=channel.power(fades))
        return state

    def known_power(self, state: LinkState) -> Array:
        """`[C]` power gain of the fading, as control knows it."""
        if self.config.csi == "perfect":
            return channel.power(state.fading)
        if self.config.csi == "mean":
            return jnp.ones_like(state.mean_gain)
        assert state.estimate is not None  # `_observe` makes it
        return channel.expected_power(state.estimate, self.law, self.config.csi_error)

    def is_kept(self, state: LinkState) -> Array:
        """`[C]` bool: who is not let go for the depth of its fade."""
        return self.known_power(state) >= self.config.fade_threshold

    def planned_power(self, state: LinkState) -> Array:
        """`[C]` power gain of the fading that control counts on; 0 for who is let go."""
        margin = 1.0 if self.config.csi == "perfect" else db_to_linear(-self.config.fade_margin_db)
        return jnp.where(self.is_kept(state), margin * self.known_power(state), 0.0)

    def carried(self, state: LinkState) -> Array:
        """`[C, 1 + retransmissions]`: whether the channel of each attempt carries the planned rate.

        The rate rises with the gain: what was planned arrives just where the true gain is no worse.
        """
        power = channel.power(state.fading)[:, None]
        power = power if state.retries is None else jnp.concatenate([power, state.retries], 1)
        return power >= self.planned_power(state)[:, None]


def perfect_link(config: WirelessConfig) -> Link:
    """No network: transfers take no time and no energy and never fail; computing costs as in `make_link`.

    The channel is drawn all the same, so that turning the network off changes nothing else.
    """
    link = make_link(dataclasses.replace(config, downlink=False))

    def deliver(
        state: LinkState, samples: Array, bits: Array, decision: Decision, start_s: Array, present: Array
    ) -> Delivery:
        return link.deliver(state, samples, jnp.zeros_like(bits), decision, start_s, present)

    return link._replace(deliver=deliver)
