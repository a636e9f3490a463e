"""How much of what clients learned survives each sparsifier: energy of the product's change, after real training.

Federated training with the dense uplink is stopped early and late; then every client of a cohort trains once more, and
its change of the product, `a b - a0 b0`, is sent by each method. Reported is the share
`1 - ||change - what arrived||^2 / ||change||^2`: of `clients`, the mean over their own changes, and of the `average`,
where the change is the mean of the clients' products less the broadcast's, and what arrived is what FedIT's server
makes of the uploads: factors averaged apart, a component over those who sent it, all clients alike. `dense` loses of
the average what averaging the factors apart does. Each method is measured at the keep ratio itself, and again where it
keeps as much as it can for no more bits than `soft` (absent where even one component is too dear). `svd` is the
best approximation of each client's change by as many rank-1 products as `soft` keeps, whatever its factors were, and
the exact mean of these.
"""

import argparse
import bisect
import functools
import json
from pathlib import Path
from typing import Any

import common
import jax
import jax.numpy as jnp
import numpy as np

from fedjax_lora import use_cpu_cores
from fedjax_lora.adapters.lora import rank_mask
from fedjax_lora.aggregation import fedit
from fedjax_lora.aggregation.errors import averaging_energy
from fedjax_lora.config.assemble import build
from fedjax_lora.config.experiment import load_config
from fedjax_lora.config.presets import preset
from fedjax_lora.core import trees
from fedjax_lora.core.exchange import Received, Size, Sparsifier
from fedjax_lora.core.keys import client_keys, round_keys
from fedjax_lora.core.learning import Client
from fedjax_lora.core.methods import Context
from fedjax_lora.core.types import Adapters, FedState, Scope
from fedjax_lora.sim.engine import Simulation
from fedjax_lora.sim.round import train_cohort
from fedjax_lora.sparsifiers import dense, payload, random_rank, soft, soft_rotated, top_k
from fedjax_lora.sparsifiers.diagnostics import difference_energy

RATIOS = (0.125, 0.25, 0.5, 0.75, 1.0)
METHODS = {
    "dense": (dense, dense.DenseConfig()),
    "soft, factors": (soft, soft.SoftConfig(send="factors")),
    "soft, change": (soft, soft.SoftConfig(send="change")),
    "soft, change, zero": (soft, soft.SoftConfig(send="change", missing="zero")),
    "soft_rotated": (soft_rotated, soft_rotated.SoftRotatedConfig()),
    "soft_rotated, global": (soft_rotated, soft_rotated.SoftRotatedConfig(budget="global")),
    "top_k": (top_k, top_k.TopKConfig()),
    "random_rank": (random_rank, random_rank.RandomRankConfig()),
}
# The clipping keeps plain SGD stable beside the regulariser, whose gradient grows as the cube of the factors.
SETTINGS = {
    "adamw": ["local.optimizer.name=adamw", "local.optimizer.learning_rate=1e-2"],
    "sgd": ["local.optimizer.name=sgd", "local.optimizer.learning_rate=0.3", "local.optimizer.clip_norm=1.0"],
}


def train_once(simulation: Simulation, state: FedState, cohort: int) -> Adapters:
    """What each of the first `cohort` clients holds after its next local training: leaves `[cohort, ...]`."""
    ids = jnp.arange(cohort)
    data, keys = simulation.world.data, client_keys(round_keys(state.key, state.round).local, ids)
    own = jax.tree.map(lambda leaf: leaf[ids], state.clients)

    def train(world, state):
        clients = Client(data.index[ids], data.count[ids], keys, own.rank, own.personal, own.methods)
        parts, here = simulation.make_parts(state.numbers), jnp.ones(cohort, bool)
        return train_cohort(parts, world, state, state.adapters, clients, here, here)[0].adapters

    trained = jax.jit(train)(simulation.world, state)
    if not trees.fits_float32(trained):
        raise FloatingPointError(f"local training must stay finite, diverged after round {int(state.round)}")
    return trained


def offered_bits(method: Sparsifier, start: Adapters, scope: Scope) -> np.ndarray:
    """`[R + 1]` bits of a message of 0 ... R ranks a module, or the most that they can be."""
    return payload.bits(jax.jit(lambda: method.offer(start, start, scope).size)()).exact()


def kept_within(method: Sparsifier, start: Adapters, scope: Scope, budget_bits: float) -> float | None:
    """The most ranks, whole ones or to 1e-4 of all, that cost no more than the budget; None where none does."""
    rank = int(jnp.sum(scope.ranks))
    steps, key = rank if method.whole_ranks else 10_000, jax.random.key(0)

    @jax.jit
    def size(kept: jax.Array) -> Size:
        return payload.message_size(method.encode(start, start, method.init(start), kept, scope, key))

    def cost(step: int) -> int:
        return int(payload.bits(size(jnp.float32(step * rank / steps))).exact())

    bits = offered_bits(method, start, scope).item if method.whole_ranks else cost
    fitting = bisect.bisect_right(range(1, steps + 1), budget_bits, key=bits)
    return fitting * rank / steps if fitting else None


@functools.partial(jax.jit, static_argnums=0)
def kept_shares(
    method: Sparsifier, start: Adapters, trained: Adapters, kept: jax.Array, scope: Scope, key: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Shares of energy that arrive, of the clients' changes (mean) and of their average's, and a client's mean bits."""
    everywhere = {name: jnp.ones((f.a.shape[0], f.a.shape[-1])) for name, f in start.modules.items()}
    number = jax.tree.leaves(trained)[0].shape[0]
    keys, weights = jax.random.split(key, number), jnp.full(number, 1 / number)

    def send(trained: Adapters, key: jax.Array) -> tuple[Received, jax.Array]:
        message = method.encode(start, trained, method.init(start), kept, scope, key)
        return method.decode(start, message, scope), payload.bits(payload.message_size(message)).float32()

    received, bits = jax.vmap(send)(trained, keys)
    aggregator = fedit.make(fedit.FedItConfig(), Context(number, number, like=start))
    server = aggregator.aggregate(start, trained, received, weights, jnp.ones(()), key).adapters

    def lost(x: Adapters, y: Adapters) -> jax.Array:
        return difference_energy(x, y, everywhere) / difference_energy(x, start, everywhere)

    def off(adapters: Adapters) -> jax.Array:
        """Energy of the clients' mean product less this one."""
        by_layer = jax.vmap(averaging_energy, (1, 0, None, None))
        each = [by_layer(f, adapters.modules[name], None, weights) for name, f in trained.modules.items()]
        return jnp.sum(jnp.stack(each))

    of_clients = jnp.mean(jax.vmap(lost)(trained, received.adapters))
    return 1 - of_clients, 1 - off(server) / off(start), jnp.mean(bits)


def make_methods(like: Adapters) -> dict[str, Sparsifier]:
    """The methods by name; made once, since each is compiled once."""
    context = Context(num_clients=1, cohort_size=1, like=like)
    return {name: module.make(config, context) for name, (module, config) in METHODS.items()}


def shares(
    methods: dict[str, Sparsifier], start: Adapters, trained: Adapters, rank: int, key: jax.Array
) -> dict[str, dict[str, Any]]:
    """Method -> ratio -> shares kept, at the ratio and at the bits of `soft`."""
    scope = Scope.whole(rank_mask(rank, next(iter(start.modules.values())).a.shape[-1]))
    budgets = offered_bits(methods["soft, factors"], start, scope)
    found: dict[str, dict[str, Any]] = {name: {} for name in methods}
    for name, method in methods.items():
        for ratio in RATIOS:
            budget = float(budgets[int(ratio * rank)])
            chosen = {"equal_ratio": ratio * rank, "equal_bits": kept_within(method, start, scope, budget)}
            found[name][str(ratio)] = {}
            for kind, used in chosen.items():
                if used is not None:
                    clients, average, bits = kept_shares(method, start, trained, jnp.float32(used), scope, key)
                    row = {"keep_ratio": used / rank, "clients": float(clients), "average": float(average)}
                    found[name][str(ratio)][kind] = {**row, "bits_over_soft": float(bits) / budget}
    found["svd"] = {
        str(ratio): dict(zip(("clients", "average"), best_shares(start, trained, int(ratio * rank)), strict=True))
        for ratio in RATIOS
    }
    return found


def best_shares(start: Adapters, trained: Adapters, kept: int) -> tuple[float, float]:
    """Shares of energy in the `kept` largest singular triples of each matrix's change, NumPy in float64.

    Of the clients' changes, the mean; and of their mean, where each is cut.
    """
    left, whole = np.zeros(jax.tree.leaves(trained)[0].shape[0]), 0.0
    left_of_mean = whole_of_mean = 0.0
    for name, old in start.modules.items():
        before, new = (jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), f) for f in (old, trained.modules[name]))
        change = new.a @ new.b - before.a @ before.b
        u, values, vt = np.linalg.svd(change, full_matrices=False)
        cut = (u[..., kept:] * values[..., None, kept:]) @ vt[..., kept:, :]
        left, whole = left + np.sum(cut**2, (1, 2, 3)), whole + np.sum(change**2, (1, 2, 3))
        left_of_mean += np.sum(cut.mean(0) ** 2)
        whole_of_mean += np.sum(change.mean(0) ** 2)
    return float(np.mean(1 - left / whole)), float(1 - left_of_mean / whole_of_mean)


def main() -> None:
    """Measure every setting that the output file does not hold yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--early", type=int, default=2, help="rounds before the first measurement")
    parser.add_argument("--late", type=int, default=20, help="rounds before the second")
    parser.add_argument("--cohort", type=int, default=10)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/sparsifier_fidelity.json"))
    options = parser.parse_args()
    use_cpu_cores()
    environment = common.environment()  # before the output, which git may know, is written
    made_with = {"early": options.early, "late": options.late, "cohort": options.cohort, "methods": list(METHODS)}
    held = json.loads(options.out.read_text()) if options.out.exists() else {}
    kept = held["results"] if held.get("made_with") == made_with else {}
    for optimizer, overrides in SETTINGS.items():
        for regulariser in (0.0, 0.1):
            for rank in options.ranks:
                name = f"{optimizer}, lambda {regulariser}, r {rank}"
                if name in kept:
                    continue
                kept[name] = _measure(options, rank, regulariser, overrides)
                common.note(f"{name}: {json.dumps(kept[name]['late']['accuracy'])}")
                options.out.parent.mkdir(parents=True, exist_ok=True)
                written = {"environment": environment, "made_with": made_with, "results": kept}
                options.out.write_text(json.dumps(written, indent=2) + "\n")
    print(json.dumps(kept, indent=2))


def _measure(options: argparse.Namespace, rank: int, regulariser: float, overrides: list[str]) -> dict:
    config = load_config(
        None,
        [
            f"lora.max_rank={rank}",
            f"lora.rank={rank}",
            "clients.per_round=10",
            "sparsifier.name=soft",
            f"sparsifier.orthogonality={regulariser}",
            "control.name=ideal",
            "local.optimizer.schedule=constant",
            *overrides,
        ],
        base=preset("digits"),
    )
    simulation = build(config)
    state, found = simulation.init(jax.random.key(0)), {}
    methods = make_methods(state.adapters)
    for moment, rounds in (("early", options.early), ("late", options.late - options.early)):
        state, _ = simulation.run(state, rounds)
        trained = train_once(simulation, state, options.cohort)
        found[moment] = {
            "round": int(state.round),
            "accuracy": simulation.evaluate(state)[1],
            "shares": shares(methods, state.adapters, trained, rank, jax.random.key(1)),
        }
    return found


if __name__ == "__main__":
    main()
