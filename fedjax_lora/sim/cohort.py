"""Who takes part in a round, and how work for one client is mapped over the cohort."""

import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

CLIENTS, TRIALS, MODEL = "clients", "trials", "model"
"""Axes of a mesh of devices."""

MAX_CPU_DEVICES = 8
"""Most devices that `use_cpu_cores` makes: each holds a copy of the frozen base."""


WAITING_THREADS = 4
"""Threads of a CPU device, where there are more devices than cores."""


def use_cpu_cores() -> None:
    """Make a JAX device of each CPU core (of at most MAX_CPU_DEVICES), so that each trains a client of its own.

    Most of a small model's operations are too small to be shared by cores. Call it before JAX is first used; a number
    that the environment sets (`JAX_NUM_CPU_DEVICES`, or `XLA_FLAGS`) stands. Accelerators are not affected.

    XLA has as many threads as cores (`NPROC`, where the environment has it), and a device that waits for others holds
    some: of more devices than cores all could wait for ever. So they have WAITING_THREADS each.
    """
    asked = os.environ.get("JAX_NUM_CPU_DEVICES", "")
    if asked.isdecimal() and int(asked) > (os.cpu_count() or 1):
        os.environ.setdefault("NPROC", str(WAITING_THREADS * int(asked)))
    chosen = "JAX_NUM_CPU_DEVICES" in os.environ or "device_count" in os.environ.get("XLA_FLAGS", "")
    if not chosen:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        jax.config.update("jax_num_cpu_devices", min(cores, MAX_CPU_DEVICES))


def padded_size(size: int, chunk: int, num_devices: int) -> int:
    """`size` items rounded up to whole chunks on every device."""
    block = chunk * num_devices
    return -(-size // block) * block


def in_even_parts(number: int, most: int) -> int:
    """The most of `number` items to take at once so that nothing is left over, if that is more than half of `most`.

    Else `most`: what is left over costs a copy of all items.
    """
    most = min(most, number)
    return next((size for size in range(most, most // 2, -1) if number % size == 0), most)


def choose(priority: Array | None, num_clients: int, cohort_size: int, size: int) -> tuple[Array, Array]:
    """The clients of the highest priorities, padded to `size`.

    Args:
      priority: `[K]`, -inf for who shall not take part; None for all, where all K do.
      num_clients, cohort_size: K and C.
      size: padded.

    Returns:
      ids: `[size]` int32 in increasing order; padding has the id `num_clients`, which no client has: a
        gather clips it and a scatter drops it.
      present: `[size]` bool.
    """
    if priority is None:
        ids = jnp.arange(num_clients, dtype=jnp.int32)
    else:
        highest, ids = lax.top_k(priority, cohort_size)
        ids = jnp.sort(jnp.where(highest > -jnp.inf, ids, num_clients)).astype(jnp.int32)
    ids = jnp.concatenate([ids, jnp.full(size - cohort_size, num_clients, jnp.int32)])
    return ids, ids < num_clients


def map_over_devices(
    work: Callable[..., Any], shared: Any, items: Any, chunk: int, mesh: Mesh, *, of_model: bool = False
) -> Any:
    """`work(shared, item)` for every item of the leading axis (clients, batches), `chunk` at a time on each device.

    `shared` is never given an axis. The leading axis is a multiple of `chunk` times the number of devices, see
    `padded_size`. `of_model` is whether the frozen base is in `shared`: the compiler then shares the work of an item
    among the devices of the axis `model`, which each do all of it else.
    """

    def on_one_device(shared: Any, items: Any) -> Any:
        return lax.map(lambda item: work(shared, item), items, batch_size=chunk if chunk > 1 else None)

    specs = (P(), P(CLIENTS))
    ours = {TRIALS, CLIENTS} if of_model and mesh.shape[MODEL] > 1 else set(mesh.axis_names)
    mapped = jax.shard_map(
        on_one_device, mesh=mesh, in_specs=specs, out_specs=P(CLIENTS), axis_names=ours, check_vma=False
    )
    return mapped(shared, items)


def sum_over_devices(work: Callable[..., Any], shared: Any, items: Any, most: int, mesh: Mesh) -> Any:
    """The sum of `work(shared, item)` over all items: of each device's, at most `most` at a time, then over devices.

    Sharing and leading axis are those of `map_over_devices`; nothing is held for all items.
    """

    def on_one_device(shared: Any, items: Any) -> Any:
        number = jax.tree.leaves(items)[0].shape[0]
        at_once = max(size for size in range(1, min(most, number) + 1) if number % size == 0)
        blocks = jax.tree.map(lambda leaf: leaf.reshape(-1, at_once, *leaf.shape[1:]), items)

        def add(total: Any, block: Any) -> tuple[Any, None]:
            found = jax.vmap(work, (None, 0))(shared, block)
            return jax.tree.map(lambda x, y: x + jnp.sum(y, 0), total, found), None

        one = jax.eval_shape(work, shared, jax.tree.map(lambda leaf: leaf[0], items))
        nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), one)
        return lax.psum(lax.scan(add, nothing, blocks)[0], CLIENTS)

    mapped = jax.shard_map(on_one_device, mesh=mesh, in_specs=(P(), P(CLIENTS)), out_specs=P(), check_vma=False)
    return mapped(shared, items)


def map_in_order(work: Callable[..., Any], shared: Any, items: Any, chunk: int, mesh: Mesh) -> Any:
    """`map_over_devices` whose bits do not depend on the number of devices: every device ends with all results.

    Each works on the same blocks of `chunk` items, by one loop whose length the compiler does not know, and the blocks
    are gathered in their order. The leading axis is a multiple of `chunk`.
    """
    size, devices = jax.tree.leaves(items)[0].shape[0], mesh.shape[CLIENTS]
    blocks = size // chunk
    each = -(-blocks // devices)

    def of_block(shared: Any, items: Any, number: Array) -> Any:
        block = jax.tree.map(lambda leaf: lax.dynamic_slice_in_dim(leaf, number * chunk, chunk), items)
        if chunk > 1:
            return jax.vmap(work, (None, 0))(shared, block)
        return jax.tree.map(lambda leaf: leaf[None], work(shared, jax.tree.map(lambda leaf: leaf[0], block)))

    def on_one_device(shared: Any, items: Any) -> Any:
        first = lax.axis_index(CLIENTS) * each
        mine = lax.optimization_barrier(jnp.clip(blocks - first, 0, each))
        shapes = jax.eval_shape(of_block, shared, items, jnp.int32(0))
        found = jax.tree.map(lambda leaf: jnp.zeros((each * chunk, *leaf.shape[1:]), leaf.dtype), shapes)

        def add(number: Array, found: Any) -> Any:
            block = of_block(shared, items, first + number)
            return jax.tree.map(lambda x, y: lax.dynamic_update_slice_in_dim(x, y, number * chunk, 0), found, block)

        found = lax.fori_loop(0, mine, add, found)
        return jax.tree.map(lambda leaf: lax.all_gather(leaf, CLIENTS, tiled=True)[:size], found)

    mapped = jax.shard_map(on_one_device, mesh=mesh, in_specs=(P(), P()), out_specs=P(), check_vma=False)
    return mapped(shared, items)


def device_mesh(trials: int = 1, devices: Sequence[Any] | None = None, model: int = 1) -> Mesh:
    """All devices: as many as divide the trials take one each, and those of one trial share its clients.

    Args:
      trials: at once.
      devices: `jax.Device`s; None for those at hand.
      model: devices that hold one frozen base together, and count as one above.

    Raises:
      ValueError: `model` does not divide the number of devices.
    """
    shape = mesh_shape(jax.device_count() if devices is None else len(devices), trials, model)
    kinds = (jax.sharding.AxisType.Auto,) * len(shape)
    return jax.make_mesh(shape, (TRIALS, CLIENTS, MODEL), axis_types=kinds, devices=devices)


def mesh_shape(count: int, trials: int = 1, model: int = 1) -> tuple[int, int, int]:
    """The axes `trials`, `clients` and `model` of so many devices, see `device_mesh`."""
    if count % model:
        raise ValueError(f"engine.model_devices must divide the number of devices, {count}, got {model}")
    across = math.gcd(trials, count // model)
    return across, count // model // across, model


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of what every device holds whole."""
    return NamedSharding(mesh, P())


def split_over(mesh: Mesh, axes: Sequence[str], shape: Sequence[int]) -> NamedSharding:
    """The sharding of an array whose leading axes have these names.

    An axis that its devices do not divide is whole on each of them.
    """
    named = zip(axes, shape, strict=False)
    return NamedSharding(mesh, P(*(name if size % mesh.shape[name] == 0 else None for name, size in named)))
