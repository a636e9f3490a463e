"""Choice of the modules that carry an adapter, by name and as PEFT chooses them."""

import pytest
import transformers

from fedjax_lora.adapters import targets
from fedjax_lora.core.learning import Site
from fedjax_lora.models import table
from fedjax_lora.models.families import FAMILIES
from oracles import tiny_models

AVAILABLE = {
    "query": Site("qv", 0, 12, 12, "encoder.{layer}.self.query"),
    "value": Site("qv", 12, 12, 12, "encoder.{layer}.self.value"),
    "up": Site("up", 0, 12, 20),
}


def test_choose_keeps_the_named_entries_in_order():
    assert list(targets.choose(("up", "query"), AVAILABLE, 2).items()) == [
        (name, AVAILABLE[name]) for name in ("up", "query")
    ]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gpt2", ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"]),
        ("llama", ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]),
        ("distilbert", ["query", "value", "output", "up", "down"]),
    ],
)
def test_common_names_are_valid_for_every_family(name, expected):
    """By hand: what each of them is in the model's own words."""
    family = FAMILIES[name]
    sites = table.sites(family.weights(family.shape({})))
    assert list(targets.choose(("query", "value", "output", "up", "down"), sites, 2)) == expected


def test_choose_names_the_nearest_and_the_valid_ones():
    message = r"lora.targets must be among query, value, up, got 'values' \(did you mean 'value'\?\)"
    with pytest.raises(ValueError, match=message):
        targets.choose(("query", "values"), AVAILABLE, 2)


@pytest.mark.parametrize(
    "name", ["", "uery", "self", "encoder", "self.quer", r".*\.quer", "*", "(", "encoder.0.self.query.weight"]
)
def test_what_is_no_end_of_a_path_and_matches_none_is_refused(name):
    with pytest.raises(ValueError, match=r"lora.targets must be among query, value, up, got "):
        targets.choose((name,), AVAILABLE, 2)


def test_a_site_is_chosen_once_and_one_without_a_path_by_its_name_alone():
    """By hand."""
    assert list(targets.choose(("self.value", ".*", "query"), AVAILABLE, 2)) == ["value", "query"]
    assert list(targets.choose(("All-Linear",), AVAILABLE, 2)) == ["query", "value", "up"]


@pytest.mark.parametrize("name", ["encoder.1.self.query", "1.self.query", r"encoder\.1\..*query"])
def test_some_layers_alone_are_refused(name):
    message = r"lora.targets must name a module of all layers, got .*, which matches 'query' in 1 of 2$"
    with pytest.raises(ValueError, match=message):
        targets.choose((name,), AVAILABLE, 2)


NAMES = {
    "bert": [
        ["query", "dense"],
        ["attention.output.dense"],
        ["output.dense", "self.key"],
        r".*\.(key|intermediate\.dense)",
    ],
    "roberta": [
        ["value", "intermediate.dense"],
        ["dense"],
        r"encoder\.layer\.\d+\.attention\.(self\.key|output\.dense)",
    ],
    "distilbert": [["q_lin", "v_lin"], ["attention.k_lin", "lin2"], r"transformer.*(out_lin|ffn\.lin1)"],
    "gpt2": [["c_attn"], ["c_proj", "c_fc"], ["attn.c_proj"], r"h\.\d+\.mlp\.c_.*"],
    "vit": [["q_proj", "v_proj"], ["attention.o_proj", "fc2"], ["mlp.fc1"], r".*\.(k|o)_proj"],
    "deit": [["k_proj"], r"layers\.\d\.mlp\.fc\d"],
}
"""Family -> names, or a regular expression, as PEFT has them."""


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # raised inside PEFT
@pytest.mark.parametrize(
    ("family", "chosen"), [(name, chosen) for name, of in NAMES.items() for chosen in [*of, "all-linear"]]
)
def test_modules_are_those_that_peft_adapts(family, chosen):
    """Oracle: where PEFT has put its layers."""
    pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    config = tiny_models.CONFIGS[family]
    more = {} if family in ("distilbert", "gpt2") else {"add_pooling_layer": False}
    plain = transformers.AutoModel.from_config(config, **more)
    adapted = peft.get_peft_model(plain, peft.LoraConfig(target_modules=chosen, fan_in_fan_out=family == "gpt2"))
    suffix = ".lora_A.default"
    expected = {name.removesuffix(suffix) for name, _ in adapted.base_model.model.named_modules() if suffix in name}

    of_model = table.sites(FAMILIES[family].weights(FAMILIES[family].shape(config.to_dict())))
    ours = targets.choose([chosen] if isinstance(chosen, str) else chosen, of_model, tiny_models.LAYERS)
    got = {site.source.format(layer=layer) for site in ours.values() for layer in range(tiny_models.LAYERS)}
    assert got == expected
