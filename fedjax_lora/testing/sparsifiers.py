"""The laws of sparsifiers: what arrives, what it costs, and what is remembered."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_lora.core.exchange import Message, Received, Sparsifier
from fedjax_lora.core.methods import Context
from fedjax_lora.core.types import Adapters, Scope
from fedjax_lora.sparsifiers import payload
from fedjax_lora.testing import examples
from fedjax_lora.testing.laws import Subject, close, named, same_form


def _sent(
    method: Sparsifier, seed: int, kept: float, scope: Scope
) -> tuple[Adapters, Adapters, Any, Message, Received]:
    """Start, trained, memory, message and what arrives of a client that keeps so many ranks."""
    start = examples.adapters(0)
    trained = examples.trained(seed, start, scope)
    memory = method.init(start)
    message = method.encode(start, trained, memory, jnp.float32(kept), scope, jax.random.key(seed))
    return start, trained, memory, message, method.decode(start, message, scope)


def exercise(method: Sparsifier, context: Context) -> Any:
    """What one client offers, sends and remembers."""
    scope = examples.scope()
    start, trained, memory, message, received = _sent(method, 1, 2.0, scope)
    offer = method.offer(start, trained, scope)
    size = payload.message_size(message)
    memory = method.remember(trained, memory, received, scope)
    mask = scope.ranks
    bits = payload.bits(offer.size, ()).float32(), payload.bits(size, ()).float32()
    return received, memory, offer.tail_energy, bits, method.penalty(trained, mask), message.dropped_energy


def what_is_kept_whole_arrives_whole(subject: Subject) -> None:
    """The products of the received factors are those of what was sent, where all ranks are kept.

    What was sent is what was trained; a factor, or a head, whose every mask in a message of the form of adapters is 0
    is the broadcast's. So a method may leave out one factor on purpose, but nothing of what it sends may be lost.
    """
    for parts in ({}, {"a": 0.0}, {"b": 0.0}):  # as the aggregators train both factors or one
        scope = examples.scope(**parts)
        start, trained, _, message, received = _sent(subject.record, 2, examples.RANK, scope)
        promised = _promised(start, trained, message)
        for name, f in promised.modules.items():
            g = received.adapters.modules[name]
            close(g.a * scope.ranks @ g.b, f.a * scope.ranks @ f.b, rtol=1e-3, atol=1e-3)
        close(received.adapters.head, promised.head)
    assert any(np.any(mask) for mask in jax.tree.leaves(message.sent)), "nothing is sent"


def _promised(start: Adapters, trained: Adapters, message: Message) -> Adapters:
    """What is to arrive of a client that keeps all ranks."""
    if jax.tree.structure(message.sent) != jax.tree.structure(start):
        return trained
    return jax.tree.map(lambda new, old, sent: new if np.any(sent) else old, trained, start, message.sent)


def what_is_out_of_scope_stays(subject: Subject) -> None:
    """A factor that is not sent, a rank not in use and a head out of scope are the server's own, to the bit."""
    for parts in ({"a": 0.0}, {"b": 0.0}, {"head": 0.0}):
        scope = examples.scope(**parts)
        start, _, _, _, received = _sent(subject.record, 3, 2.0, scope)
        nothing = jax.tree.map(jnp.zeros_like, start)
        for found, own in zip(
            jax.tree.leaves(scope.select(nothing, received.adapters)),
            jax.tree.leaves(scope.select(nothing, start)),
            strict=True,
        ):
            np.testing.assert_array_equal(found, own)


def bits_count_the_choice(subject: Subject) -> None:
    """Messages that choose differently say so: N different choices take log2(N) bits of index at least."""
    choices, least = set(), math.inf
    for seed in range(1, 17):
        message = _sent(subject.record, seed, 1.0, examples.scope())[3]
        choices.add(tuple(np.asarray(mask, bool).tobytes() for mask in jax.tree.leaves(message.sent)))
        least = min(least, int(message.index_bits.exact()))
    assert least >= math.log2(len(choices)), f"got {least} bits of index for {len(choices)} choices"


def the_offer_covers_the_message(subject: Subject) -> None:
    """No message is larger than what control has planned with."""
    method, scope = subject.record, examples.scope()
    for kept in range(1, examples.RANK + 1):
        start, trained, _, message, _ = _sent(method, 4, float(kept), scope)
        planned = int(payload.bits(method.offer(start, trained, scope).size, ()).exact()[kept])
        sent = int(payload.bits(payload.message_size(message), ()).exact())
        assert sent <= planned, f"got {sent} bits where {planned} were planned, at {kept} ranks"


def what_is_left_out_falls(subject: Subject) -> None:
    """The tail energy does not rise with the ranks kept, and is 0 where all are."""
    start, scope = examples.adapters(0), examples.scope()
    tail = np.asarray(subject.record.offer(start, examples.trained(5, start, scope), scope).tail_energy)
    assert tail.shape == (examples.MAX_RANK + 1,), f"got {tail.shape}"
    assert (np.diff(tail) <= 1e-5 * max(tail[0], 1e-9)).all() and abs(tail[examples.RANK]) <= 1e-5 * max(tail[0], 1e-9)


def memory_and_message_hold_all_of_an_update(subject: Subject) -> None:
    """What a client remembers is what it has held and not sent; of a memory in the form of adapters."""
    method, scope = subject.record, examples.scope()
    start, trained, memory, _, received = _sent(method, 6, 1.0, scope)
    if jax.tree.structure(memory) != jax.tree.structure(start):
        return
    for _ in range(2):  # from nothing, and from what is left of a round
        after = method.remember(trained, memory, received, scope)
        same_form(memory, after)
        held = jax.tree.map(jnp.add, trained, memory)
        total = jax.tree.map(jnp.add, received.adapters, after)
        nothing = jax.tree.map(jnp.zeros_like, start)
        close(scope.select(total, nothing), scope.select(held, nothing))
        memory = after
        message = method.encode(start, trained, memory, jnp.float32(1.0), scope, jax.random.key(7))
        received = method.decode(start, message, scope)


LAWS = named(
    what_is_kept_whole_arrives_whole,
    what_is_out_of_scope_stays,
    bits_count_the_choice,
    the_offer_covers_the_message,
    what_is_left_out_falls,
    memory_and_message_hold_all_of_an_update,
)
