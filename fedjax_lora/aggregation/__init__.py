"""How the server averages: a file for each method, with its options, `make(options, context)` and METHOD."""

from fedjax_lora.aggregation import fedex as fedex
from fedjax_lora.aggregation import fedit as fedit
from fedjax_lora.aggregation import fedsa as fedsa
from fedjax_lora.aggregation import ffa as ffa
from fedjax_lora.aggregation import flexlora as flexlora
from fedjax_lora.aggregation import flora as flora
from fedjax_lora.aggregation import hetlora as hetlora
from fedjax_lora.aggregation import lora_fair as lora_fair
from fedjax_lora.aggregation import rolora as rolora
