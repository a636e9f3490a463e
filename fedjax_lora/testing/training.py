"""The laws of local training, of corrections of its drift, and of server optimizers."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_lora.core.exchange import Live
from fedjax_lora.core.learning import Broadcast, Client, Correction, Optimizer, Trained, Trainer
from fedjax_lora.core.methods import Context
from fedjax_lora.core.types import Adapters, Scope
from fedjax_lora.models import vit
from fedjax_lora.testing import examples
from fedjax_lora.testing.laws import Subject, close, named, same_form
from fedjax_lora.training.local import LocalConfig

# ----------------------------------------------------------------------------------------------- server optimizers


def exercise_server(method: Optimizer, context: Context) -> Any:
    """Two steps."""
    params = examples.adapters(0)
    first, state = method.update(examples.adapters(1), method.init(params), params)
    return first, method.update(examples.adapters(2), state, params)


def a_server_that_is_told_nothing_stays(subject: Subject) -> None:
    """A pseudo-gradient of zero, from rest, moves nothing."""
    method, params = subject.record, examples.adapters(0)
    state, nothing = method.init(params), jax.tree.map(jnp.zeros_like, params)
    for _ in range(2):
        updates, after = method.update(nothing, state, params)
        same_form(state, after)
        jax.tree.map(np.testing.assert_array_equal, updates, nothing)
        state = after


def steps_are_of_the_form_of_adapters(subject: Subject) -> None:
    """An update is added to the adapters: it has their structure, shapes and dtypes."""
    params = examples.adapters(0)
    same_form(params, subject.record.update(examples.adapters(1), subject.record.init(params), params)[0])


SERVER = named(a_server_that_is_told_nothing_stays, steps_are_of_the_form_of_adapters)

# ----------------------------------------------------------------------------------------------------- corrections


def _states(method: Correction, start: Adapters) -> tuple[Any, Any]:
    return method.init_server(start), method.init_client(start)


def _round_of(method: Correction, gradient: Adapters, trained: Adapters, scope: Scope) -> tuple[Any, Any, Any]:
    """The corrected gradient, and the states of client and server after a round from rest."""
    start = examples.adapters(0)
    server, client = _states(method, start)
    corrected = method.gradient(gradient, trained, start, server, client)
    after = method.next_client(start, trained, jnp.float32(0.3), scope, server, client)
    change = jax.tree.map(lambda new, old: 0.5 * (new - old), after, client)
    return corrected, after, method.next_server(server, change)


def exercise_drift(method: Correction, context: Context) -> Any:
    """One round of a client."""
    scope = examples.scope()
    return _round_of(method, examples.adapters(1), examples.trained(2, examples.adapters(0), scope), scope)


def without_gradients_nothing_moves(subject: Subject) -> None:
    """From rest, a gradient of zero at the broadcast stays zero, and so do the states."""
    method, start = subject.record, examples.adapters(0)
    nothing = jax.tree.map(jnp.zeros_like, start)
    corrected, client, server = _round_of(method, nothing, start, examples.scope())
    jax.tree.map(np.testing.assert_array_equal, (corrected, server, client), (nothing, *_states(method, start)))


def states_and_gradients_keep_their_form(subject: Subject) -> None:
    """Structure, shapes and dtypes after a round are those before."""
    method, start, scope = subject.record, examples.adapters(0), examples.scope()
    corrected, client, server = _round_of(method, examples.adapters(1), examples.trained(2, start, scope), scope)
    same_form((start, *_states(method, start)), (corrected, server, client))


def what_was_not_trained_keeps_its_state(subject: Subject) -> None:
    """Of a client's state in the form of adapters, what was out of scope in a round stays as it was."""
    method, start = subject.record, examples.adapters(0)
    before = method.init_client(start)
    if jax.tree.structure(before) != jax.tree.structure(start):
        return
    for parts in ({"a": 0.0}, {"b": 0.0}, {"head": 0.0}):
        scope = examples.scope(**parts)
        _, after, _ = _round_of(method, examples.adapters(1), examples.trained(2, start, scope), scope)
        nothing = jax.tree.map(jnp.zeros_like, start)
        jax.tree.map(np.testing.assert_array_equal, scope.select(nothing, after), scope.select(nothing, before))


DRIFT = named(
    without_gradients_nothing_moves, states_and_gradients_keep_their_form, what_was_not_trained_keeps_its_state
)

# -------------------------------------------------------------------------------------------------- local training

_SHAPE = vit.VitConfig(height=4, width=4, patch=2, hidden=6, num_layers=examples.NUM_LAYERS, num_heads=2, mlp_width=10)
_SITES = "query", "up"
_ALL = Live()


def context() -> Context:
    """Of a very small model, with the package's own defaults in the other slots."""
    shaped = examples.context(image_shape=(_SHAPE.height, _SHAPE.width, 1), local=LocalConfig(steps=2, batch_size=3))
    before = examples.made(shaped, ("task", "adapter"))
    model = vit.vit(_SHAPE, before.made["task"], before.made["adapter"])
    before = before._replace(made={**before.made, "model": model})
    like = jax.eval_shape(lambda: _start(before))
    return examples.made(before._replace(like=like), ("sparsifier", "aggregation", "drift"))


def _start(context: Context) -> Adapters:
    model, adapter = context.made["model"], context.made["adapter"]
    sites = {name: model.sites[name] for name in _SITES}
    modules = adapter.init(jax.random.key(0), sites, model.num_layers, examples.MAX_RANK, 1.0)
    return Adapters(modules=modules, head=model.init_head(jax.random.key(1)))


def _given(context: Context, live: Live = _ALL) -> tuple[Broadcast, Client]:
    """A broadcast and one client, which holds all but one of the rows that it lists."""
    start, correction = _start(context), context.made["drift"]
    broadcast = Broadcast(
        base=context.made["model"].init(jax.random.key(2)),
        pool=examples.batch(context),
        adapters=start,
        live=Live(*map(jnp.float32, live)),
        correction=correction.init_server(start),
        scale=jnp.float32(examples.SCALE),
        round=jnp.int32(0),
    )
    rows = jnp.arange(examples.BATCH_SIZE - 1, dtype=jnp.int32)
    methods = {"drift": correction.init_client(start), "sparsifier": (), "aggregation": start.modules}
    rank, held = jnp.float32(examples.RANK), jnp.int32(examples.BATCH_SIZE - 2)
    return broadcast, Client(rows, held, jax.random.key(3), rank, {}, methods)


def exercise_training(method: Trainer, context: Context) -> Any:
    """One client's round, and the work of several."""
    return method.train(*_given(context)), method.work(jnp.arange(1, 4))


def what_is_not_trained_stays(subject: Subject) -> None:
    """A factor at rest, a rank not in use and a head at rest end where they began, to the bit; the rest moves."""
    for live in (Live(a=0.0), Live(b=0.0), Live(head=0.0)):
        broadcast, client = _given(subject.context, live)
        found: Trained = subject.record.train(broadcast, client)
        scope = examples.scope(a=live.a, b=live.b, head=live.head)
        nothing = jax.tree.map(jnp.zeros_like, broadcast.adapters)
        ended, began = (scope.select(nothing, x) for x in (found.adapters, broadcast.adapters))
        jax.tree.map(np.testing.assert_array_equal, ended, began)
        same_form(broadcast.adapters, found.adapters)
        same_form(client.methods["drift"], found.correction)
        moved = [
            jnp.any(x != y) for x, y in zip(*map(jax.tree.leaves, (found.adapters, broadcast.adapters)), strict=True)
        ]
        assert any(map(bool, moved)), "nothing is trained"


def rows_that_a_client_does_not_hold_are_not_seen(subject: Subject) -> None:
    """Beyond its examples a client's rows are padding, and may be any."""
    broadcast, client = _given(subject.context)
    other = client._replace(rows=client.rows.at[-1].set(examples.BATCH_SIZE - 1))
    close(subject.record.train(broadcast, other), subject.record.train(broadcast, client))


def more_examples_are_no_less_work(subject: Subject) -> None:
    """Work is one finite number a client, not negative, and does not fall with what the client holds."""
    samples = np.asarray(subject.record.work(jnp.arange(1, 9)).samples)
    assert samples.shape == (8,) and np.isfinite(samples).all() and (samples >= 0).all(), f"got {samples}"
    assert (np.diff(samples) >= 0).all(), f"got {samples}"


TRAINING = named(
    what_is_not_trained_stays, rows_that_a_client_does_not_hold_are_not_seen, more_examples_are_no_less_work
)
