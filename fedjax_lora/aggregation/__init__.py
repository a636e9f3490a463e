"""How the server averages: one file a method, each with a config and `make(config) -> base.Aggregator`."""

from fedjax_lora.aggregation import fedit as fedit
