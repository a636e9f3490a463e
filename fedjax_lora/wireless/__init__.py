"""The radio world: geometry, channel, rates, min-max latency, and the link that the round talks to."""

from fedjax_lora.wireless.allocation import Allocation, min_max_latency
from fedjax_lora.wireless.cell import WirelessConfig, make_link, perfect_link
from fedjax_lora.wireless.rate import rayleigh_outage, required_bandwidth, uplink_rate

__all__ = [
    "Allocation",
    "WirelessConfig",
    "make_link",
    "min_max_latency",
    "perfect_link",
    "rayleigh_outage",
    "required_bandwidth",
    "uplink_rate",
]
