"""Exports of each family and task, read back by PyTorch: a class of transformers where there is one."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from fedjax_lora.adapters import lora
from fedjax_lora.adapters.layer_ranks import structural_rank
from fedjax_lora.app.export import export
from oracles import tiny_models
from oracles.trained_run import ALPHA, RANK, outputs_of, trained_run

peft = pytest.importorskip("peft")
torch = pytest.importorskip("torch")

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # raised inside PEFT

LABELS = ("a", "b", "c", "d", "e")
DECODERS = "llama", "mistral", "qwen2", "qwen3", "gemma"
AUTO = {
    "SEQ_CLS": ("AutoPeftModelForSequenceClassification", "AutoModelForSequenceClassification"),
    "TOKEN_CLS": ("AutoPeftModelForTokenClassification", "AutoModelForTokenClassification"),
    "CAUSAL_LM": ("AutoPeftModelForCausalLM", "AutoModelForCausalLM"),
    None: ("AutoPeftModel", "AutoModelForImageClassification"),
}
CASES = [
    ("bert", "classification", "cls"),
    ("bert", "regression", "cls"),
    *((name, "token_classification", "mean") for name in ("bert", "roberta", "xlm-roberta", "camembert", "distilbert")),
    ("vit", "classification", "cls"),
    ("deit", "classification", "cls"),
    *((name, "classification", "last") for name in ("gpt2", *DECODERS)),
    ("gpt2", "token_classification", "mean"),
    ("llama", "token_classification", "mean"),
    *((name, "causal_lm", "mean") for name in ("gpt2", "llama", "qwen3")),
]


def save(folder, name, task):
    """A model with random weights, whose language model's head is there where the task needs it."""
    config = tiny_models.CONFIGS[name]
    auto = transformers.AutoModelForCausalLM if task == "causal_lm" else transformers.AutoModel
    torch.manual_seed(0)
    tiny_models.save(folder, auto.from_config(config))


def batch_of(shape):
    if shape.image_shape is None:
        found = tiny_models.text_batch(padding=1 if hasattr(shape, "first_position") else 0)
        return found | {
            "input_ids": np.where(found["attention_mask"], np.maximum(found["input_ids"], 4), found["input_ids"])
        }
    return {"image": np.random.default_rng(0).random((2, *shape.image_shape), np.float32)}


def products(modules):
    """What a server may have merged: nothing in the first layer, and a product of rank 2 in the second."""
    draw = np.random.default_rng(2)
    found = {name: np.zeros((2, f.a.shape[1], f.b.shape[2]), np.float32) for name, f in modules.items()}
    for product in found.values():
        product[1] = 0.2 * draw.normal(size=(product.shape[1], 2)) @ draw.normal(size=(2, product.shape[2]))
    return found


def trained(folder, name, task, pooling, merges=False):
    """A run of such a model, whose server has merged something or nothing; a batch and its outputs."""
    save(folder / "base", name, task)
    run, model = trained_run(folder, task, pooling, LABELS)
    merged = products(run.adapters.modules) if merges else {}
    whole = lora.add_to_base(run.base, jax.tree.map(jnp.asarray, merged), model.sites)
    batch = batch_of(run.found.shape)
    return run._replace(merged=merged), batch, outputs_of(run._replace(base=whole), model, batch)


def logits_of(model, batch):
    names = {"image": "pixel_values"}
    inputs = {names.get(name, name): torch.tensor(leaf) for name, leaf in batch.items()}
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].permute(0, 3, 1, 2)
    with torch.no_grad():
        return model.eval()(**inputs).logits.numpy()


@pytest.mark.parametrize(("name", "task", "pooling"), CASES, ids=["-".join(case) for case in CASES])
def test_pytorch_computes_the_outputs_of_the_run(tmp_path, name, task, pooling):
    """Oracle: our own model of the same folder, adapters and head; at real positions where there is one for each."""
    run, batch, ours = trained(tmp_path, name, task, pooling)
    for form in ("peft", "merged"):
        export(run, tmp_path / form, form)
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    with_adapters, merged = AUTO[config["task_type"]]
    labels = {} if task == "causal_lm" else {"num_labels": 1 if task == "regression" else len(LABELS)}
    loaded = getattr(peft, with_adapters).from_pretrained(tmp_path / "peft", **labels)
    whole = getattr(transformers, merged).from_pretrained(tmp_path / "merged")
    assert config["fan_in_fan_out"] == (name == "gpt2")
    assert whole.config.architectures == [type(whole).__name__]
    kept = batch["attention_mask"] > 0 if task in ("token_classification", "causal_lm") else slice(None)
    ours = np.asarray(ours)[kept]
    for model in (loaded, whole):
        np.testing.assert_allclose(logits_of(model, batch)[kept].reshape(ours.shape), ours, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_layers_of_different_ranks_are_those_of_the_run(tmp_path, name):
    """Oracle: our own model, whose server has merged products into the second layer; PEFT has a rank for each."""
    run, batch, ours = trained(tmp_path, name, "classification", "last", merges=True)
    (tmp_path / "base" / "chat_template.jinja").write_text("{{ messages }}")
    for form in ("peft", "merged"):
        export(run, tmp_path / form, form)
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["r"] == RANK + 2 and set(config["rank_pattern"].values()) == {RANK}
    assert (tmp_path / "merged" / "chat_template.jinja").read_text() == "{{ messages }}"
    loaded = peft.AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "peft", num_labels=len(LABELS))
    whole = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    for model in (loaded, whole):
        np.testing.assert_allclose(logits_of(model, batch), ours, rtol=0, atol=1e-4)


PATTERNED = {
    "bert": ("cls", ("layer.0.attention.self.query", ".*1.output.dense"), (("query", 0), ("down", 1))),
    "llama": ("last", ("0.self_attn.q_proj", "layers.1.mlp.down_proj"), (("q_proj", 0), ("down_proj", 1))),
}


@pytest.mark.parametrize("name", PATTERNED)
def test_ranks_by_patterns_are_those_of_the_run(tmp_path, name):
    """Oracle: our own model, with the rank and alpha of two modules set by hand; PEFT has them by its patterns."""
    pooling, (first, second), (one, two) = PATTERNED[name]
    save(tmp_path / "base", name, "classification")
    patterns = f"rank_pattern: {{{first}: 1, '{second}': 4}}, alpha_pattern: {{{first}: 2.5}}"
    settings = f"lora={{targets: [all-linear], {patterns}}}"
    run, model = trained_run(tmp_path, "classification", pooling, LABELS, settings)
    run = run._replace(rank=int(structural_rank(run.layers, RANK)))
    batch = batch_of(run.found.shape)
    ours = outputs_of(run, model, batch, {one: (1, 2.5), two: (4, ALPHA)})
    for form in ("peft", "merged"):
        export(run, tmp_path / form, form)
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    ranks = [1, *[RANK] * (2 * len(run.adapters.modules) - 2)]
    assert config["r"] == 4 and sorted(config["rank_pattern"].values()) == ranks
    assert list(config["alpha_pattern"].values()) == [2.5]
    loaded = peft.AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "peft", num_labels=len(LABELS))
    whole = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    for model in (loaded, whole):
        np.testing.assert_allclose(logits_of(model, batch), ours, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["roberta", "distilbert", "gpt2", "qwen2", "vit"])
def test_a_head_that_no_class_has_lies_beside_the_model(tmp_path, name):
    """Oracle: our own model; the head is applied to the mean of PyTorch's last hidden state, in NumPy."""
    run, batch, ours = trained(tmp_path, name, "classification", "mean")
    for form in ("peft", "merged"):
        export(run, tmp_path / form, form)
    loaded = peft.AutoPeftModelForFeatureExtraction.from_pretrained(tmp_path / "peft")
    whole = transformers.AutoModel.from_pretrained(tmp_path / "merged")
    names = {"image": "pixel_values"}
    inputs = {names.get(key, key): torch.tensor(leaf) for key, leaf in batch.items()}
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].permute(0, 3, 1, 2)
    mask = batch.get("attention_mask", np.ones((2, 7)))[:, :, None]
    for model in (loaded, whole):
        with torch.no_grad():
            hidden = model.eval()(**inputs).last_hidden_state.numpy()
        pooled, head = (hidden * mask).sum(1) / mask.sum(1), run.adapters.head
        np.testing.assert_allclose(pooled @ head["w"] + head["b"], ours, rtol=0, atol=1e-4)
