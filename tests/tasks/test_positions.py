"""Tasks of each position: losses and gradients against Hugging Face's models, scores against NumPy, packed or not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_lora.core.learning import Features, Hidden, Logits
from fedjax_lora.core.methods import Context
from fedjax_lora.core.types import IGNORED
from fedjax_lora.data.packing import pack
from fedjax_lora.tasks import causal_lm, positions, token_classification

CONTEXT = Context(num_clients=2, cohort_size=2, num_classes=4)
TOKENS = token_classification.make(token_classification.TokenClassificationOptions(), CONTEXT)
NEXT = causal_lm.make(causal_lm.CausalLmOptions(), CONTEXT)
RANDOM = np.random.default_rng(0)
SIZES = {"num_attention_heads": 2, "intermediate_size": 12, "num_hidden_layers": 1, "hidden_size": 8}

LOGITS = RANDOM.normal(size=(5, 7, 4)).astype(np.float32)
LENGTHS = np.array([7, 3, 5, 1, 4])
REAL = np.arange(7) < LENGTHS[:, None]
TARGET = np.where(REAL & (np.arange(7) != 2), RANDOM.integers(0, 4, (5, 7)), IGNORED).astype(np.int32)
WEIGHT = np.array([1, 0, 1, 1, 1], np.float32)
BATCH = {
    "input_ids": jnp.ones((5, 7), jnp.int32),
    "attention_mask": jnp.asarray(REAL, jnp.int32),
    "label": jnp.zeros(5, jnp.int32),
    "target": jnp.asarray(TARGET),
}


def test_token_classification_against_a_transformers_model():
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = transformers.BertConfig(vocab_size=20, num_labels=4, hidden_dropout_prob=0.0, **SIZES)
    reference = transformers.BertForTokenClassification(config).eval()
    ids, mask = torch.tensor(RANDOM.integers(0, 20, (5, 7))), torch.tensor(REAL.astype(int))
    hidden = reference.bert(ids, attention_mask=mask).last_hidden_state.detach().numpy()
    own = torch.tensor(np.flatnonzero(WEIGHT))
    told = reference(ids[own], attention_mask=mask[own], labels=torch.tensor(TARGET[own], dtype=torch.long))
    told.loss.backward()

    def loss(head):
        read = TOKENS.read(head, Features(Hidden(jnp.asarray(hidden), jnp.asarray(REAL, jnp.float32)), lambda: None))
        return TOKENS.loss(read, BATCH, jnp.asarray(WEIGHT)), read

    of_head = reference.classifier
    head = {"w": jnp.asarray(of_head.weight.detach().numpy().T), "b": jnp.asarray(of_head.bias.detach().numpy())}
    (value, logits), gradient = jax.value_and_grad(loss, has_aux=True)(head)
    np.testing.assert_allclose(logits[own.numpy()], told.logits.detach().numpy(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(value, told.loss.item(), rtol=1e-5)
    np.testing.assert_allclose(gradient["w"], of_head.weight.grad.numpy().T, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(gradient["b"], of_head.bias.grad.numpy(), rtol=1e-4, atol=1e-6)
    assert {name: leaf.shape for name, leaf in TOKENS.head(jax.random.key(0), 5, False).items()} == {
        "w": (5, 4),
        "b": (4,),
    }


def test_causal_language_modelling_against_a_transformers_model():
    """Its labels are not shifted yet: a position's target is the label of the next."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=11, n_embd=8, n_layer=1, n_head=2, n_positions=9)
    reference = transformers.GPT2LMHeadModel(config).eval()
    labels = np.concatenate([np.full((5, 1), IGNORED), TARGET[:, :-1]], 1)
    ids = torch.tensor(RANDOM.integers(0, 11, (5, 7)))
    values = reference.transformer(ids).last_hidden_state.detach()
    told = reference(ids, labels=torch.tensor(labels))
    by_values = values.clone().requires_grad_()
    reference.loss_function(by_values @ reference.lm_head.weight.T, torch.tensor(labels), vocab_size=11).backward()
    assert by_values.grad is not None
    target = np.concatenate([TARGET[:, :-1], np.full((5, 1), IGNORED)], 1)
    table = jnp.asarray(reference.lm_head.weight.detach().numpy().T)

    def loss(values):
        features = Features(Hidden(values, jnp.ones((5, 7))), lambda: None, lambda: values @ table)
        return NEXT.loss(NEXT.read({}, features), {**BATCH, "target": jnp.asarray(target)}, jnp.ones(5))

    value, gradient = jax.value_and_grad(loss)(jnp.asarray(values.numpy()))
    np.testing.assert_allclose(value, told.loss.item(), rtol=1e-5)
    np.testing.assert_allclose(gradient, by_values.grad.numpy(), rtol=1e-4, atol=1e-6)
    assert NEXT.head(jax.random.key(0), 5, True) == {}


def test_scores_and_what_is_found_of_a_pool_numpy_loop():
    scores = {name: np.asarray(score) for name, score in NEXT.score(jnp.asarray(LOGITS), BATCH).items()}
    wide, losses, right = LOGITS.astype(np.float64), [], []
    for example in range(5):
        own = [t for t in range(7) if TARGET[example, t] != IGNORED]
        each = [np.log(np.exp(wide[example, t]).sum()) - wide[example, t, TARGET[example, t]] for t in own]
        hit = [np.argmax(wide[example, t]) == TARGET[example, t] for t in own]
        np.testing.assert_allclose(scores["loss"][example], np.sum(each), rtol=1e-5)
        assert scores["correct"][example] == np.sum(hit) and scores["positions"][example] == len(own)
        if WEIGHT[example]:
            losses, right = losses + each, right + hit
    found = NEXT.finish(scores, jnp.asarray(WEIGHT))
    np.testing.assert_allclose(found["eval_loss"], np.mean(losses), rtol=1e-5)
    np.testing.assert_allclose(found["eval_accuracy"], np.mean(right), rtol=1e-6)
    np.testing.assert_allclose(found["perplexity"], np.exp(np.mean(losses)), rtol=1e-5)
    np.testing.assert_allclose(NEXT.loss(jnp.asarray(LOGITS), BATCH, jnp.asarray(WEIGHT)), np.mean(losses), rtol=1e-5)
    without = TOKENS.finish(scores, jnp.asarray(WEIGHT))
    assert without == {name: found[name] for name in ("eval_loss", "eval_accuracy")}


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_packed_positions_lie_with_their_targets_and_count_as_unpacked(rows):
    """Oracle: the unpacked batch; what lies where no position does holds NaN."""
    real, width = REAL & (WEIGHT > 0)[:, None], {1: 19, 2: 12, 3: 8}[rows]

    @jax.jit
    def run(logits):
        packed = pack(BATCH, jnp.asarray(real), rows, width)
        place = packed["example_ids"], packed["position_ids"]
        expected = jnp.asarray(TARGET).at[place].get(mode="fill", fill_value=IGNORED)

        def shared(logits):
            return logits.at[place].get(mode="fill", fill_value=jnp.nan)

        apart = TOKENS.score(logits, BATCH), jax.value_and_grad(TOKENS.loss)(logits, BATCH, WEIGHT)
        together = jax.value_and_grad(lambda logits: TOKENS.loss(shared(logits), packed, WEIGHT))(logits)
        return packed["target"], expected, (TOKENS.score(shared(logits), packed), together), apart

    target, expected, found, (scores, learned) = run(jnp.asarray(LOGITS))
    np.testing.assert_array_equal(target, expected)
    assert np.sum(target != IGNORED) == np.sum((TARGET != IGNORED) & real) < target.size
    scores = {name: WEIGHT * score for name, score in scores.items()}
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7), found, (scores, learned))


def test_a_target_of_each_example_is_not_packed():
    real, target = jnp.asarray(REAL), jnp.arange(5.0)
    np.testing.assert_array_equal(pack({**BATCH, "target": target}, real, 1, 25)["target"], target)


def test_a_logit_that_is_not_finite_is_not_measured_where_it_counts():
    """By definition: at a position that does not count it changes nothing."""
    ignored, counts = (0, 2), (0, 1)
    for place, measured in ((ignored, True), (counts, False)):
        scores = NEXT.score(jnp.asarray(LOGITS).at[place].set(jnp.nan), BATCH)
        assert np.isfinite(NEXT.finish(scores, jnp.ones(5))["eval_accuracy"]) == measured
        assert np.isfinite(NEXT.finish(scores, jnp.ones(5).at[0].set(0.0))["eval_accuracy"])


def test_no_gradient_comes_of_a_position_that_does_not_count():
    gradient = jax.grad(lambda x: positions.cross_entropy(x, jnp.asarray(TARGET)).sum())(jnp.asarray(LOGITS))
    np.testing.assert_array_equal(np.any(gradient != 0, -1), TARGET != IGNORED)


def test_without_a_position_that_counts_the_loss_is_zero_and_nothing_is_measured():
    nothing = {**BATCH, "target": jnp.full((5, 7), IGNORED)}
    value, gradient = jax.value_and_grad(lambda x: NEXT.loss(x, nothing, jnp.ones(5)))(jnp.asarray(LOGITS))
    assert value == 0 and not np.any(gradient)
    found = NEXT.finish(NEXT.score(jnp.asarray(LOGITS), nothing), jnp.ones(5))
    assert all(np.isnan(value) for value in found.values())


def test_a_model_without_logits_and_too_few_classes_are_refused():
    features = Features(Hidden(jnp.ones((1, 2, 3)), jnp.ones((1, 2))), lambda: None)
    with pytest.raises(ValueError, match=r"^task.name must not be causal_lm where the model has no logits of the next"):
        NEXT.read({}, features)
    with pytest.raises(ValueError, match=r"^num_classes must be at least 2, got 1$"):
        token_classification.make(token_classification.TokenClassificationOptions(), CONTEXT._replace(num_classes=1))


def product(values, words):
    return values @ words.T


def next_token(held, monkeypatch):
    """`(values, words, batch, weight) -> (loss, scores)` where this many logits are held."""

    def found(values, words, batch, weight):
        features = Features(Hidden(values, jnp.ones(values.shape[:2])), lambda: None, Logits(values, words, product))
        outputs = NEXT.read({}, features)
        assert isinstance(outputs, Logits) == (values.size // values.shape[-1] * len(words) > held)
        return NEXT.loss(outputs, batch, weight), NEXT.score(outputs, batch)

    monkeypatch.setattr(positions, "HELD", held)
    return jax.jit(jax.value_and_grad(found, argnums=(0, 1), has_aux=True))


@pytest.mark.parametrize("held", [1, 11 * 8, 11 * 34])
def test_logits_of_some_positions_at_a_time_give_the_loss_of_all(held, monkeypatch):
    """Oracle: all logits at once; one position, eight, which do not divide 35, and all but one at a time."""
    values, words = (jnp.asarray(RANDOM.normal(size=shape), jnp.float32) for shape in ((5, 7, 6), (11, 6)))
    given = values, words, BATCH, jnp.asarray(WEIGHT)
    whole, some = next_token(2**24, monkeypatch)(*given), next_token(held, monkeypatch)(*given)
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(whole[1])) > 1e-2
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), some, whole)


def test_memory_does_not_grow_with_positions_by_words(monkeypatch):
    """Oracle: what XLA allocates, against the size of all logits in float32."""

    def bytes_of(held, length):
        values, words = jax.ShapeDtypeStruct((4, length, 3), jnp.float32), jax.ShapeDtypeStruct((2048, 3), jnp.float32)
        batch = {"target": jax.ShapeDtypeStruct((4, length), jnp.int32)}
        given = values, words, batch, jax.ShapeDtypeStruct((4,), jnp.float32)
        return next_token(held, monkeypatch).lower(*given).compile().memory_analysis().temp_size_in_bytes

    logits = 4 * 128 * 2048 * 4
    assert bytes_of(2**24, 128) > logits
    small, large = bytes_of(2**15, 128), bytes_of(2**15, 256)
    assert large < logits / 4 and large - small < logits / 16
