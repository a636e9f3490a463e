"""Classification: its loss and gradient against PyTorch, its scores against scikit-learn, its weights against NumPy."""

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
def test_scores_numpy_loop_and_what_is_not_finite_is_not_measured(value):
    logits = LOGITS.copy()
    logits[3, 1] = value
    found = make().score(jnp.asarray(logits), {"label": jnp.asarray(LABEL)})
    for i in np.flatnonzero(np.arange(6) != 3):
        wide = LOGITS[i].astype(np.float64)
        np.testing.assert_allclose(found["loss"][i], np.log(np.exp(wide).sum()) - wide[LABEL[i]], rtol=1e-5)
        assert found["correct"][i] == (np.argmax(wide) == LABEL[i]) == (found["found"][i] == LABEL[i])
    assert np.isnan(found["correct"][3])
    told = make().finish(found, jnp.ones(6))
    assert all(np.isnan(told[name]) for name in ("eval_accuracy", "macro_f1", "matthews"))


CASES = ["random", "rare", "one class found", "all right", "all wrong"]


@pytest.mark.parametrize(
    ("num_classes", "case"), [*((c, case) for c in (2, 5) for case in CASES), (5, "one is missing")]
)
def test_what_is_found_of_a_pool_against_scikit_learn(num_classes, case):
    metrics = pytest.importorskip("sklearn.metrics")
    random = np.random.default_rng(1)
    label = random.integers(0, num_classes, 400)
    if case == "rare":
        label = (random.random(40_000) < 3e-4).astype(int)  # where 1 - sum of squared shares would cancel
    if case == "one is missing":
        label = np.where(label == num_classes - 1, 0, label)
    told = np.where(random.random(label.size) < 0.3, random.integers(0, num_classes, label.size), label)
    if case == "rare":
        told = np.where(random.random(label.size) < 0.3, 0, label)
    if case == "one class found":
        told = np.ones_like(label)
    if case in ("all right", "all wrong"):
        told = label if case == "all right" else (label + 1) % num_classes
    if case == "one is missing":
        told = np.where(told == num_classes - 1, 0, told)

    logits = 3.0 * np.eye(num_classes, dtype=np.float32)[told]
    found = make(num_classes).finish(
        make(num_classes).score(logits, {"label": jnp.asarray(label)}), jnp.ones(label.size)
    )
    expected = {
        "eval_accuracy": metrics.accuracy_score(label, told),
        "macro_f1": metrics.f1_score(label, told, average="macro", zero_division=0),
        "matthews": metrics.matthews_corrcoef(label, told),
    }
    if num_classes == 2:
        expected["f1"] = metrics.f1_score(label, told, zero_division=0)
    assert set(found) == {"eval_loss", *expected}
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


def test_weights_of_a_pool_are_as_if_examples_were_there_so_often():
    """Invariance: weights 0, 1, 2 are examples that are left out, there once and there twice."""
    random = np.random.default_rng(2)
    logits, label = random.normal(size=(30, 4)).astype(np.float32), jnp.asarray(random.integers(0, 4, 30))
    weight = random.integers(0, 3, 30)
    scores = make(4).score(logits, {"label": label})
    repeated = {name: np.repeat(np.asarray(score), weight) for name, score in scores.items()}
    expected = make(4).finish(repeated, jnp.ones(weight.sum()))
    for name, value in make(4).finish(scores, jnp.asarray(weight, jnp.float32)).items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-5)


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
