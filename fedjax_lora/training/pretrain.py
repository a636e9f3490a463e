"""Central training of a model that comes without pretrained weights, on the public part of the data."""

import contextlib
import dataclasses
import hashlib
import warnings
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax

from fedjax_lora.core import memory, trees
from fedjax_lora.core.learning import Model, Task
from fedjax_lora.core.types import Adapters, Base
from fedjax_lora.data import tokens
from fedjax_lora.data.batches import gather
from fedjax_lora.data.cache import cache_folder
from fedjax_lora.models import safetensors

_FORMAT = 1  # part of the cache's key: raise it when the training below changes


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Central training with AdamW and cosine decay; used where `model.pretrained` is not given.

    steps: of the optimizer.
    batch_size: examples of a step.
    learning_rate: peak rate.
    """

    steps: int = 300
    batch_size: int = 64
    learning_rate: float = 1e-3

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate must be above 0, got {self.learning_rate}")


def pretrain(
    model: Model, task: Task, pool: Mapping[str, Array], config: PretrainConfig, key: Array
) -> tuple[Base, dict[str, Array]]:
    """Train base and head from scratch.

    Args:
      model: as built; its weights must be float32.
      task: of the model, whose loss is lowered.
      pool: public examples, leaves `[N, ...]`.
      key: seeds the weights and the batches.

    Returns:
      The trained base and task head.

    Raises:
      ValueError: a batch cannot be held in memory.
    """
    base_key, head_key, batch_key = jax.random.split(key, 3)
    params = (model.init(base_key), model.init_head(head_key))
    optimizer = optax.adamw(optax.schedules.cosine_decay_schedule(config.learning_rate, config.steps))
    num_examples = next(iter(pool.values())).shape[0]

    def loss(params: tuple[Base, dict[str, Array]], batch: Mapping[str, Array], key: Array) -> Array:
        base, head = params
        outputs = model.apply(base, Adapters(modules={}, head=head), batch, key)
        return task.loss(outputs, batch, jnp.ones(config.batch_size))

    def backward(params, batch: Mapping[str, Array], key: Array):
        return jax.vjp(lambda params: loss(params, batch, key), params)[1]

    one_batch = jax.eval_shape(lambda pool: gather(pool, jnp.zeros(config.batch_size, jnp.int32)), dict(pool))
    kept = trees.num_bytes(jax.eval_shape(backward, params, one_batch, key))
    memory.check([memory.Term(kept, f"lower pretrain.batch_size, got {config.batch_size}")], 1)

    def step(carry, key: Array):
        params, optimizer_state = carry
        row_key, dropout_key = jax.random.split(key)
        rows = jax.random.randint(row_key, (config.batch_size,), 0, num_examples)
        gradient = jax.grad(loss)(params, gather(pool, rows), dropout_key)
        updates, optimizer_state = optimizer.update(gradient, optimizer_state, params)
        return (optax.apply_updates(params, updates), optimizer_state), None

    @jax.jit
    def train(params):
        keys = jax.random.split(batch_key, config.steps)
        (params, _), _ = lax.scan(step, (params, optimizer.init(params)), keys)
        return params

    return train(params)


def pretrained(
    model: Model, task: Task, pool: Mapping[str, np.ndarray], config: PretrainConfig, fingerprint: str
) -> tuple[Base, dict[str, Array]]:
    """What `pretrain` gives at seed 0, kept on disk: the second run of a setting does not train again.

    Args:
      model, task, pool, config: as for `pretrain`.
      fingerprint: of the options of model and task, and of the data.
    """
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    text = f"{_FORMAT} {fingerprint} {config} {shapes}"
    path = cache_folder() / f"pretrained-{hashlib.sha256(text.encode()).hexdigest()[:16]}.safetensors"
    if path.is_file():
        with contextlib.suppress(ValueError):  # damaged: train again and replace it
            kept, metadata = safetensors.restore(path)
            if metadata.get("sha256") == _digest(kept):
                return kept["base"], kept["head"]
    on_device = {name: jnp.asarray(leaf) for name, leaf in pool.items()}
    base, head = pretrain(model, task, on_device, config, jax.random.key(0))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = {"base": base, "head": head}
        safetensors.save(path, kept, {"sha256": _digest(kept)})
    except OSError as error:  # a read-only home should cost time, not the run
        warnings.warn(f"pretrained weights are not cached, {path.parent}: {error.strerror}", stacklevel=2)
    return base, head


def _digest(tree: Base) -> str:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return tokens.digest({jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves})
