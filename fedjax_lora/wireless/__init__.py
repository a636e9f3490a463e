"""The radio world: geometry, channel, rates, min-max latency, and the cell that the round talks to."""

from fedjax_lora.wireless.allocation import Allocation, min_max_latency
from fedjax_lora.wireless.cell import WirelessConfig
from fedjax_lora.wireless.rate import rayleigh_outage, required_bandwidth, uplink_rate

__all__ = [
    "Allocation",
    "WirelessConfig",
    "min_max_latency",
    "rayleigh_outage",
    "required_bandwidth",
    "uplink_rate",
]
