"""Exports of a run's folder, which is all that is left of the run: no data, no simulation, another directory."""

import hashlib
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file, save_file

from fedjax_lora.adapters import lora
from fedjax_lora.app.export import export_run
from fedjax_lora.config.beginning import hash_weights
from fedjax_lora.config.experiment import dump, load_config
from fedjax_lora.core.types import Adapters, ClientState, Factors, FedState
from fedjax_lora.data import tokens
from fedjax_lora.io import merged as exporting
from fedjax_lora.io import sealed
from fedjax_lora.io.log import RunFolder
from fedjax_lora.io.run_files import FIELDS
from fedjax_lora.models import load
from oracles.model_context import model_context
from oracles.toy_bert import save_toy_bert

peft = pytest.importorskip("peft")
torch = pytest.importorskip("torch")

LABELS = ["negative", "positiv · 🙂", "neither"]
RANK, ALPHA, MAX_RANK = 2, 6.0, 4
BATCH = {"input_ids": np.arange(12).reshape(2, 6) % 11, "attention_mask": np.array([[1] * 6, [1] * 4 + [0] * 2])}


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return save_toy_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture
def write_run(bert, tmp_path, monkeypatch):
    """From what is merged and what clients keep to the folder of a run whose data are gone; we are elsewhere."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    base_model = shutil.copytree(bert, tmp_path / "bert")

    def write(merged=None, kept=None, ranks=(RANK, RANK), pooling="mean"):
        config = load_config(
            None,
            [
                f"model={{pretrained: {base_model}, pooling: {pooling}}}",
                "data={source: tsv, train: /gone/train.tsv, test: /gone/test.tsv}",
                f"lora={{max_rank: {MAX_RANK}, rank: {RANK}, alpha: {ALPHA}, targets: [query, up, down]}}",
            ],
        )
        model, base = load.build_model(config.model, model_context(len(LABELS)))
        modules = lora.init(jax.random.key(1), {n: model.sites[n] for n in config.lora.targets}, 2, MAX_RANK)
        modules = {
            name: Factors(a=f.a, b=0.3 * jax.random.normal(jax.random.key(2), f.b.shape)) for name, f in modules.items()
        }
        adapters = Adapters(modules=modules, head=model.init_head(jax.random.key(3)))
        personal = kept(adapters) if kept else {}
        state = FedState(
            key=jax.random.key(7),
            round=jnp.int32(5),
            numbers={"lora.rank": jnp.float32(RANK)},
            adapters=adapters,
            merged=merged(modules) if merged else {},
            elapsed_s=jnp.float32(0),
            methods={"server": (), "control": {"queue_s": jnp.float32(0)}},
            clients=ClientState(rank=jnp.array(ranks, jnp.float32), personal=personal, methods={"sparsifier": ()}),
        )
        data = {
            "base_hash": hash_weights(base),
            "model_config_hash": load.model_config_hash(config.model),
            "tokenizer_hash": tokens.tokenizer_hash(load.load_tokenizer(str(base_model))),
            "class_names": LABELS,
        }
        run = RunFolder.create(tmp_path / "run", dump(config), data)
        measured = dict.fromkeys(FIELDS, 0) | {"eval_accuracy": 0.8125, "uplink_bits": 7, "tail_energy": [0.0]}
        lines = [measured | {"round": number} for number in range(1, 6)]
        (run.path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        run.save(state)
        return run.path, model, base, state

    return write


def torch_logits(folder):
    """Of PyTorch and PEFT, which know the exported folder alone."""
    if json.loads((folder / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS":
        loaded = peft.AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=len(LABELS))
        return outputs(loaded, "logits")
    return pooled_logits(peft.AutoPeftModelForFeatureExtraction.from_pretrained(folder), folder)


def outputs(torch_model, name):
    with torch.no_grad():
        return torch_model.eval()(**{key: torch.tensor(value) for key, value in BATCH.items()})[name].numpy()


def pooled_logits(encoder, folder):
    """The head of `head.safetensors` on the mean of the real positions."""
    hidden = outputs(encoder, "last_hidden_state")
    mask, head = BATCH["attention_mask"][:, :, None], load_file(folder / "head.safetensors")
    return (hidden * mask).sum(1) / mask.sum(1) @ head["w"] + head["b"]


def of_the_run(written, rank=RANK):
    """Logits of the run's own model, on its frozen weights and what it merged into them."""
    _, model, base, state = written
    used = lora.effective(state.adapters, lora.rank_mask(rank, MAX_RANK), ALPHA / RANK)
    return model.apply(lora.add_to_base(base, state.merged, model.sites), used, BATCH)


def low_rank(modules, rank=3):
    """What a server may have merged: a product of `rank` for each layer."""
    draw = {name: jax.random.normal(jax.random.key(4), (2, f.a.shape[1], rank)) for name, f in modules.items()}
    return {
        name: jnp.einsum(
            "lir,lro->lio", draw[name], 0.1 * jax.random.normal(jax.random.key(5), (2, rank, f.b.shape[2]))
        )
        for name, f in modules.items()
    }


def less_in_the_last_layer(modules):
    """A product of rank 3 in the first layer and none in the last."""
    return {name: product.at[1].set(0) for name, product in low_rank(modules).items()}


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # raised inside PEFT
@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("merged", [None, less_in_the_last_layer], ids=["plain", "merged"])
def test_peft_alone_computes_the_logits_of_the_run(write_run, tmp_path, merged, pooling):
    """Oracle: the run's own model, on its frozen weights and what it merged into them; the ranks by construction."""
    written = write_run(merged, pooling=pooling)
    export_run("../run", "out")
    out = tmp_path / "elsewhere" / "out"
    np.testing.assert_allclose(torch_logits(out), of_the_run(written), atol=1e-4)
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["r"] == (RANK + 3 if merged else RANK)
    assert set(config["rank_pattern"].values()) == ({RANK} if merged else set())
    assert all(".1." in name for name in config["rank_pattern"])
    assert config["base_model_name_or_path"] == str(tmp_path / "bert")
    assert ("merged into the base" in (out / "README.md").read_text()) == bool(merged)


@pytest.mark.parametrize("form", ["peft", "merged"])
def test_an_export_holds_the_tokenizer_of_the_base_model(write_run, tmp_path, form):
    """Oracle: the ids that the base model's own tokenizer gives."""
    write_run(pooling="cls")
    (tmp_path / "bert" / "chat_template.jinja").write_text("{{ messages }}")
    export_run("../run", "out", form=form)
    ours, theirs = (transformers.AutoTokenizer.from_pretrained(folder) for folder in ("out", tmp_path / "bert"))
    assert ours("so good film")["input_ids"] == theirs("so good film")["input_ids"]
    assert ours.chat_template == theirs.chat_template == "{{ messages }}"


@pytest.mark.parametrize("merged", [None, low_rank], ids=["plain", "merged"])
def test_a_merged_folder_is_a_classifier_of_transformers(write_run, tmp_path, merged):
    """Oracle: the run's own model; the tokenizer and the labels by what the run had."""
    written = write_run(merged, pooling="cls")
    export_run("../run", "out", form="merged")
    model = transformers.AutoModelForSequenceClassification.from_pretrained("out")
    np.testing.assert_allclose(outputs(model, "logits"), of_the_run(written), atol=1e-4)
    assert model.config.id2label == dict(enumerate(LABELS))
    assert model.config.problem_type == "single_label_classification"
    ours, theirs = (load.load_tokenizer(str(folder)) for folder in ("out", tmp_path / "bert"))
    assert tokens.tokenizer_hash(ours) == tokens.tokenizer_hash(theirs)
    assert not (tmp_path / "elsewhere" / "out" / "head.safetensors").exists()


def test_a_merged_folder_has_the_head_beside_it_where_no_class_has_one(write_run, tmp_path):
    """Oracle: the run's own model, and the pooler of the base model, which the run did not need."""
    written = write_run(low_rank)
    export_run("../run", "out", form="merged")
    out = tmp_path / "elsewhere" / "out"
    logits = pooled_logits(transformers.AutoModel.from_pretrained(out), out)
    np.testing.assert_allclose(logits, of_the_run(written), atol=1e-4)
    theirs, ours = (load_file(folder / "model.safetensors") for folder in (tmp_path / "bert", out))
    assert theirs.keys() == ours.keys()
    np.testing.assert_array_equal(ours["pooler.dense.weight"], theirs["pooler.dense.weight"])


def test_a_large_model_is_written_in_shards(write_run, tmp_path, monkeypatch):
    """Oracle: the same model in one file."""
    write_run()
    export_run("../run", "one", form="merged")
    monkeypatch.setattr(exporting, "_SHARD_BYTES", 4_000)
    export_run("../run", "many", form="merged")
    assert len(list((tmp_path / "elsewhere" / "many").glob("model-*-of-*.safetensors"))) > 2
    one, many = (transformers.AutoModel.from_pretrained(name).state_dict() for name in ("one", "many"))
    assert all(torch.equal(one[name], many[name]) for name in one)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_a_client_s_own_adapters_are_exported_in_its_rank(write_run):
    """Oracle: the model with what client 1 keeps, in its one rank at the scale of all."""

    def kept(adapters):
        return {"b": {name: jnp.stack([f.b, 3 * f.b]) for name, f in adapters.modules.items()}}

    run, model, base, state = write_run(kept=kept, ranks=(2, 1), pooling="cls")
    export_run(run, run.parent / "out", client=1)
    modules = {name: Factors(a=f.a, b=3 * f.b) for name, f in state.adapters.modules.items()}
    own = Adapters(modules=modules, head=state.adapters.head)
    ours = model.apply(base, lora.effective(own, lora.rank_mask(1, MAX_RANK), ALPHA / RANK), BATCH)
    np.testing.assert_allclose(torch_logits(run.parent / "out"), ours, atol=1e-4)
    config = json.loads((run.parent / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (1, ALPHA / RANK)
    assert "0.8125" not in (run.parent / "out" / "README.md").read_text()  # the accuracy of the global ones
    for number in (-1, 2):
        with pytest.raises(ValueError, match=rf"--client must be from 0 to 1, the clients of .*, got {number}"):
            export_run(run, run.parent / "other", client=number)


def test_a_client_that_keeps_nothing_has_no_adapters_of_its_own(write_run):
    run, *_ = write_run()
    with pytest.raises(ValueError, match=r"--client must be absent for .*, whose clients keep nothing of their own"):
        export_run(run, run.parent / "out", client=0)


def test_an_unknown_format_is_refused(write_run):
    run, *_ = write_run()
    with pytest.raises(ValueError, match=r"--format must be one of peft, merged, got 'gguf'"):
        export_run(run, run.parent / "out", form="gguf")


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_parts_that_clients_keep_are_exported_as_their_mean(write_run):
    """Oracle: the model with the mean of two clients' own b and head, in the ranks that one of them still has."""

    def kept(adapters):
        def two(leaf):
            return jnp.stack([leaf, 3 * leaf])

        return {
            "b": {name: two(f.b) for name, f in adapters.modules.items()},
            "head": jax.tree.map(two, adapters.head),
        }

    run, model, base, state = write_run(kept=kept, ranks=(1, 1))
    export_run(run, run.parent / "out")
    modules = {name: Factors(a=f.a, b=2 * f.b) for name, f in state.adapters.modules.items()}
    mean = Adapters(modules=modules, head=jax.tree.map(lambda leaf: 2 * leaf, state.adapters.head))
    ours = model.apply(base, lora.effective(mean, lora.rank_mask(1, MAX_RANK), ALPHA / RANK), BATCH)
    np.testing.assert_allclose(torch_logits(run.parent / "out"), ours, atol=1e-4)


def test_the_export_names_the_label_of_each_column(write_run):
    """Oracle: the labels of data.json, and the accuracy that the log has for the round of the checkpoint."""
    run, *_ = write_run()
    export_run(run, run.parent / "out")
    head = json.loads((run.parent / "out" / "head.json").read_text())
    assert [head["id2label"][str(column)] for column in range(3)] == LABELS
    assert head["label2id"] == {label: column for column, label in enumerate(LABELS)}
    assert (head["pooling"], head["shapes"]) == ("mean", {"w": [12, 3], "b": [3]})
    card = (run.parent / "out" / "README.md").read_text()
    assert all(f'"{label}"' in card for label in LABELS) and "0.8125" in card and str(run.parent / "bert") in card
    assert "- uplink, bits: 35\n" in card and "- rounds: 5\n" in card


def scale_weights(run):
    path = run.parent / "bert" / "model.safetensors"
    save_file({name: 2 * value for name, value in load_file(path).items()}, path, {"format": "pt"})


def change_activation(run):
    path = run.parent / "bert" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden_act": "relu"}))


def change_alpha(run):
    path = run / "config.yaml"
    path.write_text(path.read_text().replace("alpha: 6.0", "alpha: 7.0"))


def copy_checkpoint(run):
    """Whole, and of another round than its name."""
    shutil.move(run / "checkpoints" / "5", run / "checkpoints" / "4")
    line = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    manifest = run / "checkpoints" / "4" / "sha256.json"
    held = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(held | {"log": hashlib.sha256("".join(line[:4]).encode()).hexdigest()}))


def cut_on_the_left(run):
    path = run.parent / "bert" / "tokenizer_config.json"
    held = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(held | {"truncation_side": "left"}))


def put(**changes):
    def change(run):
        held = sealed.read(run / "data.json")
        sealed.write(run / "data.json", {key: value for key, value in held.items() if key != "sha256"} | changes)

    return change


def truncate_checkpoint(run):
    for file in (run / "checkpoints" / "5" / "state" / "d").iterdir():
        file.write_bytes(file.read_bytes()[:50])


@pytest.mark.filterwarnings("ignore:checkpoint .* is damaged")
@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (scale_weights, ["model.pretrained", "weights", "base_hash", "bert"]),
        (change_activation, ["model.pretrained", "config.json", "model_config_hash"]),
        (cut_on_the_left, ["model.pretrained", "tokenizer", "tokenizer_hash"]),
        (put(class_names=None), ["class_names", "data.json", "a list of labels", "None"]),
        (put(class_names=["yes", "no"]), ["class_names", "3 labels", "['yes', 'no']"]),
        (lambda run: (run / "data.json").write_text("[1]"), ["data.json", "changed or damaged"]),
        (lambda run: (run / "data.json").unlink(), ["data.json", "folder of a run"]),
        (change_alpha, ["config.yaml", "as it was when the run was started"]),
        (copy_checkpoint, ["checkpoints/4", "of round 4, got round 5"]),
        (truncate_checkpoint, ["must hold a checkpoint", "none that is whole"]),
        (lambda run: shutil.rmtree(run / "checkpoints"), ["must hold a checkpoint"]),
        (lambda run: shutil.rmtree(run.parent / "bert"), ["model.pretrained", "folder that exists", "bert"]),
    ],
)
def test_what_is_missing_damaged_or_another_is_one_line_and_nothing_is_written(write_run, damage, expected):
    """The message names the field and what it got."""
    run, *_ = write_run()
    damage(run)
    with pytest.raises(ValueError) as caught:
        export_run(run, run.parent / "out")
    assert "\n" not in str(caught.value) and all(part in str(caught.value) for part in expected), caught.value
    assert not (run.parent / "out").exists()


def test_adapters_that_are_not_finite_are_refused(write_run):
    run, *_ = write_run(
        kept=lambda adapters: {"head": {n: jnp.full((2, *x.shape), jnp.nan) for n, x in adapters.head.items()}}
    )
    with pytest.raises(ValueError, match=r"must have trained finite adapters, .* in round 5"):
        export_run(run, run.parent / "out")
