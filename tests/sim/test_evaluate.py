"""Evaluation of a model that looks its logits up, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_lora.core.learning import Hidden, Model
from fedjax_lora.core.types import Adapters, ClientState, Dataset, Factors
from fedjax_lora.sim.cohort import device_mesh
from fedjax_lora.sim.evaluate import ClientAccuracy, make_evaluate, make_evaluate_personal, of_clients
from fedjax_lora.sim.parts import Layout
from oracles.model_context import model_context

LOGITS = np.random.default_rng(0).normal(size=(7, 3)).astype(np.float32)
LABEL = np.array([0, 1, 2, 0, 1, 2, 0])
RANK, SCALE = jnp.float32(2), jnp.float32(2)
PARTS = model_context(3).made
LIKE = Adapters(modules={"inner": Factors(a=jnp.ones((1, 5, 2)), b=jnp.ones((1, 2, 5)))}, head={})

TABLE = Model(
    init=lambda key: {},
    init_head=lambda key: {},
    embed=lambda base, batch, key: Hidden(batch["logits"], jnp.ones(batch["logits"].shape[:1])),
    layers=lambda base, adapters, hidden, key: hidden,
    task=lambda base, adapters, hidden, key: hidden.values,
    sites={},
    num_layers=1,
)

LAYOUT = Layout(cohort_size=1, chunk=1, mesh=device_mesh(), everyone=True, one_rank=True)


def pool(logits):
    return {"logits": jnp.asarray(logits), "label": jnp.asarray(LABEL)}


def evaluate(logits, batch_size):
    score = jax.jit(make_evaluate(TABLE, PARTS["adapter"], PARTS["task"], batch_size, LAYOUT))
    found = PARTS["task"].finish(score({}, pool(logits), LIKE, RANK, SCALE), jnp.ones(7))
    return float(found["eval_loss"]), float(found["eval_accuracy"])


def evaluate_personal(logits, clients):
    """Of clients who hold the given rows of the pool, two each."""
    data = Dataset(train=pool(LOGITS), index=jnp.asarray(clients), count=jnp.full(len(clients), 2), test=pool(logits))
    state = ClientState(rank=jnp.full(len(clients), 2.0), personal={}, methods={})
    score = jax.jit(make_evaluate_personal(TABLE, PARTS["adapter"], PARTS["task"], 4, LAYOUT))
    return float(score({}, data, LIKE, state, SCALE).mean())


@pytest.mark.parametrize("batch_size", [1, 3, 7, 10**12])
def test_loss_and_accuracy_equal_numpy_whatever_the_batch(batch_size):
    loss, accuracy = evaluate(LOGITS, batch_size)
    wide = LOGITS.astype(np.float64)
    np.testing.assert_allclose(loss, np.mean(np.log(np.exp(wide).sum(1)) - wide[np.arange(7), LABEL]), rtol=1e-5)
    np.testing.assert_allclose(accuracy, np.mean(wide.argmax(1) == LABEL), rtol=1e-6)


@pytest.mark.parametrize("batch_size", [3, 7])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("row", [0, 6])
def test_the_accuracy_of_a_logit_that_is_not_finite_is_not_measured(row, value, batch_size):
    """By definition: argmax would call NaN class 0. The row that fills up batches is one of the pool's own."""
    logits = LOGITS.copy()
    logits[row, 2] = value
    assert np.isnan(evaluate(logits, batch_size)[1])


def test_a_personal_accuracy_is_not_measured_where_a_logit_that_counts_is_not_finite():
    """By definition: with labels 0 and 1 at hand, a client counts the pool's examples of these alone."""
    logits = LOGITS.copy()
    logits[2] = np.nan  # of label 2
    right = LOGITS.argmax(1) == LABEL
    expected = np.mean([right[LABEL == 0].mean(), right[LABEL == 1].mean()])
    np.testing.assert_allclose(evaluate_personal(logits, [[0, 1]]), expected, rtol=1e-6)
    assert np.isnan(evaluate_personal(logits, [[0, 1], [1, 2]]))


@pytest.mark.parametrize("num_clients", [9, 10, 23, 130])
def test_the_worst_tenth_of_the_clients_numpy_loop(num_clients):
    """Each client by its examples' labels; who holds none, or labels alone that the pool has not, does not count."""
    random = np.random.default_rng(num_clients)
    label = random.integers(0, 3, 60)  # of classes 0 ... 3, of which the last is not in the pool
    right = (random.random(60) < np.array([0.9, 0.5, 0.2])[label]).astype(np.float32)
    held = np.arange(120) % 4
    index = random.integers(0, 120, (num_clients, 16))
    count = random.integers(0, 17, num_clients)
    count[0], index[1], count[1] = 0, np.arange(3, 67, 4), 5
    task = model_context(4).made["task"]
    scores = {"loss": right, "correct": right, "found": label, "label": label}
    data = Dataset(
        train={"label": jnp.asarray(held)},
        index=jnp.asarray(index),
        count=jnp.asarray(count),
        test={"label": jnp.asarray(label)},
    )
    found = jax.jit(lambda: of_clients(task, data, {name: jnp.asarray(score) for name, score in scores.items()}))()
    accuracies = []
    for rows, number in zip(index, count, strict=True):
        own = [y for y in held[rows[:number]] if y < 3]
        if own:
            accuracies.append(np.mean([right[label == y].mean() for y in own]))
    least = np.sort(accuracies)[: -(-len(accuracies) // 10)]
    assert len(accuracies) <= num_clients - 2
    np.testing.assert_array_equal(np.asarray(found.counts).sum(), len(accuracies))
    np.testing.assert_allclose(found.worst_tenth(), least.mean(), rtol=1e-5)
    np.testing.assert_allclose(found.mean(), np.mean(accuracies), rtol=1e-5)


def test_the_worst_tenth_is_not_measured_where_a_client_that_counts_is_not():
    accuracy, counts = jnp.array([0.5, jnp.nan, 0.9]), jnp.array([True, False, True])
    assert ClientAccuracy(accuracy, counts).worst_tenth() == 0.5
    assert np.isnan(ClientAccuracy(accuracy, ~counts).worst_tenth())
    assert np.isnan(ClientAccuracy(accuracy, jnp.ones(3, bool)).worst_tenth())
    assert np.isnan(ClientAccuracy(accuracy, jnp.zeros(3, bool)).worst_tenth())
