"""Decoders of the Llama family, against PyTorch, against PEFT, and against themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file, save_file

from fedjax_lora.adapters import lora
from fedjax_lora.core.types import Adapters, Factors
from fedjax_lora.models import llama, load, rope, table
from fedjax_lora.models.families import FAMILIES
from fedjax_lora.tasks.classification import cross_entropy
from fedjax_lora.training import split
from oracles.model_context import model_context

torch = pytest.importorskip("torch")

SHAPE = {
    "vocab_size": 31,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 6,
    "intermediate_size": 34,
    "max_position_embeddings": 16,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
"""Three heads of queries share one of keys and values, and are narrower together than the model."""

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 3.0,
    "original_max_position_embeddings": 12,
}
FOUR_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": None}

VARIANTS = {
    "llama": ("Llama", {}),
    "llama-3": ("Llama", FOUR_HEADS | {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": None}),
    "mistral": ("Mistral", {"sliding_window": None, "rope_parameters": {"rope_type": "default", "rope_theta": 50.0}}),
    "qwen2": ("Qwen2", {"rope_parameters": {"rope_type": "linear", "rope_theta": 50.0, "factor": 2.0}}),
    "qwen3": ("Qwen3", {"tie_word_embeddings": True, "attention_bias": True}),
    "gemma": ("Gemma", {"attention_bias": True}),
}
"""Name -> the class of transformers and what differs from SHAPE."""

RANK, ALPHA = 3, 6.0
LENGTHS = np.array([10, 4, 7])
BATCH = {
    "input_ids": np.random.default_rng(0).integers(1, 31, (3, 10)) * (np.arange(10) < LENGTHS[:, None]),
    "attention_mask": (np.arange(10) < LENGTHS[:, None]).astype(np.int64),
    "label": np.array([0, 1, 1]),
}
REAL = BATCH["attention_mask"] > 0


def reference(variant, head="ForCausalLM"):
    """A model of transformers whose biases and norms are not the 0 and 1 that they start from."""
    family, more = VARIANTS[variant]
    torch.manual_seed(0)
    model = getattr(transformers, family + head)(getattr(transformers, f"{family}Config")(**SHAPE | more)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape))
    return model


def build(folder, **options):
    return load.build_model(load.ModelConfig(pretrained=str(folder), **options), model_context(2))


def found_features(folder, **options):
    """Values and logits `[B, S, ...]` of a folder."""
    config = load.ModelConfig(pretrained=str(folder), **options)
    found = load.read_pretrained(config, str(folder), "next_token")
    made = model_context(2).made

    def read(head, features):
        return features.hidden.values, None if features.logits is None else features.logits()

    model = found.family.make(found.shape, made["task"]._replace(read=read), made["adapter"])
    return jax.jit(model.apply)(found.weights(), Adapters(modules={}, head={}), BATCH)


def torch_features(model):
    with torch.no_grad():
        found = model(
            torch.tensor(BATCH["input_ids"]),
            attention_mask=torch.tensor(BATCH["attention_mask"]),
            output_hidden_states=True,
        )
    return found.hidden_states[-1].numpy(), found.logits.numpy()


@pytest.mark.parametrize("variant", VARIANTS)
def test_hidden_states_and_logits_against_pytorch(variant, tmp_path):
    model = reference(variant)
    model.save_pretrained(tmp_path)
    for found, expected in zip(found_features(tmp_path), torch_features(model), strict=True):
        assert np.abs(expected).max() > 1
        np.testing.assert_allclose(found[REAL], expected[REAL], atol=1e-4, rtol=1e-4)


def test_shards_against_pytorch(tmp_path):
    model = reference("llama")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1 and not (tmp_path / "model.safetensors").exists()
    for found, expected in zip(found_features(tmp_path), torch_features(model), strict=True):
        np.testing.assert_allclose(found[REAL], expected[REAL], atol=1e-4, rtol=1e-4)


def test_a_head_lies_outside_of_the_prefix_and_is_read_where_it_is_used(tmp_path):
    """Oracle: what the files hold."""
    reference("llama", "Model").save_pretrained(tmp_path / "bare")
    reference("llama", "ForSequenceClassification").save_pretrained(tmp_path / "classifier")
    for name in ("bare", "classifier"):
        assert found_features(tmp_path / name)[1] is None
    for variant, (tied, kept) in {"llama": (False, True), "qwen3": (True, False)}.items():
        reference(variant).save_pretrained(tmp_path / variant)
        file = tmp_path / variant / "model.safetensors"
        tensors = load_file(file)
        assert tied != ("lm_head.weight" in tensors)
        more = {"lm_head.weight": tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"])}
        save_file(tensors | more | {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(3, np.float32)}, file)
        assert "lm_head" not in build(tmp_path / variant)[1]  # of a classifier
        found = load.read_pretrained(load.ModelConfig(), str(tmp_path / variant), "next_token")
        base = found.weights()
        np.testing.assert_array_equal(base["embeddings"]["word"], tensors["model.embed_tokens.weight"])
        assert ("lm_head" in base) == kept
        if kept:
            np.testing.assert_array_equal(base["lm_head"], tensors["lm_head.weight"])
    save_file(tensors | {"model.norm.bias": np.ones(24, np.float32)}, file)
    with pytest.raises(ValueError, match=r"has unexpected 1 tensors: model.norm.bias$"):
        build(tmp_path / "qwen3")


@pytest.mark.parametrize("variant", ["llama", "gemma"])
def test_tensors_of_the_base_are_those_of_the_checkpoint_round_trip(variant, tmp_path):
    reference(variant).save_pretrained(tmp_path)
    found = load.read_pretrained(load.ModelConfig(), str(tmp_path), "next_token")
    tensors = table.tensors(found.family.weights(found.shape), found.weights())
    expected = {name.removeprefix("model."): value for name, value in load_file(tmp_path / "model.safetensors").items()}
    assert tensors.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(tensors[name], value, rtol=0, atol=2e-7)  # a scale less 1 is rounded


# ------------------------------------------------------------------------------------- adapters, against PEFT


def random_adapters(model):
    random = np.random.default_rng(1)

    def normal(*shape):
        return jnp.asarray(0.1 * random.normal(size=shape), jnp.float32)

    modules = {
        name: Factors(a=normal(2, site.n_in, RANK), b=normal(2, RANK, site.n_out)) for name, site in model.sites.items()
    }
    return Adapters(modules=modules, head={"w": normal(24, 2)})


def value_and_gradient(model, base, adapters):
    def loss(adapters):
        effective = lora.effective(adapters, lora.rank_mask(RANK, RANK), ALPHA / RANK)
        return cross_entropy(model.apply(base, effective, BATCH), BATCH["label"], jnp.ones(3))

    return jax.jit(jax.value_and_grad(loss))(adapters)


def near(found, expected, tolerance=1e-4):
    """To the tolerance, of the largest value of each leaf."""
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * np.abs(y).max()), found, expected
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A Llama with a head on the last position: folder, model, weights, adapters, and their loss and gradients."""
    folder = tmp_path_factory.mktemp("llama")
    reference("llama", "ForSequenceClassification").save_pretrained(folder)
    model, base = build(folder, pooling="last")
    assert model.init_head(jax.random.key(0)).keys() == {"w"}
    adapters = random_adapters(model)
    return folder, model, base, adapters, value_and_gradient(model, base, adapters)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # raised inside PEFT
def test_loss_and_gradients_of_a_classifier_against_peft(trained):
    """LlamaForSequenceClassification, with adapters on all linear layers."""
    peft = pytest.importorskip("peft")
    folder, model, _, adapters, found = trained
    whole = transformers.LlamaForSequenceClassification.from_pretrained(folder)
    config = peft.LoraConfig(
        task_type="SEQ_CLS", r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules="all-linear"
    )
    whole = peft.get_peft_model(whole, config).eval()
    parameters = dict(whole.named_parameters())

    def theirs(site, side, layer):
        source = model.sites[site].source.format(layer=layer)
        return parameters[f"base_model.model.model.{source}.lora_{side}.default.weight"]

    def gradient(site, side):
        return np.stack([theirs(site, side, layer).grad.numpy().T for layer in range(2)])

    head = parameters["base_model.model.score.modules_to_save.default.weight"]
    with torch.no_grad():
        for site, factors in adapters.modules.items():
            for side, leaf in (("A", factors.a), ("B", factors.b)):
                for layer in range(2):
                    theirs(site, side, layer).copy_(torch.tensor(np.asarray(leaf[layer]).T))
        head.copy_(torch.tensor(np.asarray(adapters.head["w"]).T))
    assert sum(parameter.requires_grad for parameter in parameters.values()) == 2 * 2 * 7 + 1
    inputs = {name: torch.tensor(BATCH[name]) for name in ("input_ids", "attention_mask")}
    loss = whole(**inputs, labels=torch.tensor(BATCH["label"])).loss
    loss.backward()
    modules = {site: Factors(a=gradient(site, "A"), b=gradient(site, "B")) for site in adapters.modules}
    near(found, (loss.item(), Adapters(modules=modules, head={"w": head.grad.numpy().T})))


def test_layers_that_are_computed_again_give_the_same_gradient_invariance(trained):
    folder, model, base, adapters, expected = trained
    again, _ = build(folder, pooling="last", remat=True)
    near(value_and_gradient(again, base, adapters), expected, 1e-5)

    def program(model):
        return str(jax.make_jaxpr(jax.grad(lambda adapters: model.apply(base, adapters, BATCH).sum()))(adapters))

    assert "remat" in program(again) and "remat" not in program(model)


def test_a_cut_between_layers_changes_nothing_oracle_the_whole_model(trained):
    _, model, base, adapters, expected = trained
    cut = split.cut_model(split.SplitOptions(device_layers=1), model)
    near(value_and_gradient(cut, base, adapters), expected, 1e-5)


@pytest.mark.parametrize("between", ["float32", "bfloat16"])
def test_bfloat16_is_near_float32(trained, between):
    folder, _, _, adapters, expected = trained
    low, base = build(folder, pooling="last", compute_dtype="bfloat16", activation_dtype=between)
    assert {base["embeddings"]["word"].dtype, base["layers"]["down"]["w"].dtype} == {jnp.dtype("bfloat16")}
    assert base["norm"]["scale"].dtype == jnp.float32
    for x, y in zip(jax.tree.leaves(value_and_gradient(low, base, adapters)), jax.tree.leaves(expected), strict=True):
        assert x.dtype == y.dtype == jnp.float32
        assert 0 < jnp.linalg.norm(x - y) < 0.1 * jnp.linalg.norm(y)


# ----------------------------------------------------------------------------------------- what a config says


LLAMA_31 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
ROPES = {
    "default": {"rope_theta": 1e6},
    "linear": {"rope_theta": 10000, "rope_scaling": {"type": "linear", "factor": 2.5}},
    "llama3": {"rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", **LLAMA_31}},
    "in one": {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, **LLAMA_31}},
}


@pytest.mark.parametrize("name", ROPES)
def test_frequencies_of_older_and_newer_settings_against_transformers(name):
    """At the size of Llama 3.1, where some waves are short, some long, and some between."""
    config = transformers.LlamaConfig(max_position_embeddings=131072, head_dim=128, **ROPES[name])
    module = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
    found = rope.frequencies(rope.read_rope(ROPES[name]), 128)
    np.testing.assert_allclose(found, module.inv_freq.numpy(), rtol=2e-6)


def test_shapes_without_a_field_are_those_of_transformers():
    """Oracle: the defaults of its configurations."""
    for name in ("llama", "mistral", "qwen2", "qwen3", "gemma"):
        config = transformers.AutoConfig.for_model(name)
        shape = FAMILIES[name].shape({"sliding_window": None} if name == "mistral" else {})
        for ours, theirs in llama.NAMES.items():
            if (expected := getattr(config, theirs, None)) is not None and ours not in ("head_dim", "num_kv_heads"):
                assert getattr(shape, ours) == expected, (name, ours)
        assert shape.kv_heads == config.num_key_value_heads
        expected = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        assert shape.head_width == expected
        assert shape.rope.rope_theta == config.rope_parameters["rope_theta"]


def rope_of(**fields):
    return {"rope_parameters": {"rope_theta": 10000.0, **fields}}


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("llama", {"pretraining_tp": 2}, "pretraining_tp must be 1, got 2"),
        ("llama", {"num_key_value_heads": 5}, "num_key_value_heads must divide num_heads = 32, got 5"),
        ("llama", {"num_key_value_heads": 0}, "num_key_value_heads must be an integer from 1 to 16777216, got 0"),
        ("llama", {"head_dim": "64"}, "head_dim must be an integer from 1 to 16777216, got '64'"),
        ("llama", {"head_dim": 7}, "head_dim must be even, got 7"),
        ("llama", {"hidden_size": 100}, "num_attention_heads must divide width = 100 without head_dim, got 32"),
        ("llama", {"hidden_act": "swiglu"}, "hidden_act must be one of gelu, .*, silu, got 'swiglu'"),
        ("llama", {"rms_norm_eps": 1}, "rms_norm_eps must be a number above 0 and below 1, got 1"),
        ("llama", {"attention_bias": 1}, "attention_bias must be true or false, got 1"),
        ("llama", {"mlp_bias": None}, "mlp_bias must be true or false, got None"),
        ("llama", {"tie_word_embeddings": "no"}, "tie_word_embeddings must be true or false, got 'no'"),
        *[
            ("llama", rope_of(rope_type=kind), f"rope_type must be 'default' or 'linear' or 'llama3', got '{kind}'")
            for kind in ("dynamic", "yarn", "longrope")
        ],
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type must be .*, got 'dynamic'"),
        ("llama", rope_of(partial_rotary_factor=0.5), "partial_rotary_factor must be 1.0, got 0.5"),
        ("llama", {"partial_rotary_factor": 0.25}, "partial_rotary_factor must be 1.0, got 0.25"),
        ("llama", {"rope_theta": -1.0}, "rope_theta must be a number above 0, got -1.0"),
        ("llama", rope_of(rope_type="linear"), "factor must be a number above 0, got None"),
        ("llama", rope_of(**LLAMA3 | {"high_freq_factor": 1.0}), "high_freq_factor must be above .* = 1.0, got 1.0"),
        ("llama", {"rope_parameters": [1]}, r"rope_parameters must be an object of numbers, .*, got \[1\]"),
        ("llama", {"rope_parameters": {"full_attention": {}}}, "rope_parameters must be .* the same for all layers"),
        ("mistral", {}, "sliding_window must be null, got 4096"),
        ("mistral", {"sliding_window": 8}, "sliding_window must be null, got 8"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window must be false, got True"),
        (
            "qwen3",
            {"layer_types": ["full_attention", "sliding_attention"]},
            "layer_types must be 'full_attention', got",
        ),
        ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention must be false, got True"),
        ("gemma", {"hidden_activation": "gelu"}, "hidden_activation must be 'gelu_pytorch_tanh', got 'gelu'"),
    ],
)
def test_variants_that_it_does_not_compute_are_refused(family, fields, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        FAMILIES[family].shape(fields)


def test_too_long_a_sequence_is_refused(trained):
    _, model, base, adapters, _ = trained
    batch = {name: np.ones((1, 17), np.int32) for name in ("input_ids", "attention_mask")}
    with pytest.raises(ValueError, match=r"data\.max_length must be at most 16, the model.s positions, got 17"):
        jax.eval_shape(model.apply, base, adapters, batch)
