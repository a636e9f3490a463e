"""Classification: its loss and gradient against PyTorch, its scores and weights against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_lora.core.learning import Features
from fedjax_lora.core.methods import Context
from fedjax_lora.tasks import classification
from fedjax_lora.tasks.classification import ClassificationOptions, label_weights

RANDOM = np.random.default_rng(0)
LOGITS, LABEL = RANDOM.normal(size=(6, 3)).astype(np.float32), np.array([2, 0, 1, 1, 0, 2])


def make(num_classes=3):
    return classification.make(ClassificationOptions(), Context(num_clients=2, cohort_size=2, num_classes=num_classes))


def test_loss_and_its_gradient_against_pytorch_over_the_examples_of_weight_one():
    torch = pytest.importorskip("torch")
    weight = np.array([1, 1, 0, 1, 0, 1], np.float32)
    reference = torch.tensor(LOGITS, requires_grad=True)
    own = torch.tensor(np.flatnonzero(weight))
    expected = torch.nn.functional.cross_entropy(reference[own], torch.tensor(LABEL)[own])
    expected.backward()
    assert reference.grad is not None

    def loss(logits):
        return make().loss(logits, {"label": LABEL}, weight)

    value, gradient = jax.value_and_grad(loss)(jnp.asarray(LOGITS))
    np.testing.assert_allclose(value, expected.item(), rtol=1e-5)
    np.testing.assert_allclose(gradient, reference.grad.numpy(), rtol=1e-4, atol=1e-6)
    assert make().loss(jnp.asarray(LOGITS), {"label": LABEL}, np.zeros(6)) == 0


def test_head_and_read_closed_form():
    head = make().head(jax.random.key(0), 5, True)
    assert {name: leaf.shape for name, leaf in head.items()} == {"w": (5, 3), "b": (3,)}
    assert not np.any(head["b"]) and 0.01 < np.std(head["w"]) < 0.03
    features = RANDOM.normal(size=(4, 5)).astype(np.float32)
    shifted = {**head, "b": jnp.arange(3.0)}
    np.testing.assert_allclose(
        make().read(shifted, Features(None, lambda: features)), features @ head["w"] + np.arange(3.0), rtol=1e-5
    )


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_score_and_finish_numpy_loop_and_what_is_not_finite_is_not_measured(value):
    logits = LOGITS.copy()
    logits[3, 1] = value
    found = make().score(jnp.asarray(logits), {"label": LABEL})
    for i in np.flatnonzero(np.arange(6) != 3):
        wide = LOGITS[i].astype(np.float64)
        np.testing.assert_allclose(found["loss"][i], np.log(np.exp(wide).sum()) - wide[LABEL[i]], rtol=1e-5)
        assert found["correct"][i] == (np.argmax(wide) == LABEL[i])
    assert np.isnan(found["correct"][3])
    means = {"loss": jnp.float32(0.5), "correct": jnp.float32(0.25)}
    assert make().finish(means) == {"eval_loss": means["loss"], "eval_accuracy": means["correct"]}


def test_weights_are_the_ratio_of_shares_numpy_loop():
    own, pool = np.array([0, 2, 2, 1, 1]), np.array([0, 0, 1, 2])
    expected = [(np.mean(own[:3] == y)) / np.mean(pool == y) for y in pool]
    found = make().weigh({"label": own}, jnp.int32(3), {"label": pool})
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    np.testing.assert_array_equal(found, label_weights(own, jnp.int32(3), pool, 3))


def test_fewer_than_two_classes_are_refused():
    with pytest.raises(ValueError, match=r"^num_classes must be at least 2, got 1$"):
        make(1)
    with pytest.raises(ValueError, match=r"^name must be 'classification', got 'regression'$"):
        ClassificationOptions(name="regression")  # pyright: ignore[reportArgumentType]
