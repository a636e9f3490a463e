"""The YAML form of a configuration: strict, forgiving of nothing, one line for each mistake."""

import dataclasses
import math

import pytest
import yaml

from fedjax_lora.config.catalogue import SLOTS, Catalogue
from fedjax_lora.config.experiment import ConfigError, ExperimentConfig, dump, load_config, to_dict
from fedjax_lora.config.presets import PRESETS, preset
from fedjax_lora.config.values import key_of
from fedjax_lora.config.yaml import parse_value, write_line
from fedjax_lora.sparsifiers.dense import DenseConfig
from fedjax_lora.sparsifiers.soft import SoftConfig


@pytest.fixture
def load(tmp_path):
    def load_text(text, *overrides, base=None):
        path = tmp_path / "experiment.yaml"
        path.write_text(text)
        return load_config(path, overrides, base=base)

    return load_text


# The oracle of each row is the specification: one line with the dotted key, the value it got and what is allowed.
MISTAKES = {
    # unknown keys
    "near": ("rouns: 3", ["rouns ", "3", "did you mean rounds?"]),
    "near, nested": ("lora: {rnk: 2}", ["lora.rnk ", "2", "did you mean lora.rank?"]),
    "in another section": (
        "local: {learning_rate: 1}",
        ["local.learning_rate ", "mean local.optimizer.learning_rate?"],
    ),
    "none near": ("lora: {zzz: 2}", ["lora.zzz ", "2", "valid keys are max_rank, rank, alpha, targets"]),
    "not a string": ("1: 2", ["1 ", "2", "valid keys are seed, rounds, model"]),
    "of another variant": (
        "sparsifier: {name: dense, form: a}",
        ["sparsifier.form is a key of sparsifier.name = soft, not of dense", "'a'"],
    ),
    # wrong types
    "string for int": ("lora: {rank: '8'}", ["lora.rank ", "'8'", "an integer"]),
    "bool for int": ("lora: {rank: true}", ["lora.rank ", "True", "an integer"]),
    "float for int": ("rounds: 8.0", ["rounds ", "8.0", "an integer"]),
    "bool for float": ("lora: {alpha: false}", ["lora.alpha ", "False", "a finite number"]),
    "string for float": ("lora: {alpha: '1e-3'}", ["lora.alpha ", "'1e-3'", "a finite number"]),
    "nan": ("lora: {alpha: .nan}", ["lora.alpha ", "nan", "a finite number"]),
    "infinity": ("wireless: {bandwidth_hz: .inf}", ["wireless.bandwidth_hz ", "inf", "a finite number"]),
    "int for bool": ("wireless: {downlink: 1}", ["wireless.downlink ", "1", "true or false"]),
    "null for int": ("rounds:", ["rounds ", "None", "an integer"]),
    "string for list": ("lora: {targets: query}", ["lora.targets ", "'query'", "a list of strings"]),
    "list of ints": ("lora: {targets: [1]}", ["lora.targets ", "[1]", "a list of strings"]),
    "optional": ("clients: {per_round: all}", ["clients.per_round ", "'all'", "an integer or null"]),
    "int or word": (
        "engine: {client_chunk: auot}",
        ["engine.client_chunk ", "'auot'", "an integer or auto", "mean auto?"],
    ),
    "string for section": ("lora: 3", ["lora ", "3", "a mapping"]),
    "null for section": ("clients:", ["clients ", "None", "a mapping"]),
    "list for variant": ("sparsifier: [1]", ["sparsifier ", "[1]", "a mapping"]),
    # values that are not allowed
    "literal": (
        "wireless: {fading: raileigh}",
        ["wireless.fading ", "'raileigh'", "rayleigh, rician", "mean rayleigh?"],
    ),
    "variant": (
        "sparsifier: {name: soft_rotate}",
        ["sparsifier.name ", "'soft_rotate'", "dense", "mean soft_rotated?"],
    ),
    "variant of no name": ("control: {name: [2]}", ["control.name ", "[2]", "one of fixed, uniform, ideal, tsfa"]),
    "out of range": ("rounds: 0", ["rounds ", "0", "at least 1"]),
    "out of range, nested": (
        "local: {optimizer: {learning_rate: -1.0}}",
        ["local.optimizer.learning_rate ", "-1.0"],
    ),
    "two fields": ("lora: {rank: 99}", ["lora.rank ", "99", "max_rank"]),
    "beyond float32": (
        "local: {optimizer: {learning_rate: 1e39}}",
        ["local.optimizer.learning_rate ", "1e+39", "a finite number"],
    ),
    "beyond int32": (
        "{rounds: 100000, local: {steps: 100000}}",
        ["rounds * local.steps must be below 2**31", "100000 * 100000"],
    ),
    "seed": ("seed: -1", ["seed ", "-1", "from 0 to 2**32 - 1"]),
    # sections that do not fit together
    "text without model": (
        "data: {source: tsv, train: a, test: b}",
        ["model.pretrained must be a folder or a Hugging Face model id ", "data.source is tsv", "got None"],
    ),
    "scaffold with adamw": (
        "{drift: {name: scaffold}, local: {optimizer: {name: adamw}}}",
        ["local.optimizer.name ", "sgd", "drift.name is scaffold", "'adamw'"],
    ),
    "scaffold with own parts": (
        "{drift: {name: scaffold}, local: {optimizer: {name: sgd}}, aggregation: {name: fedsa}, "
        "sparsifier: {name: dense}}",
        ["aggregation.name ", "drift.name is scaffold", "'fedsa'"],
    ),
    "scaffold with client ranks": (
        "{drift: {name: scaffold}, local: {optimizer: {name: sgd}}, lora: {client_ranks: [1, 2]}}",
        ["lora.client_ranks ", "drift.name is scaffold", "(1, 2)"],
    ),
    "client ranks as words": ("lora: {client_ranks: [a]}", ["lora.client_ranks ", "['a']", "a list of integers"]),
    "client rank too large": ("lora: {client_ranks: [2, 9]}", ["lora.client_ranks ", "(2, 9)", "rank = 8"]),
    **{
        f"{name} without b": (
            f"{{aggregation: {{name: fedsa}}, sparsifier: {{name: {name}}}}}",
            [
                "aggregation.name must be one of fedit, ffa, rolora, hetlora, fedex, flora, flexlora, lora_fair ",
                f"sparsifier.name is {name}",
                "got 'fedsa'",
                "sparsifier.name must be one of soft_rotated, dense, top_k, flasc",
            ],
        )
        for name in ("soft", "random_rank", "svd", "lora_a2")
    },
    "padding of what is not sent": (
        "aggregation: {name: hetlora}",
        ["sparsifier.missing must be zero ", "aggregation.name is hetlora", "'senders'"],
    ),
    "padding of what is not drawn": (
        "{aggregation: {name: hetlora}, sparsifier: {name: random_rank}}",
        ["sparsifier.missing must be zero ", "aggregation.name is hetlora", "'senders'"],
    ),
    "padding of factors": (
        "{aggregation: {name: hetlora}, sparsifier: {send: factors, missing: zero}}",
        ["sparsifier.send must be change ", "aggregation.name is hetlora", "'factors'"],
    ),
    "scaffold with pruned ranks": (
        "{drift: {name: scaffold}, local: {optimizer: {name: sgd}}, aggregation: {name: hetlora}, "
        "sparsifier: {name: dense}}",
        ["aggregation.prune must be 1.0 ", "drift.name is scaffold", "got 0.99"],
    ),
    "moments of a factor at rest": (
        "{aggregation: {name: rolora}, server: {name: momentum}}",
        ["server.name must be sgd ", "aggregation.name is rolora", "'momentum'"],
    ),
    "a sparse factor at rest": (
        "{aggregation: {name: rolora}, sparsifier: {name: flasc}}",
        ["sparsifier.name must be one of soft, ", "aggregation.name is rolora", "got 'flasc'"],
    ),
    "tails of what is remembered": (
        "{control: {name: tsfa}, sparsifier: {name: soft, error_feedback: true}}",
        ["sparsifier.error_feedback must be false ", "control.tail is relative", "got True"],
    ),
    "control variates of clipped gradients": (
        "{drift: {name: scaffold}, local: {optimizer: {name: sgd, clip_norm: 1.0}}}",
        ["local.optimizer.clip_norm must be absent ", "drift.name is scaffold", "got 1.0"],
    ),
    "a correction of sparse factors": (
        "{aggregation: {name: lora_fair}, sparsifier: {name: flasc}}",
        ["sparsifier.name must be one of soft, ", "aggregation.name is lora_fair", "got 'flasc'"],
    ),
    **{
        f"{server} of merged products by {name}": (
            f"{{aggregation: {{name: {name}}}, server: {{name: {server}}}}}",
            ["server.name must be sgd ", f"aggregation.name is {name}", f"got '{server}'"],
        )
        for name in ("fedex", "flora", "flexlora")
        for server in ("momentum", "adam", "yogi")
    },
    **{
        f"half a step of {name}": (
            f"{{aggregation: {{name: {name}}}, server: {{learning_rate: 0.5}}}}",
            ["server.learning_rate must be 1.0 ", f"aggregation.name is {name}", "got 0.5"],
        )
        for name in ("fedex", "flora", "flexlora")
    },
    **{
        f"{name} into rounded weights": (
            f"{{aggregation: {{name: {name}}}, model: {{compute_dtype: bfloat16}}}}",
            ["model.compute_dtype must be float32 ", f"aggregation.name is {name}", "got 'bfloat16'"],
        )
        for name in ("fedex", "flora")
    },
    **{
        f"{name} of a sparse broadcast": (
            f"{{aggregation: {{name: {name}}}, sparsifier: {{name: flasc}}}}",
            ["sparsifier.name must be one of soft, ", f"aggregation.name is {name}", "got 'flasc'"],
        )
        for name in ("fedex", "flora", "flexlora")
    },
    **{
        f"control variates in the basis of {name}": (
            f"{{drift: {{name: scaffold}}, local: {{optimizer: {{name: sgd}}}}, aggregation: {{name: {name}}}}}",
            ["aggregation.name must be one of fedit, ", "drift.name is scaffold", f"got '{name}'"],
        )
        for name in ("flora", "flexlora")
    },
    "control variates in another basis": (
        "{drift: {name: scaffold}, local: {optimizer: {name: sgd}}, aggregation: {name: fedex, start: reinit}}",
        ["aggregation.start must be average ", "drift.name is scaffold", "got 'reinit'"],
    ),
    "a memory in another basis": (
        "{sparsifier: {name: soft, error_feedback: true}, aggregation: {name: flora}}",
        ["aggregation.name must be one of fedit, ", "sparsifier.error_feedback is true", "got 'flora'"],
    ),
    "own products of what was not sent": (
        "aggregation: {name: fedex, start: keep}",
        ["sparsifier.name must be dense ", "aggregation.start is keep", "got 'soft'"],
    ),
    "own products of rounded values": (
        "{aggregation: {name: fedex, start: keep}, sparsifier: dense, wire: {bits: 8}}",
        ["wire.bits must be 32 ", "aggregation.start is keep", "got 8"],
    ),
    "own products of several ranks": (
        "{aggregation: {name: fedex, start: keep}, sparsifier: dense, lora: {client_ranks: [1, 2]}}",
        ["lora.client_ranks must be absent ", "aggregation.start is keep", "got (1, 2)"],
    ),
    "weight of no regulariser": (
        "sparsifier: {form: none}",
        ["sparsifier.orthogonality must be 0 ", "form is none", "got 0.1"],
    ),
    "decay of no optimizer": (
        "local: {optimizer: {name: sgd, weight_decay: 0.1}}",
        ["local.optimizer.weight_decay must be 0 ", "name is sgd", "got 0.1"],
    ),
    "momentum of another server": (
        "server: {name: adam, momentum: 0.5}",
        ["server.momentum is a key of server.name = momentum, not of adam", "0.5"],
    ),
    "moments of another server": (
        "server: {beta2: 0.9}",
        ["server.beta2 is a key of server.name = adam, yogi, not of sgd", "0.9"],
    ),
    "momentum of no optimizer": (
        "local: {optimizer: {name: sgd, momentum: 0.9}}",
        ["local.optimizer.momentum must be null ", "name is sgd", "got 0.9"],
    ),
    "start of another aggregation": (
        "aggregation: {name: fedit, start: reinit}",
        ["aggregation.start is a key of aggregation.name = fedex, not of fedit", "'reinit'"],
    ),
    "of all other variants that have it": (
        "control: {name: fixed, latency_budget_s: 3}",
        ["a key of control.name = tsfa, greedy, proportional, split_lyapunov, not of fixed", "value 3"],
    ),
    "near one of another variant": (
        "control: {latency_budget: 3}",
        ["control.latency_budget is not a known key", "mean control.latency_budget_s, a key of control.name = tsfa,"],
    ),
    "files of no source": ("data: {source: digits, train: x}", ["data.train must be absent ", "digits", "'x'"]),
    "data from nowhere": (
        "data: digit",
        ["data.source must be one of digits, tsv, csv, jsonl, parquet, datasets, images, got 'digit'", "mean digits?"],
    ),
    "table without a file": (
        "{data: {source: csv, train: a}, model: {pretrained: x}}",
        ["data.test must be the path of a file when source is csv, got None"],
    ),
    "unknown role": (
        "data: {source: csv, train: a, test: b, columns: {body: text}}",
        ["data.columns.body is not a known key", "valid keys are text, text_pair, label"],
    ),
    "texts of the hub without one": (
        "data: {source: datasets, dataset: nobody/texts}",
        ["model.pretrained must be a folder ", "data.dataset is nobody/texts, which needs a model of text"],
    ),
    "partitioner of no kind": (
        "clients: {partition: {partitioner: IidPartitioner}}",
        ["clients.partition.partitioner must be absent when kind is dirichlet, got 'IidPartitioner'"],
    ),
    "options that are no mapping": (
        "clients: {partition: {kind: flwr, partitioner: A, options: [1]}}",
        ["clients.partition.options must be a mapping of keys, got [1]"],
    ),
    "options of options": (
        "clients: {partition: {kind: flwr, partitioner: A, options: {a: {b: 1}}}}",
        ["clients.partition.options must be a mapping of keys, got {'a': {'b': 1}}"],
    ),
    "another network": ("wireless: {name: wire}", ["wireless.name must be cell, got 'wire'"]),
    "word for a section of one kind": ("clients: many", ["clients ", "'many'", "a mapping of keys"]),
    "word for no variant": ("sparsifier: dens", ["sparsifier.name ", "'dens'", "one of soft,", "mean dense?"]),
    "number for a variant": ("control: 3", ["control ", "3", "a mapping of keys or one of fixed, uniform"]),
    "null for a variant": ("server:", ["server ", "None", "a mapping of keys or one of sgd, momentum"]),
    # what YAML 1.1 would take for another number, for a truth value or for a date
    "sexagesimal": ("rounds: 1:30", ["rounds ", "'1:30'", "an integer"]),
    "underscore": ("rounds: 1_000", ["rounds ", "'1_000'", "an integer"]),
    "yes": ("wireless: {downlink: yes}", ["wireless.downlink ", "'yes'", "true or false"]),
    "date": ("seed: 2020-01-01", ["seed ", "'2020-01-01'", "an integer"]),
    "beyond every float": (f"lora: {{alpha: 1{'0' * 400}}}", ["lora.alpha ", "1000", "a finite number"]),
    "key of two lines": ('"a\\nb": 1', ["'a\\nb' is not a known key"]),
    "warm-up": ("{rounds: 2, local: {steps: 3, optimizer: {warmup_steps: 6}}}", ["warmup_steps ", "below", "6"]),
    # files
    "empty": ("", ["empty configuration file"]),
    "only a comment": ("# nothing", ["empty configuration file"]),
    "not a mapping": ("- 1", ["a mapping of keys", "[1]"]),
    "syntax": ("rounds: 3\nlora: [", ["line 2", "valid YAML"]),
    "tab": ("lora:\n\trank: 2", ["line 2", "valid YAML"]),
    "twice": ("rounds: 3\nrounds: 4", ["line 2", "'rounds' twice"]),
    "key that is a list": ("? [1]\n: 2", ["line 1", "a key that is not a word"]),
    "digits without end": (f"seed: {'9' * 5000}", ["valid YAML", "5000 digits"]),
    "a value that holds itself": ("lora: &x {rank: *x}", ["line 1", "valid YAML", "recursive"]),
    "brackets without end": ("[" * 3000, ["valid YAML", "nested too deeply"]),
    "a tag that does not fit": ("seed: !!int many", ["line 1", "valid YAML", "'many'"]),
    "a tag of YAML 1.1": ("seed: !!timestamp x", ["line 1", "valid YAML", "timestamp"]),
    "tag that executes": ("seed: !!python/object/apply:os.getcwd []", ["line 1", "valid YAML"]),
}


@pytest.mark.parametrize(("text", "fragments"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_in_a_file_is_one_line_as_specified(load, text, fragments):
    with pytest.raises(ConfigError) as caught:
        load(text)
    message = str(caught.value)
    assert "\n" not in message
    assert not [fragment for fragment in fragments if fragment not in message], message


@pytest.mark.parametrize(
    "text",
    [
        "{aggregation: {name: fedsa}, sparsifier: {name: soft_rotated}}",
        "{aggregation: {name: hetlora}, sparsifier: {missing: zero}}",
        "{aggregation: {name: hetlora}, sparsifier: {name: random_rank, missing: zero}}",
        "{aggregation: {name: rolora}, server: {learning_rate: 0.5}, sparsifier: {name: lora_a2}}",
        "{aggregation: {name: lora_fair}, sparsifier: {name: top_k}}",
        "{aggregation: {name: flora}}",
        "{control: {name: tsfa, tail: linear}, sparsifier: {name: soft, error_feedback: true}}",
        "{server: {name: momentum, momentum: 0.5}, local: {optimizer: {name: momentum, momentum: 0.5}}}",
        "server: {name: yogi, beta2: 0.9}",
        "sparsifier: {form: none, orthogonality: 0}",
        "local: {optimizer: {weight_decay: 0.1}}",
        "{drift: {name: scaffold}, local: {optimizer: {name: sgd}}, aggregation: {name: hetlora, prune: 1}, "
        "sparsifier: {name: dense}}",
    ],
)
def test_what_the_mistakes_say_is_allowed_is_read(load, text):
    """Oracle: the lines of `MISTAKES`, taken at their word."""
    config = load(text)
    assert load(dump(config)) == config


@pytest.mark.parametrize(
    ("override", "fragments"),
    [
        ("rounds", ["key=value", "'rounds'"]),
        ("=3", ["key=value", "'=3'"]),
        ("rounds=", ["rounds ", "None", "an integer"]),
        ("rounds=1.5", ["rounds ", "1.5", "an integer"]),
        ("rounds.a=3", ["rounds ", "{'a': 3}", "an integer"]),
        ("lora.targets=[query", ["'lora.targets=[query'", "valid YAML"]),
        ("lora..rank=2", ["lora. ", "valid keys are max_rank"]),
        ("sparsifier={name: dense, orthogonality: 2}", ["sparsifier.orthogonality is a key of ", "= soft", "2"]),
    ],
)
def test_a_mistake_in_an_override_is_one_line_as_specified(load, override, fragments):
    with pytest.raises(ConfigError) as caught:
        load("sparsifier: {orthogonality: 2}", override)
    message = str(caught.value)
    assert "\n" not in message
    assert not [fragment for fragment in fragments if fragment not in message], message


def test_a_missing_file_a_folder_and_bytes_are_one_line_as_specified(tmp_path):
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    for path, reason in [(tmp_path / "none.yaml", "No such file"), (tmp_path, "directory"), (binary, "UTF-8")]:
        with pytest.raises(ConfigError, match=reason) as caught:
            load_config(path)
        assert str(path) in str(caught.value)


SOFT = {"clients": {"count": 50, "per_round": 10, "weighting": "equal"}, "sparsifier": {"orthogonality": 0.5}}


@pytest.mark.parametrize("over", ["file", "preset"])
@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["clients={count: 20}"], {"clients": {"count": 20, "per_round": 10, "weighting": "equal"}}),
        (["clients={count: 20}", "clients.count=30"], {"clients": {"count": 30, "per_round": 10}}),
        (["clients.count=30", "clients={count: 20}"], {"clients": {"count": 20, "per_round": 10}}),
        (["clients={partition: {alpha: 2}}", "clients={partition: {kind: iid}}"], {"clients": {"count": 50}}),
        (["local.optimizer={clip_norm: 1.0}"], {"local": {"optimizer": {"learning_rate": 0.5, "clip_norm": 1.0}}}),
        (["sparsifier={form: a_only}"], {"sparsifier": {"orthogonality": 0.5}}),
        (["sparsifier=soft"], {"sparsifier": {"name": "soft", "orthogonality": 0.5}}),
        (["sparsifier=dense"], {"sparsifier": {"name": "dense"}}),
        (["sparsifier={name: dense}"], {"sparsifier": {"name": "dense"}}),
        (["sparsifier.name=top_k"], {"sparsifier": {"name": "top_k"}}),
        (["sparsifier=dense", "sparsifier={name: soft, orthogonality: 2}"], {"sparsifier": {"orthogonality": 2.0}}),
        (["sparsifier={name: soft, orthogonality: 2}", "sparsifier=dense"], {"sparsifier": {"name": "dense"}}),
        (["control=tsfa", "control.V=3"], {"control": {"name": "tsfa", "V": 3.0}}),
        (["control.V=3", "control=tsfa"], {"control": {"name": "tsfa", "V": 3.0}}),
    ],
)
def test_an_override_is_laid_over_file_and_preset_alike_oracle_table(load, over, overrides, expected):
    """The rows say what must be there after the override; the same whether the file or a preset says the rest."""
    text = yaml.safe_dump({**SOFT, "local": {"optimizer": {"learning_rate": 0.5}}})
    config = load(text, *overrides) if over == "file" else load("seed: 0", *overrides, base=load(text))

    def check(found, wanted):
        for key, value in wanted.items():
            if isinstance(value, dict):
                check(found[key], value)
            else:
                assert found[key] == value, key

    check(to_dict(config), expected)
    rest = {key: value for key, value in SOFT.items() if key not in expected}
    check(to_dict(config), rest)


@pytest.mark.parametrize("section", SLOTS)
def test_a_word_stands_for_a_method_oracle_its_mapping(load, section):
    for name in Catalogue.of().names(section):
        try:
            expected = load(f"{section}: {{{key_of(section)}: {name}}}")
        except ConfigError:  # does not go with the defaults of another section
            continue
        assert load(f"{section}: {name}") == load("seed: 0", f"{section}={name}") == expected


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *[(text, 10) for text in ("10", "010", "+10", "0o12", "0xA")],
        *[(text, 0.5) for text in (".5", "0.5", "5e-1", "5.E-1", "+.5")],
        *[(text, 1.0) for text in ("1.", "1.0", "1e0")],
        *[(text, True) for text in ("true", "True", "TRUE")],
        *[(text, None) for text in ("", "~", "null", "Null", "NULL")],
        *[
            (text, text)
            for text in ("yes", "No", "on", "off", "y", "1:30", "1:30.5", "1_000", "0b1", "08:00", "2020-01-01")
        ],
        *[(text, text) for text in ("=", ".", "1e", "0o9", "0x", "none", "tRue", "inf", "nan")],
        (".inf", math.inf),
        ("-.INF", -math.inf),
    ],
)
def test_scalars_are_those_of_yaml_1_2_oracle_its_core_schema(text, value):
    found = parse_value(text, "value")
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    "word",
    ["010", "0o10", "1e-3", "1:30", "yes", "on", "1_000", ".5", "null", "~", "<<", "=", "2020-01-01", "a: b", "é\n"],
)
def test_a_dumped_word_stays_a_word_round_trip(load, word):
    """By the reader of this project and by one of YAML 1.1."""
    config = load("seed: 0")
    config = dataclasses.replace(config, lora=dataclasses.replace(config.lora, targets=(word,)))
    assert load(dump(config)) == config
    assert parse_value(write_line(word), "value") == word and "\n" not in write_line(word)
    assert yaml.safe_load(dump(config))["lora"]["targets"] == [word]


@pytest.mark.parametrize("name", PRESETS)
def test_dump_then_load_is_the_identity(load, name):
    config = dataclasses.replace(preset(name), seed=7)
    config = dataclasses.replace(config, lora=dataclasses.replace(config.lora, targets=("a", "b"), alpha=1e-7))
    assert load(dump(config)) == config
    assert load_config(None, base=config) == config


def test_a_file_names_only_what_differs_oracle_hand_made_dataclass(load):
    config = load(
        "rounds: 3\nlora: {rank: 2, alpha: 4}\nlocal: {optimizer: {learning_rate: 1e-3, clip_norm: 5E-1}}",
        "lora.rank=3",
        "lora.targets=[query]",
    )
    default = ExperimentConfig()
    optimizer = dataclasses.replace(default.local.optimizer, learning_rate=0.001, clip_norm=0.5)
    assert config == dataclasses.replace(
        default,
        rounds=3,
        lora=dataclasses.replace(default.lora, rank=3, alpha=4.0, targets=("query",)),
        local=dataclasses.replace(default.local, optimizer=optimizer),
    )
    assert type(config.lora.alpha) is float


def test_a_section_without_name_is_of_the_default_method_oracle_dataclass_defaults(load):
    assert load("sparsifier: {orthogonality: 2}").sparsifier == SoftConfig(orthogonality=2.0)
    raw = to_dict(ExperimentConfig())
    for section in SLOTS:
        assert raw[section][key_of(section)] == Catalogue.of().names(section)[0]


def test_another_variant_over_a_preset_starts_from_its_own_defaults(load):
    base = preset("digits")
    config = load("seed: 1", "sparsifier.name=dense", base=base)
    assert config == dataclasses.replace(base, seed=1, sparsifier=DenseConfig())
    # The same variant keeps what the preset chose.
    assert load("control: {name: fixed}", base=base).control == base.control


def test_an_unknown_preset_is_one_line_as_specified():
    with pytest.raises(
        ConfigError, match=r"must be one of digits, .*, digits-tsfa, got 'digit'; did you mean digits\?"
    ):
        preset("digit")


def test_a_mapping_with_a_name_replaces_what_was_asked_of_another_variant():
    """Oracle: the configuration without the earlier overrides; a name alone says for which variant they are."""
    replaced = load_config(None, ["control.keep_ratio=0.7", "control={name: tsfa, V: 3}"])
    assert replaced == load_config(None, ["control={name: tsfa, V: 3}"])
    assert load_config(None, ["control={name: tsfa, V: 3}", "control={name: tsfa, queue_s: 1}"]).control.V == 3
    for order in (["control.V=3", "control.name=tsfa"], ["control=tsfa", "control.V=3"]):
        assert load_config(None, order) == replaced
