"""From a configuration to a simulation: data and weights on the device, and the records of a round made of numbers."""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_lora.adapters import layer_ranks, targets
from fedjax_lora.adapters.layer_ranks import LayerRanks
from fedjax_lora.adapters.lora import start_from
from fedjax_lora.config import host_pool
from fedjax_lora.config.beginning import Begin, given_adapters
from fedjax_lora.config.catalogue import Catalogue, check, notes
from fedjax_lora.config.examples import facts_of
from fedjax_lora.config.examples import read_examples as read_examples
from fedjax_lora.config.experiment import ExperimentConfig
from fedjax_lora.config.kept import client_activations, shared_program
from fedjax_lora.config.layout import layout_of, packed
from fedjax_lora.core import hosts
from fedjax_lora.core import memory as machine
from fedjax_lora.core.errors import ConfigError, ConfigWarning
from fedjax_lora.core.learning import Model
from fedjax_lora.core.methods import Context, Method
from fedjax_lora.core.numbers import Numbers, fill, split
from fedjax_lora.core.sides import Side, TrainingOptions
from fedjax_lora.core.types import Adapters, Base, Factors
from fedjax_lora.data import sources
from fedjax_lora.data.partition import Partition, PartitionConfig, partition
from fedjax_lora.sim import memory
from fedjax_lora.sim.chunk import chunk_size
from fedjax_lora.sim.engine import Program, Simulation, first_state
from fedjax_lora.sim.full_gradient import make_full_gradient
from fedjax_lora.sim.parts import Layout, Parts, World
from fedjax_lora.sparsifiers import transforms
from fedjax_lora.training.local import LocalConfig
from fedjax_lora.training.pretrain import pretrained

CLIENT_WEIGHTS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "examples": lambda count: count.astype(jnp.float32),
    "equal": lambda count: jnp.ones(count.shape),
}

SLOTS = (
    "task",
    "adapter",
    "model",
    "wireless",
    "control",
    "arrival",
    "sparsifier",
    "aggregation",
    "drift",
    "server",
    "training",
)
"""Of the records, in the order in which they are made; each is told those before it."""


def build(config: ExperimentConfig, methods: Sequence[Method] = (), *, draft: bool = False) -> Simulation:
    """A simulation with its data and weights on the device.

    Warns with a ConfigWarning where options are known to degenerate.

    Args:
      config: of the experiment.
      methods: a user's own, beside the package's.
      draft: to be looked at, not to be run: weights that would be pre-trained are drawn, and memory is not checked.

    Raises:
      ConfigError: the parts of the configuration do not fit together, or a file that it names is missing or
        damaged; one line.
    """
    catalogue = Catalogue.of(methods)
    check(config, catalogue)
    try:
        simulation = _build(config, catalogue, draft)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error
    for note in notes(config, catalogue):
        warnings.warn(note, ConfigWarning, stacklevel=2)
    return simulation


def _build(config: ExperimentConfig, catalogue: Catalogue, draft: bool) -> Simulation:
    examples = read_examples(config, catalogue)
    examples = examples._replace(public=None) if draft else examples
    split_data = partition(
        config.clients.partition, examples.train["label"], config.clients.count, config.seed, examples.clients
    )
    asked, config = config.local, dataclasses.replace(config, local=filled(config.local, split_data))
    context = _context(config, examples)
    model = records(config, catalogue, context, ("task", "adapter", "model"))["model"]
    base, head = _weights(config, catalogue, context, model, examples)
    begin = Begin(head, given_adapters(config, model, base, examples.class_names))
    data, feed = host_pool.dataset(config, examples, split_data)
    world = World(base=base, data=data)
    structure, numbers = split(config)
    like = jax.eval_shape(lambda key: _initial_adapters(config, catalogue, context, begin)(key), jax.random.key(0))
    context = context._replace(like=like)
    host_pool.check(config, made := records(config, catalogue, context), examples.test)
    layout = layout_of(config, context, made, model)
    padded = functools.partial(_parts, structure, catalogue, context, begin, layout)
    activations = client_activations(config, catalogue, padded, numbers, world, like)
    layout = layout._replace(chunk=chunk_size(config.engine, layout, activations))
    # Devices that hold one base together exchange inside a batch, where all must do the same: packed widths differ.
    if model.packs and "attention_mask" in examples.train and layout.model_devices == 1:
        context, layout = packed(config, context, layout, examples)
    parts_of = functools.partial(functools.partial, _parts, structure, catalogue, context, begin)
    engine = dataclasses.replace(config.engine, eval_every=min(config.engine.eval_every, config.rounds))
    start = functools.partial(first_state, parts_of(layout), config.clients.count)
    state = jax.eval_shape(start, jax.random.key(0), numbers)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), base)
    needs = memory.Needs(World(shapes, world.data), state, activations, model.num_layers, asked, engine, feed)
    if not draft:
        machine.check(memory.run_terms(needs, layout), layout.mesh.size)
    facts = facts_of(config, examples, split_data, base, begin)
    of_weights = facts.initial_hash, facts.base_hash if head is not None else facts.model_config_hash
    decisive = split(without_draws(config))[0], engine, catalogue, of_weights, str(context), layout
    return Simulation(
        program=shared_program(decisive, lambda: Program(parts_of, layout, engine, config.clients.count)),
        numbers=numbers,
        world=world,
        eval_every=engine.eval_every,
        facts=facts,
        full_gradient=make_full_gradient(
            *_exact(config, catalogue, context), config.engine.eval_batch_size, layout.packing
        ),
        needs=needs,
        feed=feed,
    )


def without_draws(config: ExperimentConfig) -> ExperimentConfig:
    """The configuration without what is drawn from it: its seed and who holds which examples.

    How many each client of a sampled population draws stays: it is a shape of the program.
    """
    drawn = config.clients.partition
    shape = PartitionConfig() if drawn.examples is None else PartitionConfig(kind=drawn.kind, examples=drawn.examples)
    return dataclasses.replace(config, seed=0, clients=dataclasses.replace(config.clients, partition=shape))


def records(
    config: ExperimentConfig, catalogue: Catalogue, context: Context, slots: Sequence[str] = SLOTS
) -> dict[str, Any]:
    """The records of these slots, in this order, each of which is told those before it.

    Args:
      config: with numbers in its traced fields, concrete or traced.
      catalogue, context: see there.
      slots: those that come before them are in `context.made`.
    """
    made = dict(context.made)
    for slot in slots:
        options, own = getattr(config, slot), context._replace(made=dict(made))
        make, side = catalogue.find(slot, options.name).make, side_of(config, made)
        if slot == "sparsifier" and side is not None:
            made[slot] = side.sparsifier(make(options, own._replace(like=side.shapes(own.like))))
        else:
            made[slot] = make(options, own)
        if slot == "model" and (layers := layers_of(config, made[slot])) is not None:
            made["adapter"] = layers.adapter(made["adapter"])  # only now are the names of the modules known
    return made


def layers_of(config: ExperimentConfig, model: Model) -> LayerRanks | None:
    """Ranks and scales of the layers, where they differ."""
    if not config.lora.rank_pattern and not config.lora.alpha_pattern:
        return None
    sites = targets.choose(config.lora.targets, model.sites, model.num_layers)
    return layer_ranks.resolve(config.lora, sites, model.num_layers)


def side_of(config: ExperimentConfig, made: Mapping[str, Any]) -> Side | None:
    """What of the adapters is at the device; None for all, or before there is a model."""
    if "model" not in made or not isinstance(config.training, TrainingOptions):
        return None
    return config.training.side(made["model"].num_layers)


def _parts(
    structure: ExperimentConfig,
    catalogue: Catalogue,
    context: Context,
    begin: Begin,
    layout: Layout,
    numbers: Numbers,
) -> Parts:
    """What a round is made of, with these numbers: see `MakeParts`."""
    config = fill(structure, numbers)
    made = records(config, catalogue, context._replace(local=config.local))
    rank, layers = jnp.asarray(config.lora.rank, jnp.float32), layers_of(config, made["model"])
    most, scale = layer_ranks.structural_rank(layers, rank), config.lora.alpha / rank
    side, of_layers = side_of(config, made), {} if layers is None else layers.ranks
    return Parts(
        model=made["model"],
        adapter=made["adapter"],
        task=made["task"],
        trainer=made["training"],
        sparsifier=made["sparsifier"],
        transforms=transforms.chain(config.wire),
        aggregator=made["aggregation"],
        correction=made["drift"],
        controller=made["control"],
        wireless=made["wireless"],
        server=made["server"],
        client_weight=CLIENT_WEIGHTS[config.clients.weighting],
        rank=most,
        scale=scale,
        ranks=_client_ranks(config, most),
        init_adapters=_initial_adapters(config, catalogue, context, begin),
        layout=layout,
        side=side,
        layer_ranks=of_layers if side is None else side.take_layers(of_layers),
        layer_scales={} if layers is None else {name: scale * share for name, share in layers.shares.items()},
        arrival=made["arrival"],
    )


def filled(local: LocalConfig, split_data: Partition) -> LocalConfig:
    """Local training with no more places in a batch than the largest client fills."""
    return dataclasses.replace(local, batch_size=min(local.batch_size, int(split_data.count.max())))


def _context(config: ExperimentConfig, examples: sources.Examples) -> Context:
    return Context(
        num_clients=config.clients.count,
        cohort_size=config.clients.per_round or config.clients.count,
        num_classes=len(examples.class_names),
        image_shape=examples.image_shape,
        rounds=config.rounds,
        local=config.local,
        num_examples=len(examples.train["label"]),
    )


def _weights(
    config: ExperimentConfig, catalogue: Catalogue, context: Context, model: Model, examples: sources.Examples
) -> tuple[Base, dict | None]:
    """The frozen weights, and the head to start from where central training left one."""
    if model.weights is not None:
        with jax.default_device(hosts.memory()):
            return model.weights(), None
    if examples.public is None:  # nothing to train it on
        return model.init(jax.random.key(0)), None
    trainable, _, task = _exact(config, catalogue, context)  # frozen later, but trained now
    name = f"{_in_float32(config).model} {examples.fingerprint}"
    base, head = pretrained(trainable, task, examples.public, config.pretrain, name)
    dtypes = jax.eval_shape(model.init, jax.random.key(0))
    return jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), base, dtypes), head


def _exact(config: ExperimentConfig, catalogue: Catalogue, context: Context):
    """The same model with products in float32, whose weights can be differentiated, with its adapter and its task."""
    made = records(_in_float32(config), catalogue, context, ("task", "adapter", "model"))
    return made["model"], made["adapter"], made["task"]


def _in_float32(config: ExperimentConfig) -> ExperimentConfig:
    model: Any = config.model
    dtypes = {name: "float32" for name in ("compute_dtype", "activation_dtype") if hasattr(model, name)}
    return dataclasses.replace(config, model=dataclasses.replace(model, **dtypes))


def _initial_adapters(
    config: ExperimentConfig, catalogue: Catalogue, context: Context, begin: Begin
) -> Callable[[jax.Array], Adapters]:
    """From a key to the adapters that the first round starts from, of which what `begin` holds is not drawn."""
    made = records(config, catalogue, context, ("task", "adapter", "model"))
    model, adapter, lora, given = made["model"], made["adapter"], config.lora, begin.given
    sites, layers = targets.choose(lora.targets, model.sites, model.num_layers), layers_of(config, model)

    def initial_adapters(key: jax.Array) -> Adapters:
        factor_key, head_key = jax.random.split(key)
        modules = adapter.init(factor_key, sites, model.num_layers, lora.max_rank, lora.init_scale)
        head = begin.head
        if given is not None:
            own = {name: Factors(a=jnp.asarray(a), b=jnp.asarray(given.b[name])) for name, a in given.a.items()}
            modules = start_from(modules, own, given.ranks, lora.alpha / jnp.asarray(lora.rank, jnp.float32))
            modules = modules if layers is None else layers.unscaled(modules)
            head = jax.tree.map(jnp.asarray, given.head) or head
        return Adapters(modules=modules, head=model.init_head(head_key) if head is None else head)

    return initial_adapters


def _client_ranks(config: ExperimentConfig, rank: jax.Array) -> jax.Array:
    """`[K]`: the ranks that the clients are dealt in turn, or the one that all have."""
    dealt = config.lora.client_ranks if len(config.lora.client_ranks) else rank
    return jnp.resize(jnp.asarray(dealt, jnp.float32), (config.clients.count,))
