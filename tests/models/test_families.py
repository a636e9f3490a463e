"""Families of text models against PyTorch, their packed batches, and what each refuses."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from fedjax_lora.adapters import lora
from fedjax_lora.core.methods import Method
from fedjax_lora.core.numbers import Options
from fedjax_lora.core.types import IGNORED, Adapters, Factors
from fedjax_lora.data import packing
from fedjax_lora.models import load
from fedjax_lora.models.families import FAMILIES
from fedjax_lora.tasks import causal_lm, positions
from fedjax_lora.testing import laws, models
from oracles import tiny_models
from oracles.model_context import model_context

TEXT = ("roberta", "xlm-roberta", "distilbert", "gpt2")


@pytest.mark.parametrize("name", TEXT)
def test_last_hidden_states_against_pytorch(name, tmp_path):
    torch = pytest.importorskip("torch")
    config = tiny_models.CONFIGS[name]
    reference = tiny_models.save(tmp_path, transformers.AutoModel.from_config(config))
    batch = tiny_models.text_batch(config.pad_token_id)
    with torch.no_grad():
        expected = reference(**{name: torch.tensor(leaf) for name, leaf in batch.items()}).last_hidden_state.numpy()
    got = tiny_models.outputs(tmp_path, batch)["hidden"]
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(got, expected, atol=1e-4, rtol=0)


def test_roberta_with_a_pooler_against_pytorch(tmp_path):
    """From a model with a head, whose names have a prefix."""
    torch = pytest.importorskip("torch")
    config = tiny_models.CONFIGS["camembert"]
    reference = tiny_models.save(tmp_path, transformers.CamembertForMultipleChoice(config)).roberta
    batch = tiny_models.text_batch(config.pad_token_id)
    with torch.no_grad():
        expected = reference(**{name: torch.tensor(leaf) for name, leaf in batch.items()}).pooler_output.numpy()
    got = tiny_models.outputs(tmp_path, batch, pooling="cls")["pooled"]
    np.testing.assert_allclose(got, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("name", "dtype"), [("gpt2", "float32"), ("llama", "bfloat16")])
def test_gradients_of_a_language_model_by_logits_of_some_positions_at_a_time(name, dtype, monkeypatch):
    """Oracle: those by all logits at once, of the words' own table and of another."""
    context, family = model_context(2), FAMILIES[name]
    task, adapter = causal_lm.make(causal_lm.CausalLmOptions(), context), context.made["adapter"]
    own = {"lm_head": True} if family.logits else {}
    model = family.make(family.shape(tiny_models.CONFIGS[name].to_dict(), compute_dtype=dtype, **own), task, adapter)
    base, ids = model.init(jax.random.key(0)), tiny_models.text_batch()["input_ids"]
    batch = tiny_models.text_batch() | {"target": np.where(ids[:, 1:], ids[:, 1:], IGNORED)}
    batch["target"] = np.pad(batch["target"], ((0, 0), (0, 1)), constant_values=IGNORED)
    modules = lora.init(jax.random.key(1), model.sites, model.num_layers, 2)
    modules = {site: Factors(a=f.a, b=0.3 * jnp.ones(f.b.shape)) for site, f in modules.items()}

    def gradients(held):
        monkeypatch.setattr(positions, "HELD", held)

        def loss(modules):
            return task.loss(model.apply(base, Adapters(modules=modules, head={}), batch), batch, jnp.ones(3))

        return jax.jit(jax.value_and_grad(loss))(modules)

    whole, some = gradients(2**24), gradients(7 * tiny_models.VOCABULARY)
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(whole[1])) > 1e-3
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), some, whole)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TinyOptions(Options):
    """A small model of text."""

    name: Literal["tiny"] = "tiny"


@pytest.mark.parametrize("name", ["roberta", "gpt2"])
def test_packed_hidden_states_are_those_of_rows_of_their_own(name):
    """Invariance, with a token of padding in the middle of a sentence, which RoBERTa does not count."""
    family, made = FAMILIES[name], model_context(2).made
    config = tiny_models.CONFIGS[name]
    model = family.make(family.shape(config.to_dict()), tiny_models.everything(), made["adapter"])
    batch = {key: jnp.asarray(leaf) for key, leaf in tiny_models.text_batch(config.pad_token_id).items()}

    @jax.jit
    def both():
        base, none = model.init(jax.random.key(0)), Adapters(modules={}, head={})
        packed = packing.pack(batch, batch["attention_mask"] > 0, 2, 12)
        return packed, [model.apply(base, none, given)["hidden"] for given in (packed, batch)]

    packed, (values, apart) = jax.tree.map(np.asarray, both())
    places = np.nonzero(packed["attention_mask"])
    example, position = packed["example_ids"][places], packed["position_ids"][places]
    assert sorted(zip(example, position, strict=True)) == list(zip(*np.nonzero(batch["attention_mask"]), strict=True))
    np.testing.assert_allclose(values[places], apart[example, position], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "ours"), [("roberta", {}), ("gpt2", {"pooling": "last", "dropout": 0.3})], ids=["roberta", "gpt2"]
)
def test_packed_batches_keep_their_law(name, ours):
    """The law is the oracle; `<pad>` is among the tokens of its sentences."""
    family = FAMILIES[name]

    def make(options, context):
        shape = family.shape(tiny_models.CONFIGS[name].to_dict(), **ours)
        return family.make(shape, context.made["task"], context.made["adapter"])

    method = Method("model", "tiny", TinyOptions, make)
    models.packed_batches_give_the_same_outputs(laws.Subject(method, TinyOptions(), models.context()))


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("roberta", {"position_embedding_type": "relative_key"}, "position_embedding_type must be 'absolute', got .*"),
        ("roberta", {"is_decoder": True}, "is_decoder must be false, got True"),
        ("roberta", {"add_cross_attention": True}, "add_cross_attention must be false, got True"),
        ("roberta", {"pad_token_id": -1}, "pad_token_id must be an integer of at least 0, got -1"),
        ("roberta", {"pad_token_id": None}, "pad_token_id must be an integer of at least 0, got None"),
        ("roberta", {"max_position_embeddings": 2}, "max_position_embeddings must be above 2, got 2"),
        ("roberta", {"hidden_act": "gelu_fast"}, "hidden_act must be one of gelu, .*, got 'gelu_fast'"),
        ("distilbert", {"n_heads": 5}, "n_heads must divide width = 768, got 5"),
        ("distilbert", {"dim": 0}, "dim must be an integer from 1 to .*, got 0"),
        ("distilbert", {"hidden_dim": "20"}, "hidden_dim must be an integer from 1 to .*, got '20'"),
        ("distilbert", {"activation": "swish"}, "activation must be one of gelu, .*, got 'swish'"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights must be true, got False"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx must be false, got True"),
        ("gpt2", {"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn must be false, got True"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention must be false, got True"),
        ("gpt2", {"tie_word_embeddings": False}, "tie_word_embeddings must be true, got False"),
        ("gpt2", {"n_inner": "40"}, "n_inner must be an integer from 1 to .*, got '40'"),
        ("gpt2", {"n_embd": None}, "n_embd must be an integer from 1 to .*, got None"),
        ("gpt2", {"n_head": 7}, "n_head must divide width = 768, got 7"),
        ("gpt2", {"activation_function": "quick_gelu"}, "activation_function must be one of .*, got 'quick_gelu'"),
        ("gpt2", {"layer_norm_epsilon": 0}, "layer_norm_epsilon must be a number above 0 and below 1, got 0"),
        ("vit", {"qkv_bias": "no"}, "qkv_bias must be true or false, got 'no'"),
        ("vit", {"patch_size": [2, 4]}, r"patch_size must be of squares, got \[2, 4\]"),
        ("vit", {"image_size": [8, 8, 3]}, r"image_size must be a number or a height and a width, got \[8, 8, 3\]"),
        ("vit", {"image_size": "224"}, "image_size must be an integer from 1 to .*, got '224'"),
        ("vit", {"image_size": [32, 30]}, "image sides must be multiples of 16, got 32 x 30"),
        ("deit", {"num_channels": 0}, "num_channels must be an integer from 1 to .*, got 0"),
        ("deit", {"num_attention_heads": 7}, "num_attention_heads must divide hidden = 768, got 7"),
        ("deit", {"hidden_act": "tanh"}, "hidden_act must be one of gelu, .*, got 'tanh'"),
    ],
)
def test_variants_that_are_not_computed_are_refused_by_name(name, fields, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        FAMILIES[name].shape(fields)


ENCODERS = "bert", "roberta", "xlm-roberta", "camembert", "distilbert", "gpt2", "vit", "deit"


@pytest.mark.parametrize("name", ENCODERS)
def test_what_the_configuration_leaves_out_is_that_of_hugging_face(name):
    """Oracle: the defaults that its own class writes out."""
    family = FAMILIES[name]
    assert family.shape({}) == family.shape(type(tiny_models.CONFIGS[name])().to_dict())


@pytest.mark.parametrize(("name", "most"), [("roberta", 14), ("distilbert", 16), ("gpt2", 16)])
def test_too_long_a_sequence_is_refused(name, most):
    """RoBERTa's table has rows for padding and for none before it."""
    family, context = FAMILIES[name], model_context(2)
    model = family.make(family.shape(tiny_models.CONFIGS[name].to_dict()), *context.made.values())
    batch = {key: np.ones((1, most + 1), np.int32) for key in ("input_ids", "attention_mask")}
    with pytest.raises(ValueError, match=rf"data\.max_length must be at most {most}, .*, got {most + 1}"):
        jax.eval_shape(model.embed, jax.eval_shape(model.init, jax.random.key(0)), batch, None)


def test_gpt2_in_a_folder_is_refused_by_name(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "scale_attn_weights": false}')
    with pytest.raises(ValueError, match=r"a config.json of GPT-2, got .* where scale_attn_weights must be true"):
        load.read_shape(str(tmp_path))
