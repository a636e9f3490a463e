"""HetLoRA against NumPy loops with explicit products."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_lora.aggregation.hetlora import HetLoraConfig, make
from fedjax_lora.core.methods import Context
from fedjax_lora.core.numbers import fill, split
from oracles.sparsifier_oracle import LAYERS, MAX_RANK, WIDTHS, product, random_adapters, rank_mask, stack, trained_from
from oracles.uploads import uploads

START = random_adapters(0)
WEIGHTS = np.array([0.4, 0.0, 0.35, 0.25])
RANKS = [1, 6, 5, 2]
SCALE = jnp.float32(2.0)
KEY = jax.random.key(0)
CONTEXT = Context(num_clients=4, cohort_size=4)
AGGREGATE = jax.jit(make(HetLoraConfig(), CONTEXT).aggregate)


def cohort():
    """Four clients of ranks 1, 6 (absent), 5 and 2, of steps of unlike size, and what the server decodes."""
    steps = zip((1, 2, 3, 4), (0.1, 1.0, 0.5, 2.0), RANKS, strict=True)
    trained = stack([trained_from(START, seed, step, rank) for seed, step, rank in steps])
    return trained, uploads(START, trained, np.stack([rank_mask(rank) for rank in RANKS]))


def padded_average(trained, name, layer):
    """Factors of one layer by loops: weights p_k ||a_k b_k||_F, zeros where a client has no component."""
    factors = [jax.tree.map(lambda x, k=k: x[k], trained.modules[name]) for k in range(4)]
    norms = [np.linalg.norm(product(f, layer, range(rank))) for f, rank in zip(factors, RANKS, strict=True)]
    total = sum(p * norm for p, norm in zip(WEIGHTS, norms, strict=True))
    w = [p * norm / total for p, norm in zip(WEIGHTS, norms, strict=True)]
    n_in, n_out = WIDTHS[name]
    a, b = np.zeros((n_in, MAX_RANK)), np.zeros((MAX_RANK, n_out))
    for k, f in enumerate(factors):
        for i in range(RANKS[k]):
            a[:, i] += w[k] * np.float64(f.a[layer, :, i])
            b[i] += w[k] * np.float64(f.b[layer, i])
    # Component 5 is of the absent client alone: it stays as it was broadcast.
    a[:, 5], b[5] = START.modules[name].a[layer, :, 5], START.modules[name].b[layer, 5]
    return a, b, w


def test_average_equals_loop():
    trained, received = cohort()
    found = AGGREGATE(START, trained, received, jnp.float32(WEIGHTS), SCALE, KEY).adapters
    for name in WIDTHS:
        for layer in range(LAYERS):
            a, b, _ = padded_average(trained, name, layer)
            np.testing.assert_allclose(found.modules[name].a[layer], a, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(found.modules[name].b[layer], b, rtol=1e-4, atol=1e-5)
    for name, leaf in found.head.items():
        expected = sum(p * np.float64(trained.head[name][k]) for k, p in enumerate(WEIGHTS))
        np.testing.assert_allclose(leaf, expected, rtol=1e-5, atol=1e-6)


def test_identity_of_averages_and_both_error_norms():
    """Explicit matrices: ideal = product of averages + Cov + E_s, and the norms are those of the terms."""
    trained, received = cohort()
    found = AGGREGATE(START, trained, received, jnp.float32(WEIGHTS), SCALE, KEY)
    sparsification = covariance = 0.0
    for name in WIDTHS:
        for layer in range(LAYERS):
            a, b, w = padded_average(trained, name, layer)
            ideal, cov, e_s = 0.0, 0.0, 0.0
            for k, p in enumerate(WEIGHTS):
                mine = jax.tree.map(lambda x, k=k: x[k], trained.modules[name])
                keep = rank_mask(RANKS[k])
                own_a, own_b = np.float64(mine.a[layer]) * keep, np.float64(mine.b[layer]) * keep[:, None]
                own_a[:, 5], own_b[5] = a[:, 5], b[5]  # of nobody: all are taken to hold the broadcast
                ideal = ideal + p * product(mine, layer)
                cov = cov + w[k] * (own_a - a) @ (own_b - b)
                e_s = e_s + p * product(mine, layer) - w[k] * own_a @ own_b
            np.testing.assert_allclose(ideal, a @ b + cov + e_s, atol=1e-5)
            covariance, sparsification = covariance + np.sum(cov**2), sparsification + np.sum(e_s**2)
    np.testing.assert_allclose(found.covariance_error, 2 * np.sqrt(covariance), rtol=1e-4)
    np.testing.assert_allclose(found.sparsification_error, 2 * np.sqrt(sparsification), rtol=1e-4)


def test_where_all_products_are_zero_clients_weigh_p():
    """Closed form: from b = 0 that nobody has moved, the averages of a by p."""
    trained, received = cohort()
    zeros = jax.tree.map(lambda f: f, received.adapters.modules)
    zeros = {name: f.replace(b=jnp.zeros_like(f.b)) for name, f in zeros.items()}
    received = received.replace(adapters=received.adapters.replace(modules=zeros))
    found = AGGREGATE(START, trained, received, jnp.float32(WEIGHTS), SCALE, KEY).adapters
    for name, f in zeros.items():
        expected = sum(p * np.float64(f.a[k, :, :, 0]) for k, p in enumerate(WEIGHTS))
        np.testing.assert_allclose(found.modules[name].a[:, :, 0], expected, rtol=1e-5, atol=1e-6)


def trailing(adapters, shorter, rank):
    """`||a tail|| ||b tail||` of the components from `shorter` to `rank`, summed, entry by entry."""
    total = 0.0
    for name, (n_in, n_out) in WIDTHS.items():
        a, b = (np.asarray(x, np.float64) for x in (adapters.modules[name].a, adapters.modules[name].b))
        for layer in range(LAYERS):
            of_a = of_b = 0.0
            for i in range(shorter, rank):
                of_a += sum(a[layer, row, i] ** 2 for row in range(n_in))
                of_b += sum(b[layer, i, column] ** 2 for column in range(n_out))
            total += np.sqrt(of_a) * np.sqrt(of_b)
    return total


FALLS = [(0.7, 6, 4), (0.7, 5, 3), (0.7, 3, 2), (0.7, 2, 1), (0.7, 1, 1), (0.99, 6, 5), (0.99, 2, 1), (0.1, 6, 1)]


@pytest.mark.parametrize(("prune", "rank", "shorter"), FALLS)
def test_the_penalty_is_that_of_a_loop(prune, rank, shorter):
    """Oracle: the loop of `trailing`; ranks that stay and ranks beyond the client's own have no say."""
    penalty = jax.jit(make(HetLoraConfig(prune=prune, regularisation=0.3), CONTEXT).penalty)
    found = penalty(START, jnp.asarray(rank_mask(rank)))
    np.testing.assert_allclose(found, 0.3 * trailing(START, shorter, rank), rtol=1e-5)
    assert (found > 0) == (rank > 1)


@pytest.mark.parametrize(("prune", "rank", "shorter"), FALLS)
@pytest.mark.parametrize("shrink", [0.99, 1.0, 1.01])
def test_a_rank_falls_exactly_where_its_trailing_norms_ended_smaller(prune, rank, shorter, shrink):
    """Oracle: the loop of `trailing` before and after; the ranks that stay, and those beyond, move the other way."""
    factor = np.where((np.arange(MAX_RANK) >= shorter) & (np.arange(MAX_RANK) < rank), shrink, 2.0 - shrink)
    modules = {name: f.replace(b=f.b * jnp.float32(factor)[:, None]) for name, f in START.modules.items()}
    trained = START.replace(modules=modules)
    falls = trailing(trained, shorter, rank) < trailing(START, shorter, rank)
    assert falls == (shrink < 1 and rank > 1)
    next_rank = jax.jit(make(HetLoraConfig(prune=prune), CONTEXT).next_rank)
    assert next_rank(START, trained, jnp.float32(rank)) == (shorter if falls else rank)


def test_gradients_of_the_penalty_are_finite_at_the_start_and_else_autodiff_of_the_formula():
    """Closed form: 0 at b = 0; elsewhere d/db of ||a|| ||b|| is ||a|| b / ||b||, on the trailing ranks alone."""
    penalty, mask = make(HetLoraConfig(prune=0.5, regularisation=1.0), CONTEXT).penalty, jnp.asarray(rank_mask(4))
    fresh = START.replace(modules={n: f.replace(b=jnp.zeros_like(f.b)) for n, f in START.modules.items()})
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(jax.grad(penalty)(fresh, mask)))
    found = jax.grad(penalty)(START, mask).modules
    for name, f in START.modules.items():
        a, b = np.float64(f.a[:, :, 2:4]), np.float64(f.b[:, 2:4])
        of_a, of_b = (np.linalg.norm(x, axis=(1, 2), keepdims=True) for x in (a, b))
        expected_a, expected_b = np.zeros(f.a.shape), np.zeros(f.b.shape)
        expected_a[:, :, 2:4], expected_b[:, 2:4] = of_b * a / of_a, of_a * b / of_b
        np.testing.assert_allclose(found[name].a, expected_a, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found[name].b, expected_b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rank", [1, 2, 5, 6])
def test_without_pruning_no_rank_falls_and_nothing_is_penalised(rank):
    """Closed form: gamma = 1, traced as in a sweep, whatever training did to the factors."""
    structure, numbers = split(HetLoraConfig(prune=1.0, regularisation=0.3))

    @jax.jit
    def found(numbers, trained):
        method, mask = make(fill(structure, numbers), CONTEXT), jnp.asarray(rank_mask(rank))
        assert method.next_rank is not None
        gradient = jax.grad(method.penalty)(START, mask)
        return method.penalty(START, mask), gradient, method.next_rank(START, trained, jnp.float32(rank))

    for shrink in (0.5, 2.0):
        penalty, gradient, after = found(numbers, jax.tree.map(lambda x, s=shrink: s * x, START))
        assert penalty == 0.0
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient))
        assert after == rank


def test_pruning_is_what_breaks_equal_ranks():
    """By definition."""
    assert HetLoraConfig(prune=0.9).breaks() == {"one_rank": "prune"}
    assert HetLoraConfig(prune=1.0).breaks() == {}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prune": 0.0}, r"prune must be in \(0, 1\], got 0.0"),
        ({"prune": 1.5}, r"prune must be in \(0, 1\], got 1.5"),
        ({"regularisation": -0.1}, "regularisation must be finite and at least 0, got -0.1"),
        ({"regularisation": float("inf")}, "regularisation must be finite and at least 0, got inf"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(values, message):
    """The message itself."""
    with pytest.raises(ValueError, match=message):
        HetLoraConfig(**values)
