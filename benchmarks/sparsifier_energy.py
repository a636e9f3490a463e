"""Share of the clients' changes that arrives of each sparsifier at equal bits, after real training on digits."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import sparsifier_fidelity as fidelity

from fedjax_lora.adapters.lora import rank_mask
from fedjax_lora.config.assemble import build
from fedjax_lora.config.experiment import load_config
from fedjax_lora.config.presets import preset
from fedjax_lora.core.exchange import Sparsifier
from fedjax_lora.core.methods import Context, Method
from fedjax_lora.core.types import Adapters, Scope
from fedjax_lora.sparsifiers import payload
from fedjax_lora.sparsifiers.diagnostics import difference_energy

RANK, KEEP_RATIO = 16, 0.5
SETTING = [f"lora.max_rank={RANK}", f"lora.rank={RANK}", "sparsifier.name=soft", "control.name=ideal"]
QUICK = ["clients.count=4", "local.steps=2", "pretrain.steps=20"]


def measure(methods: Mapping[str, Method], quick: bool) -> dict[str, Any]:
    """Name -> kept share of energy, keep ratio and bits, of as much as fits the bits of `soft` at half of the ranks.

    A method whose least message takes more has no row.
    """
    rounds, cohort = (1, 4) if quick else (10, 10)
    simulation = build(load_config(None, [*SETTING, *(QUICK if quick else [])], base=preset("digits")))
    state, _ = simulation.run(simulation.init(jax.random.key(0)), rounds)
    trained = fidelity.train_once(simulation, state, cohort)
    start, scope = state.adapters, Scope.whole(rank_mask(RANK, RANK))
    context = Context(num_clients=cohort, cohort_size=cohort, like=start)
    made = {name: method.make(method.options(), context) for name, method in methods.items()}
    budget = float(fidelity.offered_bits(made["soft"], start, scope)[int(KEEP_RATIO * RANK)])
    rows = {}
    for name, method in made.items():
        kept = fidelity.kept_within(method, start, scope, budget)
        if kept is not None:
            share, bits = shares(method, start, trained, kept, scope)
            rows[name] = {"kept_energy": share, "keep_ratio": kept / RANK, "bits_over_soft": bits / budget}
    return {"task": "digits", "rounds": rounds, "clients": cohort, "rank": RANK, "bits": budget, "methods": rows}


def shares(method: Sparsifier, start: Adapters, trained: Adapters, kept: float, scope: Scope) -> tuple[float, float]:
    """`1 - ||change - what arrived||^2 / ||change||^2` of the products, and bits: means over the clients."""
    everywhere = {name: jnp.ones((f.a.shape[0], f.a.shape[-1])) for name, f in start.modules.items()}

    @jax.jit
    def every(trained: Adapters) -> tuple[jax.Array, jax.Array]:
        def one(own: Adapters, key: jax.Array) -> tuple[jax.Array, jax.Array]:
            message = method.encode(start, own, method.init(own), jnp.float32(kept), scope, key)
            arrived = method.decode(start, message, scope).adapters
            lost = difference_energy(own, arrived, everywhere) / difference_energy(own, start, everywhere)
            return 1.0 - lost, payload.bits(payload.message_size(message)).float32()

        clients = jax.tree.leaves(trained)[0].shape[0]
        return jax.vmap(one)(trained, jax.random.split(jax.random.key(0), clients))

    share, bits = every(trained)
    return float(jnp.mean(share)), float(jnp.mean(bits))
