"""The laws of models and of what stands beside their frozen weights: adapters and tasks."""

from collections.abc import Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fedjax_lora.adapters.lora import add_to_base
from fedjax_lora.core.learning import Adapter, Model, Task
from fedjax_lora.core.methods import Context
from fedjax_lora.core.types import Adapters, Base
from fedjax_lora.data.packing import deal, pack
from fedjax_lora.testing import examples
from fedjax_lora.testing.laws import Subject, close, named

# ----------------------------------------------------------------------------------------------------------- tasks


def _task_batch(method: Task, context: Context) -> tuple[Any, dict[str, Array]]:
    """Outputs of a fresh head on random features, and the batch that they are of."""
    batch, features = examples.batch(context, method.learns), examples.features(5)
    return method.read(method.head(jax.random.key(0), 5, True), features), batch


def exercise_task(method: Task, context: Context) -> Any:
    """What a task makes of a batch, but for the accuracy, which it may not measure."""
    outputs, batch = _task_batch(method, context)
    scores, one = method.score(outputs, batch), jnp.ones(examples.BATCH_SIZE)
    weights = method.weigh(batch, jnp.int32(4), batch) if method.weigh else ()
    found = {name: value for name, value in method.finish(scores, one).items() if name != "eval_accuracy"}
    return outputs, method.loss(outputs, batch, one), scores, found, weights


def examples_of_weight_0_do_not_count(subject: Subject) -> None:
    """The loss of a padded batch is that of its true examples, whatever the others hold."""
    method, context, true = subject.record, subject.context, examples.BATCH_SIZE - 2
    outputs, batch = _task_batch(method, context)
    weight = (jnp.arange(examples.BATCH_SIZE) < true).astype(jnp.float32)
    alone = method.loss(outputs[:true], {name: leaf[:true] for name, leaf in batch.items()}, jnp.ones(true))
    padded = {name: leaf.at[true:].set(leaf[0]) for name, leaf in batch.items()}
    close(method.loss(outputs, batch, weight), alone)
    close(method.loss(outputs.at[true:].multiply(-3.0), padded, weight), alone)


def every_example_has_its_scores(subject: Subject) -> None:
    """Scores are `[B]`, and `finish` makes a loss of them and an accuracy, from 0 to 1 or not measured."""
    outputs, batch = _task_batch(subject.record, subject.context)
    scores = subject.record.score(outputs, batch)
    for name, score in scores.items():
        assert score.shape == (examples.BATCH_SIZE,), f"score {name} must be [B], got {score.shape}"
    found = subject.record.finish(scores, jnp.ones(examples.BATCH_SIZE))
    missing = {"eval_loss", "eval_accuracy"} - found.keys()
    assert not missing, f"finish must give {', '.join(sorted(missing))}"
    for name, value in found.items():
        assert jnp.shape(value) == (), f"{name} of finish must be a scalar, got {jnp.shape(value)}"
    accuracy = float(found["eval_accuracy"])
    assert np.isnan(accuracy) or 0 <= accuracy <= 1, f"eval_accuracy must be from 0 to 1, got {accuracy}"


def scores_of_weight_0_are_passed_over(subject: Subject) -> None:
    """What is found of a pool is that of its examples of weight 1, whatever the others' scores, NaN among them."""
    method, true = subject.record, examples.BATCH_SIZE - 2
    scores = method.score(*_task_batch(method, subject.context))
    weight = (jnp.arange(examples.BATCH_SIZE) < true).astype(jnp.float32)
    alone = method.finish({name: score[:true] for name, score in scores.items()}, jnp.ones(true))
    lost = {
        name: score.at[true:].set(jnp.nan) if jnp.issubdtype(score.dtype, jnp.floating) else score
        for name, score in scores.items()
    }
    close(method.finish(scores, weight), alone)
    close(method.finish(lost, weight), alone)


def a_packed_batch_is_learned_alike(subject: Subject) -> None:
    """Of a task of each position: loss and scores of examples that share rows are those of rows of their own."""
    method, rows = subject.record, 2
    outputs, batch = _task_batch(method, subject.context)
    if batch.get("target", batch["label"]).ndim == 1:
        return
    weight = jnp.ones(examples.BATCH_SIZE).at[0].set(0.0)
    real = (batch["attention_mask"] > 0) & (weight > 0)[:, None]
    packed = pack(batch, real, rows, int(jnp.max(deal(real.sum(1), rows)[2])) + 1)
    shared = outputs.at[packed["example_ids"], packed["position_ids"]].get(mode="fill", fill_value=7.0)
    close(method.loss(shared, packed, weight), method.loss(outputs, batch, weight))
    found, alone = method.score(shared, packed), method.score(outputs, batch)
    close({name: score[1:] for name, score in found.items()}, {name: score[1:] for name, score in alone.items()})


def a_pool_weighs_as_it_is(subject: Subject) -> None:
    """For a client that holds the very pool all of its examples weigh 1."""
    if subject.record.weigh is None:
        return
    batch = examples.batch(subject.context, subject.record.learns)
    close(subject.record.weigh(batch, jnp.int32(examples.BATCH_SIZE), batch), jnp.ones(examples.BATCH_SIZE))


TASK = named(
    examples_of_weight_0_do_not_count,
    every_example_has_its_scores,
    scores_of_weight_0_are_passed_over,
    a_packed_batch_is_learned_alike,
    a_pool_weighs_as_it_is,
)

# -------------------------------------------------------------------------------------------------------- adapters


def _moved(tree: Any, seed: int = 3) -> Any:
    """Every leaf with noise added, as after training."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    noise = [0.3 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, [leaf + more for leaf, more in zip(leaves, noise, strict=True)])


def _leaves(method: Adapter) -> dict[str, Any]:
    return method.init(jax.random.key(0), examples.SITES, examples.NUM_LAYERS, examples.MAX_RANK, 1.0)


def _projected(method: Adapter, effective: Mapping[str, Any]) -> dict[str, tuple[Array, Array, Array]]:
    """Site -> x, the frozen w, and what layer 0 computes of them in columns that are wider than the site's own."""
    found = {}
    for name, site in examples.SITES.items():
        x_key, w_key = jax.random.split(jax.random.key(site.n_out))
        x, w = jax.random.normal(x_key, (3, 2, site.n_in)), jax.random.normal(w_key, (site.n_in, site.n_out + 4))
        own = jax.tree.map(lambda leaf: leaf[0], effective[name])
        found[name] = x, w, method.project(x, w, {name: (site.first, own)})
    return found


def exercise_adapter(method: Adapter, context: Context) -> Any:
    """What adapters compute after training, and what they add to the weights."""
    leaves = _leaves(method)
    effective = method.effective(_moved(leaves), examples.scope().ranks, examples.SCALE)
    return leaves, effective, _projected(method, effective), method.merge(effective)


def adapters_at_the_start_add_nothing(subject: Subject) -> None:
    """A model computes at first what its frozen weights do."""
    method = subject.record
    effective = method.effective(_leaves(method), examples.scope().ranks, examples.SCALE)
    for x, w, found in _projected(method, effective).values():
        close(found, x @ w)
    for change in method.merge(effective).values():
        np.testing.assert_array_equal(change, 0.0)


def merged_weights_compute_the_same(subject: Subject) -> None:
    """`x @ w` with adapters is `x` times the weights with `merge` of them added, in the columns of their site."""
    method = subject.record
    effective = method.effective(_moved(_leaves(method)), examples.scope().ranks, examples.SCALE)
    changes = method.merge(effective)
    for name, (x, w, found) in _projected(method, effective).items():
        site, change = examples.SITES[name], changes[name]
        assert change.shape == (examples.NUM_LAYERS, site.n_in, site.n_out), f"got {change.shape}"
        close(found, x @ w.at[:, site.first : site.first + site.n_out].add(change[0]))


def a_rank_not_in_use_has_no_effect(subject: Subject) -> None:
    """Adapters of no rank add nothing, whatever their leaves hold; and the scale is one of what is added."""
    method = subject.record
    leaves = _moved(_leaves(method))
    for change in method.merge(method.effective(leaves, jnp.zeros(examples.MAX_RANK), examples.SCALE)).values():
        np.testing.assert_array_equal(change, 0.0)
    whole, half = (method.merge(method.effective(leaves, examples.scope().ranks, by)) for by in (1.0, 0.5))
    close(half, jax.tree.map(lambda change: 0.5 * change, whole))


ADAPTER = named(adapters_at_the_start_add_nothing, merged_weights_compute_the_same, a_rank_not_in_use_has_no_effect)

# ---------------------------------------------------------------------------------------------------------- models


def context() -> Context:
    """Of small images, with the package's own task and adapter."""
    return examples.made(examples.context(image_shape=examples.IMAGE_SHAPE), ("task", "adapter"))


def _base(method: Model, context: Context) -> tuple[Base, Adapters, dict[str, Array]]:
    """Frozen weights, adapters on all sites after some training, effective ones, and a batch."""
    base_key, adapter_key, head_key = jax.random.split(jax.random.key(0), 3)
    adapter = context.made["adapter"]
    leaves = adapter.init(adapter_key, method.sites, method.num_layers, 2, 1.0)
    modules = adapter.effective(_moved(leaves), jnp.ones(2), examples.SCALE)
    adapters = Adapters(modules=modules, head=method.init_head(head_key))
    return method.init(base_key), adapters, examples.batch(context, context.made["task"].learns)


def exercise_model(method: Model, context: Context) -> Any:
    """What a model makes of a batch with adapters."""
    return method.apply(*_base(method, context))


def _given(subject: Subject) -> tuple[Base, Adapters, dict[str, Array]]:
    return jax.jit(lambda: _base(subject.record, subject.context))()


def _apply(subject: Subject) -> Any:
    return jax.jit(subject.record.apply)  # a program for each set of sites that carry adapters


def outputs_are_one_for_each_example(subject: Subject) -> None:
    """Outputs are finite and `[B, classes]`, and an example's does not depend on what else is in the batch."""
    (base, adapters, batch), apply = subject.once(_given), subject.once(_apply)
    found = apply(base, adapters, batch)
    chex.assert_shape(found, (examples.BATCH_SIZE, subject.context.num_classes))
    chex.assert_tree_all_finite(found)
    other = {name: leaf.at[1].set(leaf[0]) for name, leaf in batch.items()}
    close(apply(base, adapters, other), found.at[1].set(found[0]))


def a_site_may_carry_no_adapter(subject: Subject) -> None:
    """Adapters may be on one site alone, or on none, which is what adapters compute that add nothing."""
    (base, adapters, batch), apply = subject.once(_given), subject.once(_apply)
    none, zero = ({}, jax.tree.map(jnp.zeros_like, adapters.modules))
    plain, nothing = (apply(base, Adapters(modules=modules, head=adapters.head), batch) for modules in (none, zero))
    close(nothing, plain)
    name = next(iter(adapters.modules))
    one = Adapters(modules={name: adapters.modules[name]}, head=adapters.head)
    chex.assert_tree_all_finite(apply(base, one, batch))


def merged_weights_give_the_same_outputs(subject: Subject) -> None:
    """Adapters that are added to the frozen weights at their sites compute what they do beside them."""
    (base, adapters, batch), apply = subject.once(_given), subject.once(_apply)
    none, adapter = Adapters(modules={}, head=adapters.head), subject.context.made["adapter"]
    merged = add_to_base(base, adapter.merge(adapters.modules), subject.record.sites)
    found, plain = apply(merged, none, batch), apply(base, none, batch)
    close(found, apply(base, adapters, batch), rtol=1e-3, atol=1e-3)
    assert np.max(np.abs(np.asarray(found - plain))) > 1e-4, "adapters change nothing"


def packed_batches_give_the_same_outputs(subject: Subject) -> None:
    """Of a model that packs: examples that share rows compute what they do in rows of their own, with dropout too."""
    if not subject.record.packs:
        return
    (base, adapters, batch), apply = subject.once(_given), subject.once(_apply)
    text = {name: leaf for name, leaf in batch.items() if name != "image"}
    real = (text["attention_mask"] > 0).at[0].set(False)  # the first example is left out
    widest, key = int(jnp.max(deal(real.sum(1), 2)[2])), jax.random.key(5)
    found = apply(base, adapters, pack(text, real, 2, widest + 1), key)
    chex.assert_tree_all_finite(found)
    close(found[1:], apply(base, adapters, text, key)[1:], rtol=1e-3, atol=1e-3)


MODEL = named(
    outputs_are_one_for_each_example,
    a_site_may_carry_no_adapter,
    merged_weights_give_the_same_outputs,
    packed_batches_give_the_same_outputs,
)
