"""How the server averages: one file a method, each with a config and `make(config) -> base.Aggregator`."""

from fedjax_lora.aggregation import fedit as fedit
from fedjax_lora.aggregation import fedsa as fedsa
from fedjax_lora.aggregation import ffa as ffa
from fedjax_lora.aggregation import hetlora as hetlora
from fedjax_lora.aggregation import rolora as rolora
