"""A network whose power gains were recorded: a table `[rounds, K]` from a file, one row for each round.

    fedjax-lora run CONFIG --methods examples/methods/recorded_gains.py --set wireless='{name: recorded, gains: g.csv}'

The file is NumPy's `.npy`, or `.csv` without a header, and holds linear power gains (not dB). After its last row the
table starts again.
"""

import dataclasses
import math
from typing import Literal

import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from fedjax_lora.core.units import THERMAL_NOISE_W_PER_HZ, dbm_to_watt
from fedjax_lora.methods import Context, Delivery, Method, Options, Radio, Wireless, Work, traced
from fedjax_lora.wireless.energy import transmit_energy_j
from fedjax_lora.wireless.latency import transfer_time_s
from fedjax_lora.wireless.rate import uplink_rate


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecordedConfig(Options):
    """One FDMA uplink over recorded gains.

    gains: file of the table `[rounds, K]`; structure, so that another file is another program.
    bandwidth_hz: of the uplink, shared by all.
    power_dbm: a client's transmit power.
    sample_s: what a client takes for one training example, seconds.
    compute_w: what its processor takes meanwhile, watts.
    """

    name: Literal["recorded"] = "recorded"
    gains: str
    bandwidth_hz: float = traced(2e7)
    power_dbm: float = traced(10.0)
    sample_s: float = traced(0.01)
    compute_w: float = traced(1.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        read(self.gains)  # so that a file that is wrong is an error of the configuration
        for name in ("bandwidth_hz", "sample_s"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)!r}")
        if not 0 <= self.compute_w < math.inf:
            raise ValueError(f"compute_w must be at least 0 and finite, got {self.compute_w!r}")
        if not -100 <= self.power_dbm <= 100:
            raise ValueError(f"power_dbm must be between -100 and 100, got {self.power_dbm!r}")


def read(path: str) -> np.ndarray:
    """The table of a file, `[rounds, K]` float32.

    Raises:
      ValueError: there is no such file, or it holds no such table; one line.
    """
    try:
        table = np.load(path) if path.endswith(".npy") else np.loadtxt(path, delimiter=",", ndmin=2)
        table = np.asarray(table, np.float32)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"gains must be a .npy or .csv file of numbers, got {path!r} ({reason})") from error
    if table.ndim != 2 or not table.size or not (np.isfinite(table) & (table >= 0)).all():
        allowed = "a table [rounds, K] of finite gains, none below 0"
        raise ValueError(f"gains must be {allowed}, got {path!r} of shape {list(table.shape)}")
    return table


@struct.dataclass
class RecordedState:
    """Where each client is in the table; leaves are `[K]`.

    round: int32, rows that were used.
    gain: linear power gain of the round.
    """

    round: Array
    gain: Array


def make(options: RecordedConfig, context: Context) -> Wireless:
    """The environment: a client's gain is that of its own column.

    Raises:
      ValueError: the table is not of so many clients.
    """
    gains = read(options.gains)
    if gains.shape[1] != context.num_clients:
        raise ValueError(
            f"wireless.gains must have a column for each of {context.num_clients} clients, got {gains.shape[1]}"
        )
    table = jnp.asarray(gains)
    power_w = dbm_to_watt(options.power_dbm)
    snr_per_gain_hz = power_w / THERMAL_NOISE_W_PER_HZ

    def init(key: Array, client_ids: Array) -> RecordedState:
        return RecordedState(round=jnp.zeros(client_ids.shape, jnp.int32), gain=table[0, client_ids])

    def step(state: RecordedState, key: Array, client_ids: Array) -> RecordedState:
        return RecordedState(round=state.round + 1, gain=table[state.round % table.shape[0], client_ids])

    def observe(state: RecordedState, work: Work, downlink_bits: Array, present: Array) -> Radio:
        return Radio(
            snr_hz=snr_per_gain_hz * state.gain,
            start_s=jnp.where(present, options.sample_s * work.samples, 0.0),
            band_hz=jnp.asarray(options.bandwidth_hz, jnp.float32),
            power_w=jnp.asarray(power_w, jnp.float32),
        )

    def deliver(
        state: RecordedState, work: Work, bits: Array, share_hz: Array, start_s: Array, present: Array
    ) -> Delivery:
        upload_s = transfer_time_s(bits, uplink_rate(share_hz, snr_per_gain_hz * state.gain))
        energy_j = options.compute_w * options.sample_s * work.samples + transmit_energy_j(power_w, upload_s)
        return Delivery(
            latency_s=jnp.where(present, start_s + upload_s, 0.0),
            energy_j=jnp.where(present, energy_j, 0.0),
            delivered=present & jnp.isfinite(upload_s),
        )

    return Wireless(init, step, observe, deliver)


METHOD = Method("wireless", "recorded", RecordedConfig, make)
