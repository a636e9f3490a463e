"""How many clients to train at once: as many as fit the cache, or the memory of an accelerator."""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from fedjax_lora.adapters.lora import max_rank, rank_mask
from fedjax_lora.core import hosts, trees
from fedjax_lora.core.numbers import Numbers
from fedjax_lora.core.types import Adapters, Base
from fedjax_lora.data.batches import gather
from fedjax_lora.sim.cohort import padded_size
from fedjax_lora.sim.options import EngineConfig
from fedjax_lora.sim.parts import Layout, MakeParts, World
from fedjax_lora.training.local import local_loss

CPU_CACHE_BYTES = 32 * 2**20
"""A last-level cache of common size: once the activations spill from it, more clients at once gain nothing. The
devices of a CPU share it."""

ACCELERATOR_SHARE = 0.5
"""Share of the accelerator's memory that activations may take; the rest is weights, adapters and slack."""

UNTOLD_BYTES = 2**33
"""Memory of an accelerator that does not tell, or that a program is compiled for elsewhere."""


def activation_bytes(make_parts: MakeParts, numbers: Numbers, world: World, like: Adapters, batch_size: int) -> int:
    """Bytes that one client's backward pass keeps for its batch, from shapes alone."""

    def kept_bytes(size: int) -> int:
        def residuals(numbers: Numbers, adapters: Adapters, base: Base, pool: dict[str, jax.Array]):
            parts = make_parts(numbers)
            loss = local_loss(parts.model, parts.adapter, parts.task, parts.sparsifier, parts.aggregator)
            batch = gather(pool, jnp.zeros(size, jnp.int32))
            key, weight, mask = jax.random.key(0), jnp.ones(size), rank_mask(parts.rank, max_rank(adapters))
            inputs = adapters, base, parts.scale, mask, batch, weight, key
            return jax.vjp(lambda x: loss(x, *inputs)[0], adapters)[1]

        return trees.num_bytes(jax.eval_shape(residuals, numbers, like, world.base, world.data.train))

    # Weights are kept too, as many for two batches as for one.
    return kept_bytes(2 * batch_size) - kept_bytes(batch_size)


def activation_budget_bytes(mesh: Mesh) -> int:
    """What the activations of all clients at once may take on one of these devices."""
    device = mesh.devices.flat[0]
    if device.platform == "cpu":
        return CPU_CACHE_BYTES // mesh.size
    local = jax.local_devices()
    # Of the devices of other processes the first local one tells, so that every process chooses alike.
    at_hand = device in local or (hosts.several() and device in jax.devices())
    stats = local[0].memory_stats() if at_hand else None
    return int(ACCELERATOR_SHARE * (stats or {}).get("bytes_limit", UNTOLD_BYTES))


def choose_chunk(cohort_per_device: int, bytes_per_client: int, budget_bytes: int) -> int:
    """The most clients whose activations fit the budget, such that padding adds no more than 5 %; at least 1."""
    fitting = range(1, min(cohort_per_device, budget_bytes // bytes_per_client) + 1)
    full = [size for size in fitting if padded_size(cohort_per_device, size, 1) <= 1.05 * cohort_per_device]
    return max(full, default=1)


def chunk_size(engine: EngineConfig, layout: Layout, bytes_per_client: int, trials: int = 1) -> int:
    """Clients of a trial at once on each device, where it has so many trials at once."""
    cohort_per_device = -(-layout.cohort_size // (1 if layout.in_order else layout.num_devices))
    if engine.client_chunk != "auto":
        return min(engine.client_chunk, cohort_per_device)
    return choose_chunk(cohort_per_device, trials * bytes_per_client, activation_budget_bytes(layout.mesh))
