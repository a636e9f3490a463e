"""The network between clients and server: one FDMA cell, whose uplink the round and `sim.network` talk to.

Example: four clients share the band alike, send a megabit each, and wait for the last of them.
  >>> import jax
  >>> import jax.numpy as jnp
  >>> from fedjax_lora.core.learning import Work
  >>> from fedjax_lora.core.methods import Context
  >>> from fedjax_lora.wireless import cell
  >>> network = cell.make(cell.WirelessConfig(), Context(num_clients=4, cohort_size=4))
  >>> ids, present, work = jnp.arange(4), jnp.ones(4), Work(samples=jnp.full(4, 80.0))
  >>> state = network.init(jax.random.key(0), ids)
  >>> state = network.step(state, jax.random.key(1), ids)
  >>> radio = network.observe(state, work, jnp.zeros(4), present)
  >>> share_hz = jnp.full(4, radio.band_hz / 4)
  >>> delivery = network.deliver(state, work, jnp.full(4, 1e6), share_hz, radio.start_s, present)
  >>> print(delivery.delivered, f"{delivery.latency_s.max():.2f} s")
  [ True  True  True  True] 0.59 s
"""

import dataclasses
import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from fedjax_lora.core import keys as prng
from fedjax_lora.core.learning import Work
from fedjax_lora.core.methods import Context, Method
from fedjax_lora.core.network import Delivery, Radio, Wireless
from fedjax_lora.core.numbers import Options, traced
from fedjax_lora.core.units import THERMAL_NOISE_W_PER_HZ, db_to_linear, dbm_to_watt
from fedjax_lora.wireless import channel, energy, geometry, latency
from fedjax_lora.wireless.rate import uplink_rate

Csi = Literal["perfect", "mean", "estimated"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class WirelessConfig(Options):
    """The cell, its radio and the clients' processors; every default is our choice.

    bandwidth_hz: uplink band, shared by FDMA; the downlink broadcast has a band of the same width.
    power_dbm: a client's transmit power.
    noise_figure_db: added to -174 dBm/Hz; 0 is an ideal receiver.
    path_loss: `3gpp128` is 128.1 + 37.6 log10(d_km); `umi` and `uma` are TR 38.901, line of sight drawn by client.
    carrier_ghz: of `umi` and `uma`.
    cell_radius_m, min_distance_m: clients are uniform in the area between.
    shadowing_db: standard deviation, one for all, with or without line of sight.
    fading: `rayleigh` is scattered alone, `rician` has a steady part too.
    rician_k_db: steady over scattered power of `rician`.
    fading_correlation: of one round's scattered coefficient with the next; 0 is i.i.d., 1 is frozen.
    cycles_per_sample: processor cycles of one training example; or FLOPs, with FLOP/s as the frequency: the time is the
      same, but the energy, `capacitance * cycles * frequency^2`, is then not meant.
    cpu_hz_min, cpu_hz_max: a client's frequency is uniform between.
    capacitance: joules a cycle over frequency squared.
    downlink: whether the broadcast takes time, at the worst client's rate.
    downlink_power_dbm: the server's transmit power.
    downlink_hz: band of what the server sends to single clients while they train; they share it alike, and its power
      in proportion.
    server_hz: frequency of the server's processor, which the clients of a round share alike; where it is shared and
      how is our choice.
    server_capacitance: joules a cycle of the server over frequency squared; the default is 300 W at the default
      frequency.
    csi: `perfect` plans with the gain of the round; `mean` with path loss and shadowing alone; `estimated` with the
      mean gain given an estimate of the fading. The latter two plan `fade_margin_db` below, and an upload fails where
      the true gain is less than planned.
    fade_margin_db: by how much what is planned with lies below what is known of the gain, where csi is not `perfect`.
    csi_error: share e of the scattered part's variance that the estimate misses: `h = sqrt(1 - e) estimate +
      sqrt(e) CN(0, 1)`; 0 is `perfect` and 1 is `mean`, but for the margin.
    fade_threshold: truncated channel inversion. A client whose power gain |h|^2 of fading, as control knows it and
      before any margin, is below this is let go for the round: it gets no band, nobody waits for it, and it is an
      outage. The mean of |h|^2 is 1; 0 lets nobody go.
    retransmissions: how often an upload that failed is sent again at the same rate, each time under fading of its own
      (same law, independent); time and energy add up.
    """

    name: Literal["cell"] = "cell"
    bandwidth_hz: float = traced(2e7)
    power_dbm: float = traced(10.0)
    noise_figure_db: float = traced(0.0)
    path_loss: channel.PathLoss = "3gpp128"
    carrier_ghz: float = traced(3.5)
    cell_radius_m: float = traced(500.0)
    min_distance_m: float = traced(35.0)
    shadowing_db: float = traced(8.0)
    fading: channel.FadingKind = "rayleigh"
    rician_k_db: float = traced(6.0)
    fading_correlation: float = traced(0.0)
    cycles_per_sample: float = traced(1e7)
    cpu_hz_min: float = traced(1e9)
    cpu_hz_max: float = traced(2e9)
    capacitance: float = traced(1e-28)
    downlink: bool = False
    downlink_power_dbm: float = traced(46.0)
    downlink_hz: float = traced(2e7)
    server_hz: float = traced(1e11)
    server_capacitance: float = traced(3e-31)
    csi: Csi = "perfect"
    csi_error: float = traced(0.1)
    fade_margin_db: float = traced(10.0)
    fade_threshold: float = traced(0.0)
    retransmissions: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        positive = "bandwidth_hz", "min_distance_m", "cycles_per_sample", "cpu_hz_min", "downlink_hz", "server_hz"
        for name in positive:
            self._require(name, 0 < getattr(self, name) < math.inf, "positive and finite")
        for name in ("capacitance", "server_capacitance"):
            self._require(name, 0 <= getattr(self, name) < math.inf, "at least 0 and finite")
        for name in ("noise_figure_db", "shadowing_db", "fade_margin_db"):
            self._require(name, 0 <= getattr(self, name) <= 100, "between 0 and 100")
        for name in ("power_dbm", "rician_k_db", "downlink_power_dbm"):
            self._require(name, -100 <= getattr(self, name) <= 100, "between -100 and 100")
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

    def breaks(self) -> dict[str, str]:
        again = {"single_attempt": "retransmissions"} if self.retransmissions else {}
        return again | ({"free_broadcast": "downlink"} if self.downlink else {})


@struct.dataclass
class CellState:
    """The channels and processors of all clients; leaves are `[K]`.

    mean_gain: linear power gain of path loss and shadowing.
    fading: complex64 small-scale coefficient h, E|h|^2 = 1 (a constant 1 without fading).
    cpu_hz: processor frequency.
    estimate: complex64, the coefficient as it was estimated; None where none is.
    retries: `[K, M]` power gains |h|^2 that M further attempts of the round would meet; None where there are none.
    """

    mean_gain: Array
    fading: Array
    cpu_hz: Array
    estimate: Array | None = None
    retries: Array | None = None


def make(options: WirelessConfig, context: Context) -> Wireless:
    """The FDMA uplink of one cell; all clients send with the same power, on parts of the band that do not overlap."""
    del context  # a cell is of any number of clients
    cell = _Cell(options, channel.fading_law(options.fading, options.rician_k_db))
    power_w = dbm_to_watt(options.power_dbm)
    # Power over noise first, then the noise figure: each quotient and product stays well inside float32's range.
    snr_per_gain_hz = power_w / THERMAL_NOISE_W_PER_HZ * db_to_linear(-options.noise_figure_db)
    downlink_gain = db_to_linear(options.downlink_power_dbm - options.power_dbm)

    def snr_hz(state: CellState) -> Array:
        return snr_per_gain_hz * state.mean_gain * cell.planned_power(state)

    def server_hz(work: Work) -> Array:
        return jnp.asarray(options.server_hz) if work.server_hz is None else work.server_hz

    def server_j(work: Work) -> Array | None:
        if work.server_samples is None:
            return None
        cycles = work.server_samples * options.cycles_per_sample
        return energy.compute_energy_j(cycles, server_hz(work), options.server_capacitance)

    def shared_s(work: Work, known_hz: Array) -> Array | None:
        """`[C]` seconds that server and downlink take for a client alone; for each of n it is n times as long."""
        if work.server_samples is None or work.down_bits is None:
            return None
        server_s = work.server_samples * options.cycles_per_sample / server_hz(work)
        down_bps = uplink_rate(options.downlink_hz, downlink_gain * known_hz)
        return server_s + latency.transfer_time_s(work.down_bits, down_bps)

    def observe(state: CellState, work: Work, downlink_bits: Array, present: Array) -> Radio:
        known_hz = snr_hz(state)
        cycles = work.samples * options.cycles_per_sample
        start_s = latency.compute_time_s(cycles, state.cpu_hz)
        if options.downlink:
            waited_for = (present > 0) & cell.is_kept(state)
            start_s += latency.broadcast_time_s(
                downlink_bits, options.bandwidth_hz, downlink_gain * known_hz, waited_for
            )
        return Radio(
            snr_hz=known_hz,
            start_s=jnp.where(present > 0, start_s, 0.0),
            band_hz=jnp.asarray(options.bandwidth_hz, jnp.float32),
            power_w=jnp.asarray(power_w, jnp.float32),
            shared_s=shared_s(work, known_hz),
            compute_j=energy.compute_energy_j(cycles, state.cpu_hz, options.capacitance),
            server_j=server_j(work),
        )

    def deliver(state: CellState, work: Work, bits: Array, share_hz: Array, start_s: Array, present: Array) -> Delivery:
        attempt_s = latency.transfer_time_s(bits, uplink_rate(share_hz, snr_hz(state)))
        failed = jnp.cumprod(~(cell.carried(state) | (bits == 0)[:, None]), 1)  # `[C, 1 + retransmissions]`
        upload_s = attempt_s * (1 + jnp.sum(failed[:, :-1], 1))
        end_s = start_s + upload_s
        cycles = work.samples * options.cycles_per_sample
        compute_j = energy.compute_energy_j(cycles, state.cpu_hz, options.capacitance)
        energy_j = compute_j + energy.transmit_energy_j(power_w, upload_s)
        here = present > 0
        return Delivery(
            latency_s=jnp.where(here, end_s, 0.0),
            energy_j=jnp.where(here, energy_j, 0.0),
            delivered=here & (failed[:, -1] == 0) & jnp.isfinite(end_s),
        )

    forgets = jnp.asarray(options.fading_correlation) == 0
    return Wireless(cell.init, cell.step, observe, deliver, forgets)


METHOD = Method("wireless", "cell", WirelessConfig, make)


class _Cell(NamedTuple):
    """Where the clients are, how their channels fade, and what control knows of it."""

    options: WirelessConfig
    law: channel.FadingLaw

    def init(self, key: Array, client_ids: Array) -> CellState:
        return jax.vmap(self._init_client)(prng.client_keys(key, client_ids))

    def _init_client(self, key: Array) -> CellState:
        options = self.options
        position_key, gain_key, fading_key, cpu_key = jax.random.split(key, 4)
        position_m = geometry.annulus_position(position_key, options.min_distance_m, options.cell_radius_m)
        distance_m = jnp.linalg.norm(position_m)
        state = CellState(
            mean_gain=channel.draw_mean_gain(
                gain_key, options.path_loss, distance_m, options.carrier_ghz, options.shadowing_db
            ),
            fading=channel.draw_fading(fading_key, self.law),
            cpu_hz=jax.random.uniform(cpu_key, minval=options.cpu_hz_min, maxval=options.cpu_hz_max),
        )
        return self._draw_rest(fading_key, state)

    def step(self, state: CellState, key: Array, client_ids: Array) -> CellState:
        return jax.vmap(self._step_client)(prng.client_keys(key, client_ids), state)

    def _step_client(self, key: Array, state: CellState) -> CellState:
        fading = channel.step_fading(key, state.fading, self.law, self.options.fading_correlation)
        return self._draw_rest(key, dataclasses.replace(state, fading=fading))

    def _draw_rest(self, key: Array, state: CellState) -> CellState:
        """One client's state with what else is drawn of its fading; folded keys leave the fading itself as it is."""
        options, law = self.options, self.law
        if options.csi == "estimated":
            estimate = channel.estimate(jax.random.fold_in(key, 1), state.fading, law, options.csi_error)
            state = dataclasses.replace(state, estimate=estimate)
        if options.retransmissions:
            keys = jax.random.split(jax.random.fold_in(key, 2), options.retransmissions)
            fades = jax.vmap(lambda key: channel.draw_fading(key, law))(keys)
            state = dataclasses.replace(state, retries=channel.power(fades))
        return state

    def known_power(self, state: CellState) -> Array:
        """`[C]` power gain of the fading, as control knows it."""
        if self.options.csi == "perfect":
            return channel.power(state.fading)
        if self.options.csi == "mean":
            return jnp.ones_like(state.mean_gain)
        assert state.estimate is not None  # `_draw_rest` makes it
        return channel.expected_power(state.estimate, self.law, self.options.csi_error)

    def is_kept(self, state: CellState) -> Array:
        """`[C]` bool: who is not let go for the depth of its fade."""
        return self.known_power(state) >= self.options.fade_threshold

    def planned_power(self, state: CellState) -> Array:
        """`[C]` power gain of the fading that control counts on; 0 for who is let go."""
        margin = 1.0 if self.options.csi == "perfect" else db_to_linear(-self.options.fade_margin_db)
        return jnp.where(self.is_kept(state), margin * self.known_power(state), 0.0)

    def carried(self, state: CellState) -> Array:
        """`[C, 1 + retransmissions]`: whether the channel of each attempt carries the planned rate.

        The rate rises with the gain: what was planned arrives just where the true gain is no worse.
        """
        planned, power = self.planned_power(state), channel.power(state.fading)
        # With perfect knowledge the two are one number, which a program may round in two ways where it is fused.
        first = jnp.ones_like(planned, bool) if self.options.csi == "perfect" else power >= planned
        if state.retries is None:
            return first[:, None]
        return jnp.concatenate([first[:, None], state.retries >= planned[:, None]], 1)
