"""Regression: its loss and gradient against Hugging Face's with one label, its correlation against NumPy's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_lora.core.learning import Features
from fedjax_lora.core.methods import Context
from fedjax_lora.tasks import regression
from fedjax_lora.tasks.regression import pearson

TASK = regression.make(regression.RegressionOptions(), Context(num_clients=2, cohort_size=2))
RANDOM = np.random.default_rng(0)


def test_loss_and_gradient_against_a_transformers_model_of_one_label():
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
    config = transformers.BertConfig(vocab_size=20, num_labels=1, hidden_dropout_prob=0.0, **sizes)
    reference = transformers.BertForSequenceClassification(config).eval()
    ids = torch.tensor(RANDOM.integers(0, 20, (6, 7)))
    target = RANDOM.uniform(0, 5, 6).astype(np.float32)
    pooled = reference.bert(ids).pooler_output.detach().numpy()
    weight = np.array([1, 0, 1, 1, 1, 0], np.float32)
    own = torch.tensor(np.flatnonzero(weight))
    expected = reference(ids[own], labels=torch.tensor(target)[own]).loss
    expected.backward()

    def loss(head):
        outputs = TASK.read(head, Features(None, lambda: jnp.asarray(pooled)))
        return TASK.loss(outputs, {"target": target}, weight)

    of_head = reference.classifier
    head = {"w": jnp.asarray(of_head.weight.detach().numpy().T), "b": jnp.asarray(of_head.bias.detach().numpy())}
    value, gradient = jax.value_and_grad(loss)(head)
    np.testing.assert_allclose(value, expected.item(), rtol=1e-5)
    np.testing.assert_allclose(gradient["w"], of_head.weight.grad.numpy().T, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(gradient["b"], of_head.bias.grad.numpy(), rtol=1e-4, atol=1e-5)
    assert {name: leaf.shape for name, leaf in TASK.head(jax.random.key(0), 5, True).items()} == {
        "w": (5, 1),
        "b": (1,),
    }


@pytest.mark.parametrize(("shift", "spread"), [(0.0, 1.0), (100.0, 1e-2), (0.1, 1e-6), (3.0, 1e-18), (0.0, 1e15)])
def test_pearson_against_numpy_in_double_precision(shift, spread):
    """However small the spread is beside the mean, or in itself: nothing cancels and nothing under- or overflows."""
    target = RANDOM.uniform(0, 5, 300).astype(np.float32)
    found = (shift * (spread > 1e-12) + spread * (target + RANDOM.normal(size=300))).astype(np.float32)
    scores = TASK.score(jnp.asarray(found), {"target": jnp.asarray(target)})
    told = TASK.finish(scores, jnp.ones(300))
    wide, true = found.astype(np.float64), target.astype(np.float64)
    np.testing.assert_allclose(told["pearson"], np.corrcoef(wide, true)[0, 1], rtol=2e-5)
    np.testing.assert_allclose(told["eval_loss"], np.mean((wide - true) ** 2), rtol=1e-5)
    assert np.isnan(told["eval_accuracy"])


def test_pearson_of_weights_numpy_and_of_a_constant_is_not_measured():
    x, y = RANDOM.normal(size=(2, 40)).astype(np.float32)
    weight = RANDOM.integers(0, 4, 40)
    expected = np.corrcoef(np.repeat(x, weight), np.repeat(y, weight))[0, 1]
    np.testing.assert_allclose(pearson(x, y, jnp.asarray(weight, jnp.float32)), expected, rtol=1e-4)
    assert np.isnan(pearson(jnp.full(40, 0.1), y, jnp.ones(40)))
    assert np.isnan(pearson(jnp.asarray(x).at[3].set(jnp.nan), y, jnp.ones(40)))
