"""Exported adapters, read back by PEFT on the PyTorch model."""

import jax
import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file

from fedjax_lora.adapters import lora
from fedjax_lora.core.learning import Site
from fedjax_lora.core.types import Adapters, Factors
from fedjax_lora.io.model_card import Card
from fedjax_lora.io.peft import LowRank, export, plain
from fedjax_lora.models import load
from oracles.model_context import model_context

peft = pytest.importorskip("peft")
torch = pytest.importorskip("torch")


ONE = LowRank({"up": [(np.ones((2, 1), np.float32), np.ones((1, 3), np.float32))]}, 1.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small random BERT whose perceptron is not square."""
    path = tmp_path_factory.mktemp("bert")
    shape = transformers.BertConfig(
        vocab_size=40, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40
    )
    transformers.BertModel(shape, add_pooling_layer=False).save_pretrained(path)
    return path


def card(base_model):
    return Card(base_model, "", ["a", "b", "c"], pooling="mean", pooler=False, head_class=None, facts={})


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # raised inside PEFT
@pytest.mark.parametrize("targets", [("query", "up"), ("down",)])
def test_peft_computes_with_exported_adapters_what_the_model_does(folder, tmp_path, targets):
    model, base = load.build_model(load.ModelConfig(pretrained=str(folder)), model_context(3))
    max_rank, rank, alpha = 5, 3, 6.0
    modules = lora.init(jax.random.key(1), {name: model.sites[name] for name in targets}, 2, max_rank)
    modules = {
        name: Factors(a=f.a, b=0.3 * jax.random.normal(jax.random.key(2), f.b.shape)) for name, f in modules.items()
    }
    adapters = Adapters(modules=modules, head=model.init_head(jax.random.key(3)))
    low_rank = plain(adapters, rank, alpha / rank)
    export(tmp_path / "out", folder, low_rank, jax.device_get(adapters.head), model.sites, card(str(folder)))

    ids = np.arange(12).reshape(2, 6) % 40
    batch = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    used = lora.effective(adapters, lora.rank_mask(rank, max_rank), alpha / rank)
    ours = model.layers(base, used, model.embed(base, batch, None), None).values

    encoder = transformers.BertModel.from_pretrained(folder, add_pooling_layer=False)
    theirs = peft.PeftModel.from_pretrained(encoder, tmp_path / "out").eval()
    with torch.no_grad():
        expected = theirs(**{name: torch.tensor(value) for name, value in batch.items()}).last_hidden_state
    np.testing.assert_allclose(ours, expected.numpy(), atol=2e-5)
    head = load_file(tmp_path / "out" / "head.safetensors")
    np.testing.assert_array_equal(head["w"], adapters.head["w"])


def test_a_folder_in_use_is_refused_by_name(tmp_path):
    (tmp_path / "kept").write_text("mine")
    with pytest.raises(ValueError, match="must be a new or an empty folder"):
        export(tmp_path, tmp_path, ONE, {}, {"up": Site("up", 0, 2, 3, "up")}, card("base"))


def test_a_module_without_a_name_in_the_base_model_is_refused(tmp_path):
    for sites in ({}, {"up": Site("up", 0, 2, 3)}):
        with pytest.raises(ValueError, match=r"adapters must be of modules of the base model .*, got 'up'"):
            export(tmp_path / "out", tmp_path, ONE, {}, sites, card("base"))
    assert not (tmp_path / "out").exists()
