"""Small inputs for the laws: nothing is square, since square shapes hide a transpose.

DIMENSIONS names their sizes by the letters of `core.types`.
"""

from collections.abc import Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from fedjax_lora.config import catalogue
from fedjax_lora.core.exchange import Received
from fedjax_lora.core.learning import Features, Hidden, Learned, Site, Work
from fedjax_lora.core.methods import Context
from fedjax_lora.core.network import Observation, Radio
from fedjax_lora.core.types import IGNORED, Adapters, Factors, Scope

NUM_CLIENTS, COHORT_SIZE, NUM_LAYERS, MAX_RANK = 6, 4, 2, 4

DIMENSIONS = chex.Dimensions(K=NUM_CLIENTS, C=COHORT_SIZE, L=NUM_LAYERS, R=MAX_RANK)
"""Sizes of the examples by the letters of the glossary: `DIMENSIONS["CR"]` is the shape `[C, R]`."""

RANK = 3
"""Structural rank: below R, so that a rank that is not in use is among them."""

WIDTHS = {"query": (5, 7), "up": (8, 6)}
"""Module -> n_in, n_out."""

SITES = {name: Site(name, first, *WIDTHS[name]) for first, name in ((2, "query"), (3, "up"))}
"""Where they sit: not in the first columns of their matrices."""

BATCH_SIZE = 6
"""Examples of a batch, B."""

LENGTH, VOCABULARY = 5, 10
"""Positions of a text, S, and the words that it is of."""

IMAGE_SHAPE = (8, 8, 1)
"""Height, width and channels, where images are asked for."""

SCALE = 2.0
"""s = alpha / r."""

WEIGHTS = (0.4, 0.3, 0.2, 0.1)
"""p, of the clients of a cohort."""


def adapters(seed: int, ranks: int = RANK) -> Adapters:
    """Adapters whose first `ranks` components are random and whose others are zero in b."""

    def factors(key: Array, n_in: int, n_out: int) -> Factors:
        a_key, b_key = jax.random.split(key)
        used = (jnp.arange(MAX_RANK) < ranks)[:, None]
        a = jax.random.normal(a_key, (NUM_LAYERS, n_in, MAX_RANK))
        return Factors(a=a, b=used * jax.random.normal(b_key, (NUM_LAYERS, MAX_RANK, n_out)))

    keys = jax.random.split(jax.random.key(seed), len(WIDTHS) + 1)
    modules = {name: factors(key, *widths) for (name, widths), key in zip(WIDTHS.items(), keys[1:], strict=True)}
    head = {"w": jax.random.normal(keys[0], (5, 3)), "b": jnp.zeros(3)}
    return Adapters(modules=modules, head=head)


def trained(seed: int, start: Adapters, scope: Scope) -> Adapters:
    """What a client may have trained from `start`: other than it in all that is in scope."""
    step = adapters(seed)
    return scope.select(jax.tree.map(lambda x, y: x + 0.3 * y, start, step), start)


def scope(rank: float = RANK, a: ArrayLike = 1.0, b: ArrayLike = 1.0, head: ArrayLike = 1.0) -> Scope:
    """What is trained and sent."""
    ranks = (jnp.arange(MAX_RANK) < rank).astype(jnp.float32)
    return Scope(ranks, *map(jnp.float32, (a, b, head)))


def context(**more) -> Context:
    """Of an experiment with these shapes."""
    given: dict[str, Any] = {"num_clients": NUM_CLIENTS, "cohort_size": COHORT_SIZE, "num_classes": 3}
    return Context(**(given | {"like": jax.eval_shape(lambda: adapters(0))} | more))


def made(context: Context, slots: Sequence[str]) -> Context:
    """The context with the records of these slots added, the package's defaults, each told those before it."""
    for slot in slots:
        method = next(method for method in catalogue.METHODS if method.slot == slot)
        context = context._replace(made={**context.made, slot: method.make(method.options(), context)})
    return context


def batch(context: Context, learns: Learned = "label") -> dict[str, Array]:
    """Examples `[B, ...]` of images or of text, whichever the model reads, with labels and what a task learns."""
    image_key, token_key, label_key = jax.random.split(jax.random.key(9), 3)
    image_shape = context.image_shape or IMAGE_SHAPE
    real = jnp.arange(LENGTH) < 2 + jnp.arange(BATCH_SIZE)[:, None] % 4
    return {
        "image": jax.random.uniform(image_key, (BATCH_SIZE, *image_shape)),
        "input_ids": jax.random.randint(token_key, (BATCH_SIZE, LENGTH), 0, VOCABULARY) * real,
        "attention_mask": real.astype(jnp.int32),
        "label": jax.random.randint(label_key, (BATCH_SIZE,), 0, context.num_classes),
        **_target(context, learns, real),
    }


def _target(context: Context, learns: Learned, real: Array) -> dict[str, Array]:
    """What is learned beside the label; of positions, none counts that is not real, or is the second."""
    key = jax.random.key(10)
    if learns == "label":
        return {}
    if learns == "number":
        return {"target": jax.random.normal(key, (BATCH_SIZE,))}
    target = jax.random.randint(key, real.shape, 0, VOCABULARY if learns == "next_token" else context.num_classes)
    return {"target": jnp.where(real & (jnp.arange(LENGTH) != 1), target, IGNORED)}


def features(d: int) -> Features:
    """What a task reads of a model of width d on such a batch: random, pooled at the first position."""
    value_key, table_key = jax.random.split(jax.random.key(1))
    values = jax.random.normal(value_key, (BATCH_SIZE, LENGTH, d))
    table = jax.random.normal(table_key, (d, VOCABULARY))
    return Features(Hidden(values, jnp.ones((BATCH_SIZE, LENGTH))), lambda: values[:, 0], lambda: values @ table)


def tokenizer() -> Any:
    """A tokenizer of whole words, all of which are unknown to it but a few."""
    import transformers  # slow to import, and only sentences need it
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: number for number, word in enumerate(("[PAD]", "[UNK]", "a", "the", "good", "bad"))}
    core = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]")


def stack(trees: list) -> Any:
    """Trees as one, with a leading axis."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def everything(clients: Adapters) -> Received:
    """Updates `[C, ...]` that have arrived as they are."""
    used = (jnp.arange(MAX_RANK) < RANK).astype(jnp.float32)
    return Received(clients, {name: jnp.broadcast_to(used, (COHORT_SIZE, NUM_LAYERS, MAX_RANK)) for name in WIDTHS})


def observation(seed: int = 0) -> Observation:
    """A cohort of which the last client is absent and the first is heard badly."""
    cohort, ranks = COHORT_SIZE, MAX_RANK
    snr_key, start_key, tail_key = jax.random.split(jax.random.key(seed), 3)
    heard = jnp.arange(cohort) < cohort - 1
    falls = jnp.sort(jax.random.uniform(tail_key, (cohort, RANK)), descending=True)
    tail = jnp.cumsum(jnp.pad(falls, ((0, 0), (0, ranks + 1 - RANK)))[:, ::-1], axis=1)[:, ::-1]
    kept = jnp.clip(jnp.arange(ranks + 1.0), 1.0, RANK)
    snr_hz = jnp.exp(13.0 + 3.0 * jax.random.uniform(snr_key, (cohort,))).at[0].divide(30.0)
    start_s = jnp.where(heard, jax.random.uniform(start_key, (cohort,)), 0.0)
    weights = jnp.where(heard, jnp.array(WEIGHTS), 0.0)
    return Observation(
        radio=Radio(snr_hz, start_s, jnp.float32(1e6), jnp.float32(0.01)),
        weights=weights / jnp.sum(weights),
        rank=jnp.full(cohort, float(RANK)),
        tail_energy=tail,
        bits=jnp.broadcast_to(2e4 * kept + 500.0, (cohort, ranks + 1)),
    )


def work(clients: int) -> Work:
    """Of clients that compute different numbers of examples."""
    return Work(samples=10.0 + jnp.arange(clients))
