"""Laws that every correction of the clients' drift obeys, over one table of all of them.

A client's loss is half the squared distance to a target of its own, in every value of its adapters.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_lora.core import trees
from fedjax_lora.training.corrections import METHODS
from oracles.contexts import context
from oracles.sparsifier_oracle import MAX_RANK, RANK, random_adapters, scope, stack

START = random_adapters(0)
TARGETS = stack([random_adapters(seed) for seed in (1, 2, 3, 4)])
SCOPE = scope()
RATE, STEPS = 0.2, 3
TABLE = {"none": {}, "fedprox": {"mu": 0.5}, "scaffold": {}}


DRIFTS = {method.name: method for method in METHODS}


def make(name, **options):
    return DRIFTS[name].make(DRIFTS[name].options(**options), context())


def test_every_correction_is_in_the_table():
    """Oracle: the names that a configuration may choose."""
    assert set(TABLE) == set(DRIFTS)


@pytest.fixture(scope="module", params=TABLE, ids=list(TABLE))
def method(request):
    return make(request.param, **TABLE[request.param])


class Run(NamedTuple):
    """What the server holds, and each client."""

    adapters: Any
    server: Any
    clients: Any


def at_rest(method, number=4):
    clients = stack([method.init_client(START)] * number)
    return Run(START, method.init_server(START), clients)


def under_way(method):
    """States that differ from client to client, and from zero."""

    def drawn(tree, seed):
        generator = np.random.default_rng(seed)
        return jax.tree.map(lambda x: jnp.asarray(generator.standard_normal(x.shape), jnp.float32), tree)

    rest = at_rest(method)
    return rest._replace(server=drawn(rest.server, 5), clients=drawn(rest.clients, 6))


def local(method, start, target, server, client, used=SCOPE):
    """SGD of one client on its own loss, and its state after it."""
    x, zero = start, jax.tree.map(jnp.zeros_like, start)
    for _ in range(STEPS):
        gradient = method.gradient(jax.tree.map(jnp.subtract, x, target), x, start, server, client)
        x = jax.tree.map(lambda x, g: x - RATE * g, x, used.select(gradient, zero))
    return x, method.next_client(start, x, jnp.float32(RATE * STEPS), used, server, client)


def cohort(method, run, targets, used=SCOPE):
    """`local` of every client: what it holds, and its state."""

    def one(target, client):
        return local(method, run.adapters, target, run.server, client, used)

    return jax.vmap(one)(targets, run.clients)


def one_round(method, run, targets, used=SCOPE):
    """Every client trains, all are heard; the plain average."""
    trained, clients = cohort(method, run, targets, used)
    change = jax.tree.map(lambda new, old: jnp.mean(new - old, 0), clients, run.clients)
    average = jax.tree.map(lambda x0, x: x0 + jnp.mean(x - x0, 0), run.adapters, trained)
    return Run(average, method.next_server(run.server, change), clients)


def assert_close(x, y):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), x, y)


def test_vmap_equals_loop(method):
    """Clients of their own targets and states."""
    run = under_way(method)
    one = [local(method, START, trees.take(TARGETS, k), run.server, trees.take(run.clients, k)) for k in range(4)]
    assert_close(cohort(method, run, TARGETS), stack(one))


def test_dtypes_and_shapes_are_kept(method):
    """Structure: adapters and states after a round are like those before."""
    run = at_rest(method)
    found = jax.eval_shape(lambda run: one_round(method, run, TARGETS), run)
    jax.tree.map(lambda x, y: np.testing.assert_equal((x.shape, x.dtype), (y.shape, y.dtype)), found, run)


def test_zero_update_stays_zero(method):
    """Invariance, to the bit: clients that begin where their losses are least, from rest."""
    rest = at_rest(method)
    found = one_round(method, rest, stack([START] * 4))
    jax.tree.map(np.testing.assert_array_equal, found, rest)


@pytest.mark.parametrize("factors", ["ab", "a", "b"])
def test_what_is_out_of_use_never_moves(method, factors):
    """Invariance, to the bit, of adapters and clients' states, whatever the states hold there."""
    run = under_way(method)
    found = one_round(method, run, TARGETS, scope(RANK, factors))
    states = [(found.adapters, START)] + ([(found.clients, run.clients)] if jax.tree.leaves(run.clients) else [])
    for after, before in states:
        for name, f in after.modules.items():
            old = before.modules[name]
            for part, x, x0 in (("a", f.a, old.a), ("b", jnp.swapaxes(f.b, -1, -2), jnp.swapaxes(old.b, -1, -2))):
                in_use = RANK if part in factors else 0
                assert x.shape[-1] == MAX_RANK
                np.testing.assert_array_equal(x[..., in_use:], x0[..., in_use:])
                assert not in_use or np.any(x[..., :in_use] != x0[..., :in_use])


@pytest.mark.parametrize(("name", "options"), [("fedprox", {"mu": 0.0}), ("scaffold", {})])
def test_neutral_settings_equal_none(name, options):
    """Oracle: plain local SGD, with mu = 0 and from control variates of zero."""
    neutral, none = make(name, **options), make("none")
    found, plain = one_round(neutral, at_rest(neutral), TARGETS), one_round(none, at_rest(none), TARGETS)
    assert_close(found.adapters, plain.adapters)


def test_fedprox_ends_where_its_quadratic_says():
    """Closed form: steps towards `(target + mu start) / (1 + mu)`, each `1 - rate (1 + mu)` of the way left."""
    fedprox, mu = make("fedprox", mu=0.5), 0.5
    ends, _ = cohort(fedprox, at_rest(fedprox), TARGETS, scope(MAX_RANK))

    def closed_form(x0, target):
        least = (target + mu * x0) / (1 + mu)
        return least + (1 - RATE * (1 + mu)) ** STEPS * (x0 - least)

    assert_close(ends, jax.tree.map(closed_form, START, TARGETS))


def test_scaffold_of_one_client_is_plain_sgd():
    """Closed form: the server's variate is the client's, and nothing is corrected, round after round."""
    scaffold, none, alone = make("scaffold"), make("none"), trees.take(TARGETS, jnp.array([1]))
    corrected, plain = at_rest(scaffold, 1), at_rest(none, 1)
    for _ in range(3):
        corrected, plain = one_round(scaffold, corrected, alone), one_round(none, plain, alone)
        assert_close(corrected.adapters, plain.adapters)
    assert np.abs(corrected.server.modules["query"].a).max() > 0.1


def test_scaffold_draws_unlike_clients_together():
    """Closed form: variates of `q (start - target)`, q the mean of `(1 - rate)^j`, leave `1 - q` of the differences."""
    scaffold, none, whole = make("scaffold"), make("none"), scope(MAX_RANK)
    run = one_round(scaffold, at_rest(scaffold), TARGETS, whole)
    corrected, _ = cohort(scaffold, run, TARGETS, whole)
    plain, _ = cohort(none, at_rest(none)._replace(adapters=run.adapters), TARGETS, whole)
    left = 1 - np.mean([(1 - RATE) ** j for j in range(STEPS)])
    spread = [jax.tree.map(lambda x: x - jnp.mean(x, 0), ends) for ends in (corrected, plain)]
    assert_close(spread[0], jax.tree.map(lambda x: left * x, spread[1]))
