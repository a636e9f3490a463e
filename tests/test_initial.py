"""Adapters to start from: what PEFT wrote, what we exported, and what is refused."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file, save_file

from fedjax_lora.app.export import export_run
from fedjax_lora.app.runner import started_with
from fedjax_lora.config.assemble import build
from fedjax_lora.config.experiment import dump, load_config
from fedjax_lora.core.errors import ConfigError, ConfigWarning
from fedjax_lora.io.log import RunFolder
from fedjax_lora.io.run_files import FIELDS
from fedjax_lora.models import peft_config
from fedjax_lora.sim.engine import predict
from oracles.toy_bert import save_toy_bert, save_toy_gpt2, save_toy_llama

peft = pytest.importorskip("peft")
torch = pytest.importorskip("torch")

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # raised inside PEFT

BATCH = {"input_ids": np.arange(12).reshape(2, 6) % 11, "attention_mask": np.array([[1] * 6, [1] * 4 + [0] * 2])}
TEXT = {"train": "so good\tyes\nso bad\tno\ngood film\tyes\nlong and dull\tno\n", "test": "good\tyes\ndull\tno\n"}
NAMES = ["attention.self.query", "intermediate.dense"]
TARGETS = [f"encoder.layer.{layer}.{name}" for layer in range(2) for name in NAMES]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A BERT and a data set of two labels."""
    path = tmp_path_factory.mktemp("initial")
    save_toy_bert(path / "bert")
    for name, text in TEXT.items():
        (path / f"{name}.tsv").write_text(text)
    return path


def configuration(folder, *overrides):
    return load_config(
        None,
        [
            f"model={{pretrained: {folder / 'bert'}, pooling: cls}}",
            f"data={{source: tsv, train: {folder / 'train.tsv'}, test: {folder / 'test.tsv'}, max_length: 8}}",
            "clients={count: 2, partition: {kind: iid}}",
            "local={steps: 1, batch_size: 2}",
            "lora={max_rank: 6, rank: 5, alpha: 6.0, targets: [query, up], init_scale: 2.0}",
            *overrides,
        ],
    )


def beginning(folder, *overrides):
    """The simulation, its state before round 1, and the logits of that; not compiled."""
    simulation = build(configuration(folder, *overrides))
    state = simulation.program.start(jax.random.key(0), simulation.numbers)
    return simulation, state, logits(simulation, state)


def logits(simulation, state):
    return predict(simulation.make_parts, simulation.world, state, jax.tree.map(jnp.asarray, BATCH))


def saved_by_peft(folder, out, **options):
    """An adapter with random factors and a random head; returns its logits."""
    torch.manual_seed(3)
    model = transformers.BertForSequenceClassification.from_pretrained(folder / "bert")
    options = {"r": 3, "lora_alpha": 5, "target_modules": TARGETS, "task_type": "SEQ_CLS", **options}
    model = peft.get_peft_model(model, peft.LoraConfig(**options)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.copy_(0.5 * torch.randn(parameter.shape))
        found = model(**{key: torch.tensor(value) for key, value in BATCH.items()}).logits.numpy()
    model.save_pretrained(out)
    return found


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {
            "rank_pattern": {"layer.1.attention.self.query": 5, "intermediate.dense": 1},
            "alpha_pattern": {r"layer\.\d\.attention.self.query": 7},
        },
        {"layers_to_transform": [1], "target_modules": ["query", "intermediate.dense"]},
    ],
    ids=["plain", "rslora", "patterns", "one layer"],
)
def test_an_adapter_of_peft_gives_its_logits_before_round_1(folder, tmp_path, options):
    """Oracle: PEFT, which made and wrote the adapter with its head."""
    theirs = saved_by_peft(folder, tmp_path / "adapter", **options)
    _, state, ours = beginning(folder, f"lora.initial={tmp_path / 'adapter'}")
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    for factors in state.adapters.modules.values():  # what is left of the components is orthogonal, and can train
        a, b = np.asarray(factors.a), np.asarray(factors.b)
        rank = int(np.flatnonzero(b.any((0, 2)))[-1]) + 1
        gram = np.swapaxes(a, 1, 2) @ a
        assert rank < 6
        np.testing.assert_allclose(gram[:, rank:, :rank], 0, atol=1e-5)
        np.testing.assert_allclose(
            gram[:, rank:, rank:], 4 * np.broadcast_to(np.eye(6 - rank), (2, 6 - rank, 6 - rank)), atol=1e-5
        )


def test_how_eva_began_has_no_effect(changed):
    """Oracle: the same adapter without a word of it."""
    plain = peft_config.read(changed, "lora.initial")
    put(init_lora_weights="eva", eva_config={"rho": 2.0, "tau": 0.99})(changed)
    assert peft_config.read(changed, "lora.initial") == plain


SAVERS = {"gpt2": (save_toy_gpt2, ["c_attn", "c_fc"]), "llama": (save_toy_llama, ["q_proj", "down_proj"])}


@pytest.mark.parametrize("name", SAVERS)
def test_an_adapter_of_a_decoder_gives_the_logits_of_peft(folder, tmp_path, name):
    """Oracle: PEFT; GPT-2 holds its modules as `[n_in, n_out]`, and two of three are not square."""
    save, targets = SAVERS[name]
    save(tmp_path / "base")
    torch.manual_seed(3)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", pad_token_id=0)
    options = peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets, task_type="SEQ_CLS")
    options.fan_in_fan_out = name == "gpt2"
    model = peft.get_peft_model(model, options).eval()
    ids = np.where(BATCH["attention_mask"], BATCH["input_ids"] % 10 + 1, 0)
    batch = {"input_ids": ids, "attention_mask": BATCH["attention_mask"]}
    with torch.no_grad():
        for parameter in (p for n, p in model.named_parameters() if "lora_" in n or "modules_to_save" in n):
            parameter.copy_(0.5 * torch.randn(parameter.shape))
        theirs = model(**{key: torch.tensor(value) for key, value in batch.items()}).logits.numpy()
    model.save_pretrained(tmp_path / "adapter")
    overrides = [
        f"model={{pretrained: {tmp_path / 'base'}, pooling: last}}",
        f"lora.targets=[{', '.join(targets)}]",
        f"lora.initial={tmp_path / 'adapter'}",
    ]
    simulation = build(configuration(folder, *overrides))
    state = simulation.program.start(jax.random.key(0), simulation.numbers)
    ours = predict(simulation.make_parts, simulation.world, state, jax.tree.map(jnp.asarray, batch))
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


PATTERNS = "lora={rank_pattern: {0.intermediate.dense: 2, '.*query': 6}, alpha_pattern: {'.*[.]0[.].*': 4.5}}"


@pytest.mark.parametrize("of", ["model.pooling=cls", "model.pooling=mean", PATTERNS], ids=["cls", "mean", "patterns"])
def test_our_own_export_is_read_back(folder, tmp_path, of):
    """Oracle: the logits of the run that was exported, in another rank and at another scale."""
    of = (of,)
    simulation, state, _ = beginning(folder, *of)
    key = jax.random.key(5)
    adapters = jax.tree.map(lambda leaf: leaf + 0.3 * jax.random.normal(key, leaf.shape), state.adapters)
    state = state.replace(adapters=adapters, round=jnp.int32(1))
    run = RunFolder.create(tmp_path / "run", dump(configuration(folder, *of)), started_with(simulation.facts))
    line = dict.fromkeys(FIELDS, 0) | {"round": 1, "tail_energy": [0.0]}
    (run.path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    run.save(state)
    export_run(run.path, tmp_path / "out")
    again = (*of, f"lora.initial={tmp_path / 'out'}", "lora={rank: 6, alpha: 4.0}")
    np.testing.assert_allclose(beginning(folder, *again)[2], logits(simulation, state), atol=1e-5)


@pytest.fixture(scope="module")
def adapter(folder, tmp_path_factory):
    """The folder of one of PEFT's adapters."""
    path = tmp_path_factory.mktemp("peft") / "adapter"
    saved_by_peft(folder, path)
    return path


@pytest.fixture
def changed(adapter, tmp_path):
    """A copy to be changed."""
    return shutil.copytree(adapter, tmp_path / "adapter")


def put(**fields):
    def change(path):
        file = path / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))

    return change


def tensors(change):
    def write(path):
        file = path / "adapter_model.safetensors"
        save_file(change(load_file(file)), file, {"format": "pt"})

    return write


def as_pickle(path):
    (path / "adapter_model.safetensors").rename(path / "adapter_model.bin")


def of_another_model(path):
    (path / "head.json").write_text(json.dumps({"weights_hash": "0"}))


SAVED = "base_model.model"
QUERY = f"{SAVED}.bert.encoder.layer.0.attention.self.query.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "overrides", "expected"),
    [
        (shutil.rmtree, [], ["lora.initial", "a folder of PEFT", "without adapter_config.json"]),
        (as_pickle, [], ["lora.initial", "adapter_model.bin, which is a pickle and never read"]),
        (put(peft_type="IA3"), [], ["peft_type must be LORA, got 'IA3'"]),
        (put(use_dora=True), [], ["use_dora must be absent, got True"]),
        (put(bias="all"), [], ["bias must be 'none', got 'all'"]),
        (put(init_lora_weights="pissa"), [], ["init_lora_weights", "got 'pissa'"]),
        (put(layer_replication=[[0, 1]]), [], ["layer_replication must be absent"]),
        (put(modules_to_save=["classifier", "embeddings"]), [], ["the task's head, got 'embeddings'"]),
        (put(r=0), [], ["r must be a positive integer, got 0"]),
        (put(r=2), [], ["lora_A of bert.encoder.layer.0.attention.self.query", "of shape (2, 12), got (3, 12)"]),
        (put(alpha_pattern={"(": 1}), [], ["alpha_pattern must have expressions as its keys, got '('"]),
        (put(rank_pattern={"query": "2"}), [], ["rank_pattern of query must be a positive integer, got '2'"]),
        (of_another_model, [], ["lora.initial must be of the model that model.pretrained names"]),
        (tensors(lambda held: held | {QUERY: held[QUERY] * np.float32(np.nan)}), [], ["finite weights", QUERY]),
        (tensors(lambda held: {n: x for n, x in held.items() if n != QUERY}), [], ["lora_A of bert", "got none"]),
        (tensors(lambda held: held | {"base_model.model.bert.pooler.bias": held[QUERY]}), [], ["bert.pooler.bias'"]),
        (
            tensors(lambda held: held | {"base_model.model.bert.pooler.dense.lora_A.weight": held[QUERY]}),
            [],
            ["the model's modules, query, key", "got bert.pooler.dense"],
        ),
        (lambda path: None, ["lora.targets=[query]"], ["lora.targets must be query, up, the modules of", "got query"]),
        (lambda path: None, ["lora.rank=2"], ["lora.rank must be at least 3", "got 2"]),
        (
            lambda path: None,
            ["lora.rank_pattern={1.attention.self.query: 2}"],
            ["lora.rank must be at least 3", "in layer 1 of query, got 2"],
        ),
        (
            lambda path: None,
            ["aggregation={name: fedex, start: keep}", "sparsifier=dense"],
            ["lora.initial must be absent", "aggregation.start is keep", "add nothing at the start"],
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_started_from_is_one_line(folder, changed, change, overrides, expected):
    """The message names the field, and what it got."""
    change(changed)
    with pytest.raises(ConfigError) as caught:
        build(configuration(folder, f"lora.initial={changed}", *overrides))
    assert "\n" not in str(caught.value) and all(part in str(caught.value) for part in expected), caught.value


def test_adapters_need_a_pretrained_model():
    with pytest.raises(ConfigError, match=r"lora.initial must be absent without model.pretrained, got '/somewhere'"):
        load_config(None, ["lora.initial=/somewhere"])


@pytest.mark.parametrize(
    ("change", "overrides", "expected"),
    [
        (tensors(lambda held: {n: x for n, x in held.items() if "classifier" not in n}), [], "it holds none"),
        (lambda path: None, ["model.pooling=mean"], "sees something else than model.pooling"),
        (tensors(lambda held: held | {f"{SAVED}.classifier.bias": np.ones(3, np.float32)}), [], r"shapes .*\(3,\)"),
        (lambda path: (path / "head.json").write_text('{"id2label": {"0": "yes", "1": "no"}}'), [], "other labels"),
    ],
)  # fmt: skip
def test_a_head_that_does_not_fit_is_a_new_one_and_said(folder, changed, change, overrides, expected):
    """Oracle: the head that the run would draw without the folder."""
    change(changed)
    with pytest.warns(ConfigWarning, match=rf"the task head is a new one: of lora.initial, .*{expected}"):
        state = beginning(folder, f"lora.initial={changed}", *overrides)[1]
    new = beginning(folder, *overrides)[1].adapters.head
    jax.tree.map(np.testing.assert_array_equal, state.adapters.head, new)


def test_adapters_of_a_model_by_another_name_are_said(folder, changed):
    put(base_model_name_or_path="someone/roberta")(changed)
    with pytest.warns(ConfigWarning, match=r"is of the model someone/roberta, and model.pretrained is .*bert"):
        build(configuration(folder, f"lora.initial={changed}"))
