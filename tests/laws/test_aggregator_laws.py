"""Laws that every aggregator obeys beside those of `fedjax_lora.testing`, over one table of all of them."""

import importlib
import pkgutil
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_lora import aggregation
from fedjax_lora.aggregation import fedex, fedit, fedsa, ffa, flexlora, flora, hetlora, lora_fair, rolora
from fedjax_lora.aggregation.products import as_changes
from fedjax_lora.core.exchange import Received
from fedjax_lora.core.methods import Context
from fedjax_lora.core.types import Adapters, Scope
from oracles.sparsifier_oracle import LAYERS, WIDTHS, random_adapters, rank_mask, stack, trained_from
from oracles.uploads import uploads


class Row(NamedTuple):
    """A method, and what tells it from the others in these laws.

    round: decides about what is trained and sent. counts: where a client has a say, see `oracles.uploads`.
    exact: whether averaging is free of error. new_basis: whether equal clients' product comes back in other factors.
    signs: whether the factors are unique up to signs alone. received: the factors that clients are sent in rounds 0, 1
    and 2 where all take part in each. received_away: the same where clients sit out rounds. stacks: at how many times
    C r components what was merged is charged. seed_bits: what comes with it. seed_bits_away: the same where clients sit
    out rounds. has_head: whether the head is sent. folds: whether clients can be averaged one by one.
    """

    module: Any
    config: Any
    round: int = 0
    counts: str = "senders"
    exact: bool = False
    new_basis: bool = False
    signs: bool = False
    received: tuple[str, str, str] = ("ab", "ab", "ab")
    received_away: tuple[str, str, str] | None = None
    stacks: int = 0
    seed_bits: int = 0
    seed_bits_away: int = 0
    has_head: bool = True
    folds: bool = False


ROLORA = Row(
    rolora, rolora.RoLoraConfig(), exact=True, received=("ab", "b", "a"), received_away=("ab", "ab", "ab"), folds=True
)
ONCE = ("ab", "", "")
FLORA = Row(
    flora,
    flora.FloraConfig(),
    exact=True,
    new_basis=True,
    received=ONCE,
    stacks=1,
    seed_bits=32,
    seed_bits_away=32,
)
TABLE = {
    "fedit": Row(fedit, fedit.FedItConfig(), folds=True),
    "ffa": Row(ffa, ffa.FfaConfig(), exact=True, received=("b", "b", "b"), folds=True),
    "rolora even": ROLORA,
    "rolora odd": ROLORA._replace(round=1),
    "fedsa": Row(fedsa, fedsa.FedSaConfig(), exact=True, received=("a", "a", "a"), has_head=False, folds=True),
    "hetlora": Row(hetlora, hetlora.HetLoraConfig(), counts="owners", folds=True),
    "fedex": Row(fedex, fedex.FedExConfig(), exact=True, stacks=1),
    "fedex reinit": FLORA._replace(module=fedex, config=fedex.FedExConfig(start="reinit")),
    "fedex keep": Row(fedex, fedex.FedExConfig(start="keep"), exact=True, received=ONCE, stacks=2, seed_bits_away=32),
    "flora": FLORA,
    "flexlora": Row(flexlora, flexlora.FlexLoraConfig(), new_basis=True, signs=True),
    "lora_fair": Row(lora_fair, lora_fair.LoraFairConfig()),
}
START = random_adapters(0)
WEIGHTS = jnp.array([0.4, 0.3, 0.2, 0.1])
KEY = jax.random.key(1)
SCALE = jnp.float32(2.0)
PATH = aggregation.__path__
CONTEXT = Context(num_clients=4, cohort_size=4, like=START)
FEDIT = jax.jit(fedit.make(fedit.FedItConfig(), CONTEXT).aggregate)


class Cohort(NamedTuple):
    """What four clients hold within the scope of what the method sends, and their uploads."""

    trained: Adapters
    received: Received


def method_of(row: Row):
    return row.module.make(row.config, CONTEXT)


def decoded(row: Row, clients: list[Adapters]) -> Cohort:
    """The clients' adapters, equal to the broadcast outside of the method's scope, half of their ranks sent."""
    sends = method_of(row).traffic(jnp.int32(row.round), True).sent
    scope = Scope(jnp.asarray(rank_mask()), *map(jnp.float32, sends))
    trained = stack([scope.select(client, START) for client in clients])
    return Cohort(trained, uploads(START, trained, rank_mask(), sends, keep=2, counts=row.counts))


def upload(row: Row, clients: list[Adapters]) -> Cohort:
    """What the method is given of them: their changes since the broadcast, where it asks for these."""
    cohort = decoded(row, clients)
    if method_of(row).resumes:
        return Cohort(*as_changes(stack([START] * len(clients)).modules, *cohort))
    return cohort


def test_every_aggregator_is_in_the_table():
    """Oracle: the files of the package that hold a METHOD."""
    files = [importlib.import_module(f"{aggregation.__name__}.{file.name}") for file in pkgutil.iter_modules(PATH)]
    methods = [file.METHOD for file in files if hasattr(file, "METHOD")]
    assert {row.module.METHOD for row in TABLE.values()} == set(methods)
    assert len(methods) == 9
    assert {row.module for name, row in TABLE.items() if name not in VARIANTS} == {row.module for row in TABLE.values()}
    for method in methods:
        assert method.slot == "aggregation"
        assert method.options().name == method.name


VARIANTS = {"rolora odd", "fedex reinit"}
"""Rows whose method is in others too, all of whose tests are slow."""
ALL = [pytest.param(name, marks=pytest.mark.slow if name in VARIANTS else []) for name in TABLE]


@pytest.fixture(scope="module", params=ALL)
def row(request):
    return TABLE[request.param]


@pytest.fixture(scope="module")
def cohort(row):
    return upload(row, [trained_from(START, seed) for seed in (1, 2, 3, 4)])


@pytest.fixture(scope="module")
def aggregate(row):
    return method_of(row).aggregate


@pytest.fixture(scope="module")
def jitted(aggregate):
    return jax.jit(aggregate)


@pytest.fixture(scope="module")
def assert_same(row):
    """Closeness of two results: of their products where the signs of the factors are free."""

    def products(found):
        modules = {n: jnp.einsum("...ir,...ro->...io", f.a, f.b) for n, f in found.adapters.modules.items()}
        return found._replace(adapters=found.adapters.replace(modules=modules))

    def check(x, y, rtol=1e-5, atol=1e-6):
        if row.signs:
            x, y, rtol, atol = products(x), products(y), 1e-4, 2e-5
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), x, y)

    return check


def server_products(found, scale=SCALE):
    """Module -> what the server's factors and what it merged add to the frozen weights."""
    return {
        n: scale * jnp.einsum("lir,lro->lio", f.a, f.b) + found.merged.get(n, 0.0)
        for n, f in found.adapters.modules.items()
    }


def test_vmap_equals_loop(jitted, cohort, assert_same):
    """Seeds and settings: other weights and scales over one cohort."""
    weights, scales = jnp.stack([WEIGHTS, WEIGHTS[::-1]]), jnp.array([1.0, 3.0])
    mapped = jax.vmap(jitted, in_axes=(None, None, None, 0, 0, None))(START, *cohort, weights, scales, KEY)
    assert_same(mapped, stack([jitted(START, *cohort, weights[i], scales[i], KEY) for i in range(2)]))


def test_dtypes_and_shapes_are_kept(row, aggregate, cohort):
    """Structure: the result is like the broadcast, what is merged like the products, the errors float32 scalars."""
    found = jax.eval_shape(aggregate, START, *cohort, WEIGHTS, SCALE, KEY)
    jax.tree.map(lambda x, y: np.testing.assert_equal((x.shape, x.dtype), (y.shape, y.dtype)), found.adapters, START)
    merges = method_of(row).merges
    merged = {n: (LAYERS, *widths) for n, widths in WIDTHS.items()} if merges else {}
    assert {n: leaf.shape for n, leaf in found.merged.items()} == merged
    for error in (found.sparsification_error, found.covariance_error):
        assert (error.shape, error.dtype) == ((), jnp.float32)


@pytest.mark.parametrize("value", [5.0, np.nan, np.inf])
def test_client_of_weight_zero_changes_nothing(jitted, cohort, assert_same, value):
    """Invariance: padding by two clients of any content, NaN included."""

    def pad(leaf):
        return jnp.concatenate([leaf, jnp.full((2, *leaf.shape[1:]), value).astype(leaf.dtype)])

    padded = jitted(START, *jax.tree.map(pad, cohort), jnp.append(WEIGHTS, jnp.zeros(2)), SCALE, KEY)
    assert_same(padded, jitted(START, *cohort, WEIGHTS, SCALE, KEY))


def test_nobody_leaves_the_broadcast(jitted, cohort):
    """Closed form: weights all zero give the broadcast to the bit, nothing merged, and no error."""
    found = jitted(
        START, jax.tree.map(lambda x: x * jnp.nan, cohort.trained), cohort.received, jnp.zeros(4), SCALE, KEY
    )
    jax.tree.map(np.testing.assert_array_equal, found.adapters, START)
    assert not any(np.any(leaf) for leaf in found.merged.values())
    assert found.sparsification_error == 0.0
    assert found.covariance_error == 0.0


def test_zero_updates_leave_the_broadcast(row, jitted):
    """Closed form: clients that hold the broadcast return it, to the bit where its basis stays."""
    found = jitted(START, *upload(row, [START] * 4), WEIGHTS, SCALE, KEY)
    if row.new_basis:
        before = {n: SCALE * jnp.einsum("lir,lro->lio", f.a, f.b) for n, f in START.modules.items()}
        for n, after in server_products(found).items():
            np.testing.assert_allclose(after, before[n], rtol=1e-4, atol=2e-5)
        jax.tree.map(np.testing.assert_array_equal, found.adapters.head, START.head)
        assert found.covariance_error < 1e-3
    else:
        jax.tree.map(np.testing.assert_array_equal, found.adapters, START)
        assert not any(np.any(leaf) for leaf in found.merged.values())
        assert found.covariance_error == 0.0
    np.testing.assert_allclose(found.sparsification_error, 0.0, atol=2e-5)


def test_scale_multiplies_both_errors(row, jitted, cohort):
    """Closed form: the norms are linear in s; that of averaging is rounding where it is exact."""
    once, thrice = (jitted(START, *cohort, WEIGHTS, jnp.float32(s), KEY) for s in (1.0, 3.0))
    np.testing.assert_allclose(thrice.sparsification_error, 3 * once.sparsification_error, rtol=1e-6)
    np.testing.assert_allclose(thrice.covariance_error, 3 * once.covariance_error, rtol=1e-6, atol=1e-3)
    assert once.sparsification_error > 0.1
    assert (once.covariance_error < 1e-3) if row.exact else (once.covariance_error > 0.1)


def test_identical_clients_give_the_product_of_fedit(row, jitted):
    """Oracle: FedIT, of the same clients; there is no covariance among equals."""
    clients = [trained_from(START, 1)] * 4
    found = jitted(START, *upload(row, clients), WEIGHTS, SCALE, KEY)
    expected = FEDIT(START, *decoded(row, clients), WEIGHTS, SCALE, KEY)
    for name, after in server_products(found).items():
        np.testing.assert_allclose(after, server_products(expected)[name], rtol=1e-4, atol=2e-5)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), found.adapters.head, expected.adapters.head
    )
    np.testing.assert_allclose(found.covariance_error, 0.0, atol=1e-3)


@pytest.mark.parametrize("everyone", [True, False])
def test_clients_are_sent_what_they_cannot_know(row, everyone):
    """Oracle: the factors that the row names, round by round, and the head."""
    method = method_of(row)
    expected = row.received if everyone else row.received_away or row.received
    for number, factors in enumerate(expected):
        live = method.traffic(jnp.int32(number), everyone).received
        assert tuple(map(float, live)) == ("a" in factors, "b" in factors, row.has_head)


@pytest.mark.parametrize(("clients", "rank"), [(1, 1), (2, 1), (2, 3), (1, 6), (9, 3)])
def test_downlink_of_what_was_merged_equals_an_independent_count(row, clients, rank):
    """Oracle: a count matrix by matrix, of clients' components in use, however many are stored.

    A matrix is sent in full where that is shorter; a client that has missed merges is sent their sum in full.
    """
    method = method_of(row)
    bits = bits_away = 0
    for n_in, n_out in WIDTHS.values():
        for _ in range(LAYERS):
            bits += 32 * min(row.stacks * clients * rank * (n_in + n_out), n_in * n_out)
            bits_away += 32 * n_in * n_out * (row.stacks > 0)
    assert method.extra_downlink(START, clients, jnp.float32(rank)).exact() == bits + row.seed_bits
    assert method.extra_downlink(START, None, jnp.float32(rank)).exact() == bits_away + row.seed_bits_away


def test_a_method_folds_where_the_table_says_so(row):
    assert (method_of(row).fold is not None) == row.folds
