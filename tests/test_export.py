"""Exports of a run's folder, which is all that is left of the run: no data, no simulation, another directory."""

import hashlib
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fedjax_lora.adapters import lora
from fedjax_lora.app.export import export_run
from fedjax_lora.config.assemble import hash_weights
from fedjax_lora.config.experiment import dump, load_config
from fedjax_lora.core.types import Adapters, ClientState, Factors, FedState
from fedjax_lora.data import tokens
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

    def write(merged=None, kept=None, rank=RANK):
        config = load_config(
            None,
            [
                f"model.pretrained={base_model}",
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
            clients=ClientState(rank=jnp.full(2, float(rank)), personal=personal, methods={"sparsifier": ()}),
        )
        data = {
            "base_hash": hash_weights(base),
            "model_config_hash": load.model_config_hash(config.model),
            "tokenizer_hash": tokens.tokenizer_hash(load.load_tokenizer(str(base_model))),
            "class_names": LABELS,
        }
        run = RunFolder.create(tmp_path / "run", dump(config), data)
        measured = dict.fromkeys(FIELDS, 0) | {"eval_accuracy": 0.8125, "tail_energy": [0.0]}
        lines = [measured | {"round": number} for number in range(1, 6)]
        (run.path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        run.save(state)
        return run.path, model, base, state

    return write


def torch_logits(folder):
    """Of PyTorch and PEFT, which know the exported folder alone."""
    encoder = peft.AutoPeftModelForFeatureExtraction.from_pretrained(folder).eval()
    with torch.no_grad():
        hidden = encoder(**{name: torch.tensor(value) for name, value in BATCH.items()}).last_hidden_state.numpy()
    mask, head = BATCH["attention_mask"][:, :, None], load_file(folder / "head.safetensors")
    return (hidden * mask).sum(1) / mask.sum(1) @ head["w"] + head["b"]


def low_rank(modules, rank=3):
    """What a server may have merged: a product of `rank` for each layer."""
    draw = {name: jax.random.normal(jax.random.key(4), (2, f.a.shape[1], rank)) for name, f in modules.items()}
    return {
        name: jnp.einsum(
            "lir,lro->lio", draw[name], 0.1 * jax.random.normal(jax.random.key(5), (2, rank, f.b.shape[2]))
        )
        for name, f in modules.items()
    }


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # raised inside PEFT
@pytest.mark.parametrize("merged", [None, low_rank], ids=["plain", "merged"])
def test_peft_alone_computes_the_logits_of_the_run(write_run, tmp_path, merged):
    """Oracle: the run's own model, on its frozen weights and what it merged into them; the rank by its construction."""
    _, model, base, state = write_run(merged)
    export_run("../run", "out")
    out = tmp_path / "elsewhere" / "out"
    used = lora.effective(state.adapters, lora.rank_mask(RANK, MAX_RANK), ALPHA / RANK)
    ours = model.apply(lora.add_to_base(base, state.merged, model.sites), used, BATCH)
    np.testing.assert_allclose(torch_logits(out), ours, atol=1e-4)
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["r"] == (RANK + 3 if merged else RANK)
    assert config["base_model_name_or_path"] == str(tmp_path / "bert")


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

    run, model, base, state = write_run(kept=kept, rank=1)
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
        (put(class_names=None), ["class_names", "data.json", "3 labels", "None"]),
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
    with pytest.raises(ValueError, match=r"must have trained finite adapters .* in round 5"):
        export_run(run, run.parent / "out")
