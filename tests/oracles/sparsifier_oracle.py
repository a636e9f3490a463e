"""Plain NumPy in float64, loops and all: what sparsification and averaging are checked against."""

import math

import jax
import numpy as np

from fedjax_lora.core.types import Adapters, Factors, Scope

LAYERS, MAX_RANK, RANK = 2, 6, 4
WIDTHS = {"query": (12, 20), "value": (13, 5)}
HEAD = {"bias": (3,), "kernel": (7, 3)}


def rank_mask(rank=RANK):
    """`[R]` mask of a structural rank."""
    return (np.arange(MAX_RANK) < rank).astype(np.float32)


def scope(rank=RANK, factors="ab"):
    """These factors and the head, in the first `rank` components."""
    whole = Scope.whole(jax.numpy.asarray(rank_mask(rank)))
    return whole.replace(a=jax.numpy.float32("a" in factors), b=jax.numpy.float32("b" in factors))


def random_adapters(seed, clients=None):
    """Adapters of Gaussian factors; with `clients`, every leaf has that leading axis."""
    generator = np.random.default_rng(seed)
    lead = () if clients is None else (clients,)

    def draw(*shape):
        return jax.numpy.asarray(generator.standard_normal(lead + shape), jax.numpy.float32)

    modules = {
        name: Factors(a=draw(LAYERS, n_in, MAX_RANK), b=draw(LAYERS, MAX_RANK, n_out))
        for name, (n_in, n_out) in WIDTHS.items()
    }
    return Adapters(modules=modules, head={name: draw(*shape) for name, shape in HEAD.items()})


def trained_from(start, seed, step=0.3, rank=RANK):
    """`start` after a random update of the ranks in use and of the head."""
    update, mask = random_adapters(seed), rank_mask(rank)
    modules = {
        name: Factors(
            a=f.a + step * update.modules[name].a * mask, b=f.b + step * update.modules[name].b * mask[:, None]
        )
        for name, f in start.modules.items()
    }
    return Adapters(modules=modules, head=jax.tree.map(lambda x, u: x + step * u, start.head, update.head))


def stack(adapters):
    """A list of adapters with a leading client axis."""
    return jax.tree.map(lambda *leaves: jax.numpy.stack(leaves), *adapters)


def components(factors, layer):
    """The R rank components of one layer as explicit matrices."""
    a, b = np.asarray(factors.a, np.float64)[layer], np.asarray(factors.b, np.float64)[layer]
    return [np.outer(a[:, i], b[i]) for i in range(a.shape[1])]


def product(factors, layer, ranks=None):
    """Sum of the components `ranks` of one layer (default: all)."""
    parts = components(factors, layer)
    return sum((parts[i] for i in (range(len(parts)) if ranks is None else ranks)), np.zeros_like(parts[0]))


def payload_bits(counts, index, extra=0, value_bits=32, factors="ab", known=True):
    """Bits of a payload, value by value.

    counts: module -> list over layers of the number of components sent.
    index: whether each matrix says which ranks it sends. known: whether the receiver knows how many they are.
    extra: values in full that each factor's part of a component comes with.
    value_bits: of each number; below 32 each tensor has a scale in full.
    factors: which are sent.
    """
    bits = common_bits(value_bits, factors)
    for name, kept in counts.items():
        for k in kept:
            for _ in range(k):
                for factor in factors:
                    bits += value_bits * WIDTHS[name]["ab".index(factor)] + 32 * extra
            if index:
                bits += min(MAX_RANK, k * math.ceil(math.log2(MAX_RANK))) if known else MAX_RANK
    return bits


def element_bits(ratio, value_bits=32, factors="ab", rank=RANK):
    """Bits of a payload of single values with their positions."""
    pool = 0
    for n_in, n_out in WIDTHS.values():
        pool += LAYERS * rank * sum({"a": n_in, "b": n_out}[factor] for factor in factors)
    count = max(1, math.floor(ratio * pool))
    return common_bits(value_bits, factors) + count * value_bits + min(pool, count * math.ceil(math.log2(pool)))


def common_bits(value_bits=32, factors="ab"):
    """Bits of the head, and of a scale for every matrix and leaf where values are quantised."""
    bits = 0
    for shape in HEAD.values():
        bits += value_bits * math.prod(shape)
    if value_bits < 32:
        bits += 32 * (len(HEAD) + len(WIDTHS) * LAYERS * len(factors))
    return bits


def fedit(broadcast, decoded, counted, weights):
    """Weighted averages by loops over clients, layers and ranks; also the weights `w[name][k, layer, i]`."""
    averages, component_weights = {}, {}
    for name, f in broadcast.modules.items():
        a, b = np.array(f.a, np.float64), np.array(f.b, np.float64)
        w = np.zeros((len(weights), LAYERS, MAX_RANK))
        for layer in range(LAYERS):
            for i in range(MAX_RANK):
                total = sum(weights[k] * counted[name][k, layer, i] for k in range(len(weights)))
                if total == 0:
                    continue
                a[layer, :, i], b[layer, i] = 0, 0
                for k in range(len(weights)):
                    w[k, layer, i] = weights[k] * counted[name][k, layer, i] / total
                    a[layer, :, i] += w[k, layer, i] * np.asarray(decoded.modules[name].a)[k, layer, :, i]
                    b[layer, i] += w[k, layer, i] * np.asarray(decoded.modules[name].b)[k, layer, i]
        averages[name], component_weights[name] = (a, b), w
    return averages, component_weights
