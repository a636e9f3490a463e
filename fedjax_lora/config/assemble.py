"""From a configuration to a simulation: the only place where a name becomes a function."""

import dataclasses
import functools
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from fedjax_lora.adapters import lora as adapters
from fedjax_lora.adapters import targets
from fedjax_lora.aggregation import fedex, fedit, fedsa, ffa, flexlora, flora, hetlora, lora_fair, rolora
from fedjax_lora.config.experiment import ConfigError, ConfigWarning, ExperimentConfig
from fedjax_lora.control import baselines, budgeted, tsfa_online
from fedjax_lora.core import memory as machine
from fedjax_lora.core import trees
from fedjax_lora.core.methods import Aggregator, Controller, Drift, Link, Live, Model, Sparsifier
from fedjax_lora.core.types import Adapters, Base, FedState, Hyper, Scope
from fedjax_lora.data import sources, tokens
from fedjax_lora.data.batches import federated_dataset
from fedjax_lora.data.partition import Partition, partition
from fedjax_lora.models import bert, load
from fedjax_lora.sim import memory
from fedjax_lora.sim.chunk import activation_budget_bytes, activation_bytes, choose_chunk
from fedjax_lora.sim.cohort import client_mesh
from fedjax_lora.sim.engine import Initial, Simulation, first_state
from fedjax_lora.sim.evaluate import make_evaluate, make_evaluate_personal, nothing_personal
from fedjax_lora.sim.full_gradient import make_full_gradient
from fedjax_lora.sim.parts import Parts, World
from fedjax_lora.sparsifiers import dense, flasc, lora_a2, random_rank, soft, soft_rotated, svd, top_k
from fedjax_lora.sparsifiers.payload import dense_bits
from fedjax_lora.sparsifiers.ranks import max_rank
from fedjax_lora.sparsifiers.wire import Wire, make_wire
from fedjax_lora.training import corrections as drift
from fedjax_lora.training import optimizers
from fedjax_lora.training.local import LocalConfig, make_train
from fedjax_lora.training.optimizers import Optimizer, direction, schedule
from fedjax_lora.training.pretrain import pretrained
from fedjax_lora.wireless.cell import make_link, perfect_link

SPARSIFIERS: dict[str, Callable[[Any, Adapters, Wire], Sparsifier]] = {
    "dense": dense.make,
    "soft": soft.make,
    "soft_rotated": soft_rotated.make,
    "top_k": top_k.make,
    "random_rank": random_rank.make,
    "svd": svd.make,
    "lora_a2": lora_a2.make,
    "flasc": flasc.make,
}
AGGREGATORS: dict[str, Callable[[Any], Aggregator]] = {
    "fedit": fedit.make,
    "ffa": ffa.make,
    "rolora": rolora.make,
    "fedsa": fedsa.make,
    "hetlora": hetlora.make,
    "fedex": fedex.make,
    "flora": flora.make,
    "flexlora": flexlora.make,
    "lora_fair": lora_fair.make,
}
DRIFTS: dict[str, Callable[[Any], Drift]] = {
    "none": drift.no_drift,
    "fedprox": drift.fedprox,
    "scaffold": drift.scaffold,
}
SERVERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": optimizers.fed_avg,
    "momentum": optimizers.fed_avg_m,
    "adam": optimizers.fed_adam,
    "yogi": optimizers.fed_yogi,
}
CONTROLLERS: dict[str, Callable[[Any], Controller]] = {
    "ideal": baselines.ideal,
    "uniform": baselines.uniform,
    "fixed": baselines.fixed,
    "tsfa": tsfa_online.make,
    "greedy": budgeted.greedy,
    "proportional": budgeted.proportional,
}
CLIENT_WEIGHTS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "examples": lambda count: count.astype(jnp.float32),
    "equal": lambda count: jnp.ones(count.shape),
}


def build(config: ExperimentConfig) -> Simulation:
    """A simulation with its data and weights on the device.

    Warns with a ConfigWarning where options are known to degenerate.

    Raises:
      ConfigError: the parts of the configuration do not fit together, or a file that it names is missing or
        damaged; one line.
    """
    try:
        simulation = _build(config)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if note := _degeneracy(config):
        warnings.warn(note, ConfigWarning, stacklevel=2)
    return simulation


def _degeneracy(config: ExperimentConfig) -> str | None:
    if config.sparsifier.name == "lora_a2" and config.aggregation.name != "rolora":
        return "sparsifier: lora_a2 is LoRA-A2's choice of ranks alone; its factors take turns with aggregation: rolora"
    if not isinstance(config.sparsifier, soft.SoftConfig):
        return None
    aggregation = config.aggregation
    refilled = aggregation.name in ("flora", "flexlora") or getattr(aggregation, "start", None) == "reinit"
    sit_out = (config.clients.per_round or config.clients.count) < config.clients.count
    return soft.degeneracy(config.sparsifier, refilled, sit_out)


def _build(config: ExperimentConfig) -> Simulation:
    examples = _examples(config)
    split = partition(config.clients.partition, examples.train["label"], config.clients.count, config.seed)
    model, base, head = _model(config, examples)
    world = World(base=base, data=federated_dataset(examples, split))
    initial_adapters = _initial_adapters(config, model, head)
    like = jax.eval_shape(initial_adapters, jax.random.key(0))
    hyper, local = _hyper(config), _filled(config.local, split)
    parts = _parts(config, local, model, like)
    batch_size, aggregator = config.engine.eval_batch_size, parts.aggregator
    activations = _activation_bytes(config, parts, model, world, like, local.batch_size)
    parts = parts._replace(chunk=_chunk(config, parts, activations))
    personal = make_evaluate_personal(model, batch_size, len(examples.class_names), parts.mesh)
    initial = _initial(config, parts, initial_adapters, hyper)
    state = jax.eval_shape(functools.partial(first_state, parts, initial, config.clients.count), jax.random.key(0))
    engine = dataclasses.replace(config.engine, eval_every=min(config.engine.eval_every, config.rounds))
    held = memory.run_terms(parts, world, state, activations, model.num_layers, config.local, engine)
    machine.check(held, parts.mesh.size)
    return Simulation(
        parts=parts,
        world=world,
        initial=initial,
        evaluate=make_evaluate(model, batch_size, parts.mesh),
        evaluate_personal=personal if aggregator.keeps else nothing_personal,
        eval_every=engine.eval_every,
        base_hash=hash_weights(base, head),
        examples_hash=examples.fingerprint,
        partition_hash=split.hash,
        tokenizer_hash=examples.tokenizer_hash,
        model_config_hash=load.model_config_hash(config.model),
        class_names=examples.class_names,
        truncated=examples.truncated,
        full_gradient=make_full_gradient(_exact(config, model, examples), batch_size),
    )


def hash_weights(base: Base, head: dict | None = None) -> str:
    """SHA-256 of what a run starts from: the frozen weights, and the task head where there is one."""
    leaves = jax.tree_util.tree_leaves_with_path((base, head))
    return tokens.digest({jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves})


def _filled(local: LocalConfig, split: Partition) -> LocalConfig:
    """Local training with no more places in a batch than the largest client fills."""
    return dataclasses.replace(local, batch_size=min(local.batch_size, int(split.count.max())))


def _parts(config: ExperimentConfig, local: LocalConfig, model: Model, like: Adapters) -> Parts:
    """What a round is made of, one client at a time; raises ValueError where its bits could not be counted."""
    cohort_size = config.clients.per_round or config.clients.count
    sparsifier = SPARSIFIERS[config.sparsifier.name](config.sparsifier, like, make_wire(config.wire))
    aggregator = AGGREGATORS[config.aggregation.name](config.aggregation)
    correction = DRIFTS[config.drift.name](config.drift)
    drift_bits = _drift_bits(correction, like)
    everyone = cohort_size == config.clients.count

    def receives(round_number: jax.Array) -> Live:
        return aggregator.receives(round_number, everyone)

    def extra_downlink_bits(rank: ArrayLike) -> jax.Array:
        return aggregator.extra_downlink_bits(like, cohort_size if everyone else None, rank)

    _check_fits(like, sparsifier, drift_bits, int(extra_downlink_bits(max_rank(like))))
    rates = schedule(local.optimizer, config.rounds * local.steps)
    return Parts(
        train=make_train(model, sparsifier, aggregator, correction, direction(local.optimizer), rates, local),
        sparsifier=sparsifier,
        drift=correction,
        drift_bits=drift_bits,
        aggregator=aggregator,
        receives=receives,
        extra_downlink_bits=extra_downlink_bits,
        current_base=_current_base(model),
        controller=CONTROLLERS[config.control.name](config.control),
        link=_link(config),
        optimizer=SERVERS[config.server.name](config.server),
        client_weight=CLIENT_WEIGHTS[config.clients.weighting],
        samples=local.samples,
        one_rank=not config.lora.client_ranks and aggregator.next_rank is None,
        cohort_size=cohort_size,
        chunk=1,
        mesh=client_mesh(),
    )


def _examples(config: ExperimentConfig) -> sources.Examples:
    if config.data.source == "digits":
        return sources.load(config.data)
    if config.model.pretrained is None:
        raise ConfigError(
            f"model.pretrained must be a folder or a Hugging Face model id where data.source is "
            f"{config.data.source}, got null"
        )
    shape = load.read_shape(config.model.pretrained)
    bert.check_length(shape, config.data.max_length)
    tokenizer = load.load_tokenizer(config.model.pretrained)
    examples = sources.load(config.data, tokenizer, config.model.pretrained)
    load.check_ids(shape, examples.train["input_ids"], examples.test["input_ids"])
    return examples


def _model(config: ExperimentConfig, examples: sources.Examples) -> tuple[Model, Base, dict | None]:
    """The model, its frozen weights, and the head to start from where central training left one."""
    num_classes = len(examples.class_names)
    model, base = load.build_model(config.model, num_classes, examples.image_shape)
    if base is not None:
        return model, base, None
    assert examples.public is not None  # a source of images brings a public part
    trainable = _exact(config, model, examples)  # frozen later, but trained now
    name = f"{_in_float32(config.model)} {examples.fingerprint}"
    base, head = pretrained(trainable, examples.public, config.pretrain, name)
    dtypes = jax.eval_shape(model.init, jax.random.key(0))
    return model, jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), base, dtypes), head


def _exact(config: ExperimentConfig, model: Model, examples: sources.Examples) -> Model:
    """The same model with products in float32, whose weights can be differentiated."""
    if config.model.compute_dtype == "float32":
        return model
    return load.build_model(_in_float32(config.model), len(examples.class_names), examples.image_shape)[0]


def _in_float32(config: load.ModelConfig) -> load.ModelConfig:
    return dataclasses.replace(config, compute_dtype="float32")


def _initial_adapters(config: ExperimentConfig, model: Model, head: dict | None) -> Callable[[jax.Array], Adapters]:
    """From a key to the adapters that the first round starts from; their task head is `head` where there is one."""
    lora, chosen = config.lora, targets.choose(config.lora.targets, model.targets)

    def initial_adapters(key: jax.Array) -> Adapters:
        factor_key, head_key = jax.random.split(key)
        modules = adapters.init(factor_key, chosen, model.num_layers, lora.max_rank, lora.init_scale)
        return Adapters(modules=modules, head=model.init_head(head_key) if head is None else head)

    return initial_adapters


def _initial(
    config: ExperimentConfig, parts: Parts, initial_adapters: Callable[[jax.Array], Adapters], hyper: Hyper
) -> Initial:
    return Initial(
        adapters=initial_adapters,
        memory=parts.sparsifier.init,
        server=parts.optimizer.init,
        merged=_nothing_merged if parts.aggregator.merges else lambda adapters: {},
        ranks=_client_ranks(config),
        link=parts.link,
        hyper=hyper,
    )


def _link(config: ExperimentConfig) -> Link:
    make = perfect_link if config.control.name == "ideal" else make_link
    return make(config.wireless)


def _hyper(config: ExperimentConfig) -> Hyper:
    return Hyper(
        rank=jnp.float32(config.lora.rank),
        alpha=jnp.float32(config.lora.alpha),
        learning_rate=jnp.float32(config.local.optimizer.learning_rate),
        orthogonality=jnp.float32(config.sparsifier.orthogonality),
        keep_ratio=jnp.float32(config.control.keep_ratio),
    )


def _current_base(model: Model) -> Callable[[World, FedState], Base]:
    def current_base(world: World, state: FedState) -> Base:
        return adapters.add_to_base(world.base, state.merged, model.targets) if state.merged else world.base

    return current_base


def _drift_bits(correction: Drift, like: Adapters) -> Callable[[Scope], jax.Array]:
    """A client whose correction has a state sends the change of it and is sent the server's, both uncompressed."""
    if jax.tree.leaves(jax.eval_shape(correction.init_client, like)):
        return lambda scope: dense_bits(like, scope)
    return lambda scope: jnp.uint32(0)


def _check_fits(
    like: Adapters, sparsifier: Sparsifier, drift_bits: Callable[[Scope], jax.Array], extra_downlink_bits: int
) -> None:
    """Refuse counts that what goes beside the adapters could carry over uint32; a method checks its own alone."""
    whole = Scope.whole(jnp.ones(max_rank(like)))
    beside, values = int(drift_bits(whole)), trees.num_bytes(like) // 4
    # A value of a sparse broadcast comes with a bit of a bitmap.
    sent = {"uplink": sparsifier.payload_bits(jnp.ones(()), whole), "downlink": 33 * values + extra_downlink_bits}
    for name, bits in sent.items():
        if int(bits) + beside >= 2**32:
            raise ValueError(f"{name} bits of one client must be below 2**32, got {int(bits) + beside}")


def _nothing_merged(like: Adapters) -> dict[str, jax.Array]:
    return {name: jnp.zeros((f.a.shape[0], f.a.shape[1], f.b.shape[2])) for name, f in like.modules.items()}


def _client_ranks(config: ExperimentConfig) -> jax.Array:
    """`[K]`: the ranks that the clients are dealt in turn, or the one that all have."""
    dealt = config.lora.client_ranks or (config.lora.rank,)
    return jnp.float32(jnp.resize(jnp.array(dealt), (config.clients.count,)))


_ACTIVATIONS: dict[Any, int] = {}
"""Bytes of one client's activations, by all that decides about them: a sweep over other keys asks for the same."""


def _activation_bytes(
    config: ExperimentConfig, parts: Parts, model: Model, world: World, like: Adapters, batch_size: int
) -> int:
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), (like, world.base, world.data.train))
    decisive = (config.model, config.aggregation, batch_size, str(shapes))
    if decisive not in _ACTIVATIONS:
        methods = parts.sparsifier, parts.aggregator
        _ACTIVATIONS[decisive] = activation_bytes(model, *methods, world, like, _hyper(config), batch_size)
    return _ACTIVATIONS[decisive]


def _chunk(config: ExperimentConfig, parts: Parts, activations: int) -> int:
    """Clients at once on each device, where one client's activations take so many bytes."""
    cohort_per_device = -(-parts.cohort_size // parts.mesh.size)
    if config.engine.client_chunk != "auto":
        return min(config.engine.client_chunk, cohort_per_device)
    return choose_chunk(cohort_per_device, activations, activation_budget_bytes())
