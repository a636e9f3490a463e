"""How the server averages: one file a method, each with a config and `make(config) -> strategies.Aggregator`."""

from fedjax_lora.aggregation import fedex as fedex
from fedjax_lora.aggregation import fedit as fedit
from fedjax_lora.aggregation import fedsa as fedsa
from fedjax_lora.aggregation import ffa as ffa
from fedjax_lora.aggregation import flexlora as flexlora
from fedjax_lora.aggregation import flora as flora
from fedjax_lora.aggregation import hetlora as hetlora
from fedjax_lora.aggregation import lora_fair as lora_fair
from fedjax_lora.aggregation import rolora as rolora
