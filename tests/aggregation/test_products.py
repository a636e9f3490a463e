"""FedEx-LoRA, FLoRA, FlexLoRA and LoRA-FAIR against explicit matrices in NumPy, on modules that are not square."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_lora.aggregation import errors, fedex, fedit, flexlora, flora, lora_fair
from fedjax_lora.aggregation.products import product_bits
from fedjax_lora.core.exchange import Received
from fedjax_lora.core.methods import Context
from fedjax_lora.core.types import Adapters, Factors
from fedjax_lora.ops.factorise import orthonormal
from fedjax_lora.ops.products import differences
from oracles import sparsifier_oracle as oracle
from oracles.sparsifier_oracle import LAYERS, MAX_RANK, WIDTHS, product, random_adapters, stack

CONTEXT = Context(num_clients=4, cohort_size=4)
METHODS = {
    "fedit": fedit.make(fedit.FedItConfig(), CONTEXT),
    "fedex": fedex.make(fedex.FedExConfig(), CONTEXT),
    "fedex reinit": fedex.make(fedex.FedExConfig(start="reinit"), CONTEXT),
    "flora": flora.make(flora.FloraConfig(), CONTEXT),
    "flexlora": flexlora.make(flexlora.FlexLoraConfig(), CONTEXT),
    "lora_fair": lora_fair.make(lora_fair.LoraFairConfig(regularisation=0.3), CONTEXT),
}
AGGREGATE = {name: jax.jit(method.aggregate) for name, method in METHODS.items()}
BROADCAST = random_adapters(0)
WEIGHTS = np.array([0.5, 0.0, 0.2, 0.3])
SCALE = 2.0
KEY = jax.random.key(0)
MATRICES = [(name, layer) for name in WIDTHS for layer in range(LAYERS)]


def cohort(ranks, seed=1, same=False):
    """Clients that hold their first `ranks` components, and nothing beside."""
    clients = []
    for k, rank in enumerate(ranks):
        one, mask = random_adapters(seed + (0 if same else k)), jnp.arange(MAX_RANK) < rank
        modules = {name: Factors(a=f.a, b=f.b * mask[:, None]) for name, f in one.modules.items()}
        clients.append(Adapters(modules=modules, head=one.head))
    return stack(clients)


def message(decoded, ranks):
    masks = np.stack([oracle.rank_mask(rank) for rank in ranks])
    counted = {name: jnp.asarray(np.repeat(masks[:, None], LAYERS, 1)) for name in WIDTHS}
    return Received(adapters=decoded, counted=counted)


def run(name, decoded, ranks, weights=WEIGHTS, broadcast=BROADCAST):
    return AGGREGATE[name](broadcast, decoded, message(decoded, ranks), jnp.float32(weights), jnp.float32(SCALE), KEY)


def ideal(decoded, name, layer, weights=WEIGHTS):
    """`s sum_k p_k a_k b_k` of one matrix."""
    clients = [jax.tree.map(lambda x, k=k: x[k], decoded.modules[name]) for k in range(len(weights))]
    return SCALE * sum(p * product(client, layer) for p, client in zip(weights, clients, strict=True))


def server(found, name, layer):
    """What the server's factors and what it merged make of one matrix."""
    merged = np.float64(found.merged[name][layer]) if found.merged else 0.0
    return SCALE * product(found.adapters.modules[name], layer) + merged


def norm(matrices):
    return np.sqrt(sum(np.sum(matrix**2) for matrix in matrices))


def test_equal_clients_give_one_product_whatever_the_method():
    """Invariance across methods, and the client's own product."""
    ranks = [4, 4, 4, 4]
    decoded = cohort(ranks, same=True)
    start = jax.tree.map(lambda x: x[0], cohort([4], seed=9))  # a rank that nobody uses adds nothing to the broadcast
    for method in METHODS:
        found = run(method, decoded, ranks, broadcast=start)
        for name, layer in MATRICES:
            np.testing.assert_allclose(server(found, name, layer), ideal(decoded, name, layer), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("ranks", [(2, 5, 2, 2), (2, 4, 3, 1)], ids=["one rank", "ranks of their own"])
@pytest.mark.parametrize("method", ["fedex", "fedex reinit", "flora", "flexlora"])
def test_exact_methods_give_the_mean_product_and_fedit_does_not(method, ranks):
    """Explicit matrices. The ranks of who takes part sum to R, so that FlexLoRA has nothing to cut off."""
    decoded = cohort(ranks)
    found, averaged = run(method, decoded, ranks), run("fedit", decoded, ranks)
    for name, layer in MATRICES:
        expected = ideal(decoded, name, layer)
        np.testing.assert_allclose(server(found, name, layer), expected, atol=1e-5 * np.abs(expected).max())
        assert np.abs(server(averaged, name, layer) - expected).max() > 0.1
    assert found.covariance_error < 1e-3 < averaged.covariance_error


@pytest.mark.parametrize("method", ["fedex", "flora", "flexlora", "lora_fair"])
def test_covariance_error_equals_explicit_matrices(method):
    """The norm of ideal minus server's product, over all matrices, with what is cut off and what counts where."""
    ranks = (6, 3, 6, 5)
    decoded = cohort(ranks)
    found = run(method, decoded, ranks)
    gap = norm(ideal(decoded, name, layer) - server(found, name, layer) for name, layer in MATRICES)
    np.testing.assert_allclose(found.covariance_error, gap, rtol=1e-4, atol=1e-3)
    assert gap > 1.0 or method in ("fedex", "flora")


def test_sparsification_error_equals_explicit_matrices():
    """The norm of `s sum_k p_k (a_k b_k - what the server decoded)`."""
    ranks = (6, 6, 6, 6)
    trained, decoded = cohort(ranks, seed=11), cohort(ranks)
    gap = norm(ideal(trained, name, layer) - ideal(decoded, name, layer) for name, layer in MATRICES)
    weights = jnp.float32(WEIGHTS)
    for method in ("fedex", "flora", "flexlora", "lora_fair"):
        found = AGGREGATE[method](BROADCAST, trained, message(decoded, ranks), weights, jnp.float32(SCALE), KEY)
        np.testing.assert_allclose(found.sparsification_error, gap, rtol=1e-5)


@pytest.mark.parametrize("method", ["fedex", "fedex reinit", "flora", "flexlora"])
def test_who_counts_in_a_component_does_not_change_the_mean_product(method):
    """Invariance: the product, and of FLoRA and FlexLoRA the factors, with all ranks counted and with some."""
    decoded, sums = cohort((2, 5, 2, 2)), {}
    for counted in ((6, 6, 6, 6), (3, 6, 1, 2)):
        sums[counted] = run(method, decoded, counted)
    (all_count, some_count) = sums.values()
    for name, layer in MATRICES:
        expected = server(all_count, name, layer)
        np.testing.assert_allclose(server(some_count, name, layer), expected, atol=1e-5 * np.abs(expected).max())
    if method != "fedex":
        jax.tree.map(np.testing.assert_array_equal, some_count.adapters, all_count.adapters)


def test_fedex_factors_are_those_of_fedit():
    """Oracle: the other method, to the bit."""
    ranks = (6, 3, 6, 5)
    decoded = cohort(ranks)
    found, expected = (run(method, decoded, ranks).adapters for method in ("fedex", "fedit"))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("method", ["flora", "fedex reinit"])
def test_a_new_start_is_orthogonal_of_the_same_length_and_zero(method):
    """Closed form of the Gram matrix; another key draws another a, and no two matrices share one."""
    start = Adapters(
        modules={
            name: Factors(a=0.7 * orthonormal(jax.random.key(3), (LAYERS, n_in, MAX_RANK)), b=BROADCAST.modules[name].b)
            for name, (n_in, _) in WIDTHS.items()
        },
        head=BROADCAST.head,
    )
    ranks = (4, 4, 4, 4)
    decoded = cohort(ranks)
    found = run(method, decoded, ranks, broadcast=start).adapters.modules
    for f in found.values():
        for layer in range(LAYERS):
            np.testing.assert_allclose(f.a[layer].T @ f.a[layer], 0.49 * np.eye(MAX_RANK), atol=1e-5)
        assert not np.any(f.b)
        assert np.abs(f.a[0] - f.a[1]).max() > 0.01
    args = start, decoded, message(decoded, ranks), jnp.float32(WEIGHTS), jnp.float32(SCALE)
    other = AGGREGATE[method](*args, jax.random.key(1)).adapters.modules
    assert np.abs(other["query"].a - found["query"].a).max() > 0.01


def test_flexlora_is_the_truncated_svd_with_balanced_factors():
    """Oracle: NumPy's SVD of the mean product; the first r components are its best approximation of rank r."""
    ranks = (6, 6, 6, 6)
    decoded = cohort(ranks)
    found = run("flexlora", decoded, ranks).adapters.modules
    for name, layer in MATRICES:
        u, size, v = np.linalg.svd(ideal(decoded, name, layer) / SCALE, full_matrices=False)
        for rank in (1, 3, 5):
            expected = (u[:, :rank] * size[:rank]) @ v[:rank]
            np.testing.assert_allclose(product(found[name], layer, range(rank)), expected, atol=2e-4)
        kept = min(MAX_RANK, len(size))
        lengths = np.linalg.norm(found[name].a[layer], axis=0), np.linalg.norm(found[name].b[layer], axis=1)
        np.testing.assert_allclose(lengths[0][:kept], np.sqrt(size[:kept]), rtol=1e-4)
        np.testing.assert_allclose(lengths[1][:kept], np.sqrt(size[:kept]), rtol=1e-4)


@pytest.mark.parametrize(("clients", "rank"), [(1, 6), (3, 2), (2, 6), (5, 6)], ids="{}".format)
def test_svd_of_the_stack_and_of_the_matrix_agree_with_numpy(clients, rank):
    """Oracle: NumPy's SVD, for stacks that are thinner than the matrix and for ones that are not."""
    generator = np.random.default_rng(5)
    a, b = generator.standard_normal((clients, 12, rank)), generator.standard_normal((clients, rank, 20))
    weights = generator.dirichlet(np.ones(clients))
    expected = sum(p * x @ y for p, x, y in zip(weights, a, b, strict=True))
    found = jax.jit(flexlora.mean_product_svd)(Factors(a=jnp.float32(a), b=jnp.float32(b)), jnp.float32(weights))
    u, size, v = map(np.float64, found)
    assert len(size) == min(clients * rank, 12)
    np.testing.assert_allclose((u * size) @ v, expected, atol=1e-5)
    np.testing.assert_allclose(size, np.linalg.svd(expected, compute_uv=False)[: len(size)], atol=1e-5)
    np.testing.assert_allclose(u.T @ u, np.eye(len(size)), atol=1e-5)
    np.testing.assert_allclose(v @ v.T, np.eye(len(size)), atol=1e-5)


def test_flexlora_uses_no_rank_beyond_the_ones_in_use_and_leaves_none_dead():
    """Closed form: equal clients of rank 2 fill two components; the others keep their a and have zero b."""
    start = jax.tree.map(jnp.zeros_like, BROADCAST)
    start = Adapters(
        modules={name: Factors(a=BROADCAST.modules[name].a, b=f.b) for name, f in start.modules.items()},
        head=start.head,
    )
    same = run("flexlora", cohort((2, 2, 2, 2), same=True), (4, 4, 4, 4), broadcast=start).adapters.modules
    capped = run("flexlora", cohort((4, 4, 4, 4)), (4, 4, 4, 4), broadcast=start).adapters.modules
    for found, used in ((same, 2), (capped, 4)):
        for name, f in found.items():
            np.testing.assert_array_equal(f.b[:, used:], 0.0)
            np.testing.assert_array_equal(f.a[..., used:], start.modules[name].a[..., used:])
            assert np.all(np.linalg.norm(f.b[:, :used], axis=-1) > 0.1)


def test_flexlora_cuts_at_the_rank_that_is_trained_not_at_what_was_sent():
    """Oracle: NumPy's SVD, in a first round, b = 0, in which all train five components and send their first alone."""
    start = BROADCAST.replace(modules={n: Factors(a=f.a, b=jnp.zeros_like(f.b)) for n, f in BROADCAST.modules.items()})
    trained = cohort((5, 5, 5, 5))
    decoded = Adapters(
        modules={
            n: Factors(
                a=jnp.where(jnp.arange(MAX_RANK) < 1, f.a, start.modules[n].a),
                b=f.b * (jnp.arange(MAX_RANK) < 1)[:, None],
            )
            for n, f in trained.modules.items()
        },
        head=trained.head,
    )
    received = message(decoded, (1, 1, 1, 1))
    found = AGGREGATE["flexlora"](start, trained, received, jnp.float32(WEIGHTS), jnp.float32(SCALE), KEY).adapters
    for name, layer in MATRICES:
        u, size, v = np.linalg.svd(ideal(decoded, name, layer) / SCALE, full_matrices=False)
        assert size[2] > 0.1  # of three clients that take part
        expected = (u[:, :5] * size[:5]) @ v[:5]
        np.testing.assert_allclose(product(found.modules[name], layer, range(MAX_RANK)), expected, atol=2e-4)
        assert not np.any(found.modules[name].b[layer, 5:])


def test_lora_fair_is_the_ridge_solution():
    """Oracle: least squares on the stacked system `[abar; sqrt(lambda) I]`; a stays FedIT's."""
    ranks = (6, 3, 6, 5)
    decoded = cohort(ranks)
    found, averaged = run("lora_fair", decoded, ranks), run("fedit", decoded, ranks)
    for name, layer in MATRICES:
        a, b = (np.float64(leaf[layer]) for leaf in jax.tree.leaves(averaged.adapters.modules[name]))
        gap = ideal(decoded, name, layer) / SCALE - a @ b
        system = np.vstack([a, np.sqrt(0.3) * np.eye(MAX_RANK)])
        expected = np.linalg.lstsq(system, np.vstack([gap, np.zeros_like(b)]), rcond=None)[0]
        np.testing.assert_allclose(found.adapters.modules[name].b[layer], b + expected, rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(found.adapters.modules[name].a[layer], averaged.adapters.modules[name].a[layer])
    assert found.covariance_error < averaged.covariance_error


def test_lora_fair_leaves_a_rank_that_nobody_uses():
    """Invariance, to the bit: zero b of the broadcast, counted by nobody."""
    modules = {name: Factors(a=f.a, b=jnp.zeros_like(f.b)) for name, f in BROADCAST.modules.items()}
    start = Adapters(modules=modules, head=BROADCAST.head)
    found = run("lora_fair", cohort((4, 4, 4, 4)), (4, 4, 4, 4), broadcast=start).adapters.modules
    for f in found.values():
        np.testing.assert_array_equal(f.b[:, 4:], 0.0)


def test_gap_of_close_clients_is_not_lost_to_rounding():
    """Explicit matrices in float64: the gap is 1e-8 of the products, below float32's resolution of them."""
    generator = np.random.default_rng(2)
    center = generator.standard_normal((12, 3)), generator.standard_normal((3, 20))
    a, b = (x + 1e-4 * generator.standard_normal((4, *x.shape)) for x in center)
    received = Factors(a=jnp.float32(a), b=jnp.float32(b))
    mean = jax.tree.map(lambda x: jnp.float32(np.float64(x).mean(0)), received)
    exact = [np.float64(x) for x in (received.a, received.b, mean.a, mean.b)]
    expected = sum(0.25 * x @ y for x, y in zip(exact[0], exact[1], strict=True)) - exact[2] @ exact[3]
    found = errors.product_gap(received, mean, jnp.full(4, 0.25))
    assert np.linalg.norm(found - expected) < 2e-7
    energy = errors.averaging_energy(received, mean, jnp.float32(expected) + 1.0, jnp.full(4, 0.25))
    np.testing.assert_allclose(energy, 240.0, rtol=1e-5)


def test_changes_may_have_more_components_than_a_module_has_inputs():
    """Explicit matrices: two clients of R = 4 on a module of 5 inputs, so that 2 R columns cannot be orthogonal."""
    generator = np.random.default_rng(3)
    before, after = (
        {"w": Factors(*(jnp.float32(generator.standard_normal((2, 1, *shape))) for shape in ((5, 4), (4, 7))))}
        for _ in range(2)
    )
    changes = Adapters(differences(after, before), {})
    received = Received(changes, {"w": jnp.ones((2, 1, 8))})
    start = Adapters({"w": Factors(a=jnp.ones((1, 5, 4)), b=jnp.zeros((1, 4, 7)))}, {})
    weights = jnp.array([0.25, 0.75])
    found = fedex.make(fedex.FedExConfig(start="keep"), CONTEXT).aggregate(
        start, changes, received, weights, jnp.float32(SCALE), KEY
    )
    product_of = [np.float64(x["w"].a)[:, 0] @ np.float64(x["w"].b)[:, 0] for x in (before, after)]
    expected = SCALE * np.einsum("c,cio->io", np.float64(weights), product_of[1] - product_of[0])
    np.testing.assert_allclose(found.merged["w"][0], expected, rtol=1e-5, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, found.adapters, start)


@pytest.mark.parametrize(("adapters", "rank"), [(None, 8), (100, 16), (3, 200), (1000, 64), (10**6, 64)])
def test_downlink_of_a_large_model_is_counted_exactly(adapters, rank):
    """Oracle: Python integers, far beyond 2**32."""
    wide = jax.ShapeDtypeStruct((24, 4096, 8), jnp.float32), jax.ShapeDtypeStruct((24, 8, 4096), jnp.float32)
    up = jax.ShapeDtypeStruct((24, 4096, 8), jnp.float32), jax.ShapeDtypeStruct((24, 8, 11008), jnp.float32)
    like = Adapters(modules={"query": Factors(*wide), "up": Factors(*up)}, head={})
    expected = 0
    for n_in, n_out in ((4096, 4096), (4096, 11008)):
        full = n_in * n_out
        expected += 24 * 32 * (full if adapters is None else min(full, adapters * rank * (n_in + n_out)))
    assert expected > 2**32
    assert jax.jit(lambda rank: product_bits(like, adapters, rank))(jnp.float32(rank)).exact() == expected


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (fedex.FedExConfig, {"name": "x"}, "name must be 'fedex', got 'x'"),
        (fedex.FedExConfig, {"start": "old"}, "start must be one of average, reinit, keep, got 'old'"),
        (flora.FloraConfig, {"name": "x"}, "name must be 'flora', got 'x'"),
        (flexlora.FlexLoraConfig, {"name": "x"}, "name must be 'flexlora', got 'x'"),
        (lora_fair.LoraFairConfig, {"name": "x"}, "name must be 'lora_fair', got 'x'"),
        (lora_fair.LoraFairConfig, {"regularisation": 0.0}, "regularisation must be positive and finite, got 0.0"),
    ],
)
def test_configs_name_field_and_value(config, options, message):
    """The message itself."""
    with pytest.raises(ValueError, match=message):
        config(**options)
