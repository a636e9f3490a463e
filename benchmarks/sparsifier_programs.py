"""What a cohort computes when it sparsifies, as programs: the whole message of every method, or the choice alone."""

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from sparsifier_torch import Drawn

from fedjax_lora.core.exchange import Sparsifier
from fedjax_lora.core.methods import Context, Method
from fedjax_lora.core.types import Adapters, Factors, Scope
from fedjax_lora.sim.cohort import CLIENTS, device_mesh, map_over_devices
from fedjax_lora.sim.messages import sparsified_at_once
from fedjax_lora.sparsifiers import payload
from fedjax_lora.sparsifiers.soft import importance
from fedjax_lora.sparsifiers.svd import full_svd, thin_svd

CHOICES: dict[str, Callable] = {
    "norms": lambda a, b, a0, b0: importance(a, b, a0, b0),
    "thin SVD": lambda a, b, a0, b0: thin_svd(a, b).s,
    "full SVD": lambda a, b, a0, b0: full_svd(a, b).s,
}
"""Energies of all components, of which the largest would be chosen; those of the SVD are of the factors themselves."""


class Program(NamedTuple):
    """A compiled program with its arguments. begin: a call, not waited for. compile_s: of tracing and compiling."""

    begin: Callable[[], Any]
    compile_s: float

    def call(self) -> Any:
        """The results, when they are there."""
        return jax.block_until_ready(self.begin())


class Cohort(NamedTuple):
    """Adapters of one module and layer: `start` that all share, and `trained`, leaves `[C, ...]` over the devices."""

    start: Adapters
    trained: Adapters

    @property
    def clients(self) -> int:
        """C."""
        return self.trained.modules["query"].a.shape[0]

    @property
    def rank(self) -> int:
        """R."""
        return self.start.modules["query"].a.shape[-1]


def cohort(drawn: Drawn) -> Cohort:
    """The drawn factors on the devices."""
    mesh = device_mesh()
    if drawn.a.shape[0] % jax.device_count():
        raise ValueError(f"--clients must be multiples of the {jax.device_count()} devices, got {drawn.a.shape[0]}")
    start = Factors(a=jnp.asarray(drawn.a0)[None], b=jnp.asarray(drawn.b0)[None])
    over_clients = NamedSharding(mesh, P(CLIENTS))
    trained = Factors(*(jax.device_put(part[:, None], over_clients) for part in (drawn.a, drawn.b)))
    return Cohort(Adapters({"query": start}, {}), Adapters({"query": trained}, {}))


def at_once(items: Any, clients: int) -> int:
    """Clients that a device computes together: on a CPU as in a round, elsewhere all."""
    return sparsified_at_once(items) if jax.devices()[0].platform == "cpu" else -(-clients // jax.device_count())


def made(method: Method, like: Adapters, clients: int) -> Sparsifier:
    """The sparsifier with its default options."""
    return method.make(method.options(), Context(clients, clients, like=like))


def message(method: Sparsifier, held: Cohort, kept: float) -> Program:
    """Tail energies to choose by, and the message of `kept` components with its bits, for every client.

    It is mapped as a round maps it. `Message.dropped_energy`, a metric of the simulator, is not computed.
    """
    scope = Scope.whole(jnp.ones(held.rank))

    def send(start: Adapters, item: Any) -> Any:
        trained, memory, key = item
        tail_energy = method.offer(start, trained, scope).tail_energy
        found = method.encode(start, trained, memory, jnp.float32(kept), scope, key)
        bits = payload.bits(payload.message_size(found)).float32()
        return tail_energy, found.tensors, found.exact, bits

    memory = jax.jit(jax.vmap(method.init))(held.trained)
    keys = jax.random.split(jax.random.key(0), held.clients)
    return _compiled(send, held.start, (held.trained, memory, keys), held.clients)


def choice(energies: Callable, held: Cohort, clients: int) -> Program:
    """One of CHOICES for so many of the clients."""

    def choose(start: Adapters, item: Adapters) -> Any:
        (old,), (own,) = start.modules.values(), item.modules.values()
        return energies(own.a, own.b, old.a, old.b)

    few = clients < held.clients  # all of them are not copied
    some = jax.tree.map(lambda leaf: leaf[:clients], held.trained) if few else held.trained
    return _compiled(choose, held.start, some, clients)


def _compiled(work: Callable, start: Adapters, items: Any, clients: int) -> Program:
    mesh = device_mesh()
    items = jax.block_until_ready(jax.device_put(items, NamedSharding(mesh, P(CLIENTS))))
    started = time.perf_counter()
    mapped = functools.partial(map_over_devices, work, chunk=at_once(items, clients), mesh=mesh)
    program = jax.jit(mapped).lower(start, items).compile()
    compile_s = time.perf_counter() - started
    return Program(functools.partial(program, start, items), compile_s)


def copy_gb_per_s(numbers: int, timed: Callable[[Callable[[], Any]], list[float]]) -> list[float]:
    """Bytes read and written a second where every device adds 1 to its part of so many float32, into new memory."""
    numbers -= numbers % jax.device_count()
    x = jax.device_put(jnp.zeros(numbers), NamedSharding(device_mesh(), P(CLIENTS)))
    program = jax.jit(lambda x: x + 1.0)
    return [8e-9 * numbers / s for s in timed(lambda: jax.block_until_ready(program(x)))]
