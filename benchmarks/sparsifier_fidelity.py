"""How much of what clients learned survives each sparsifier: energy of the product's change, after real training.

Federated training with the dense uplink is stopped early and late; then every client of the next cohort trains once
more, and its change of the product, `a b - a0 b0`, is sent by each method. Reported is the share
`1 - ||change - what arrived||^2 / ||change||^2`, mean over the clients, and the same for the average over clients
of the factors as FedIT forms it. All methods spend the bits that `soft` spends at the ratio, or less. `svd` is the best
approximation of each client's change by as many rank-1 products as `soft` keeps: no method by rank can do better.
"""

import argparse
import json
from pathlib import Path

import common
import jax
import jax.numpy as jnp
import numpy as np

from fedjax_lora import use_cpu_cores
from fedjax_lora.base import Adapters, Scope
from fedjax_lora.build import build
from fedjax_lora.config import load_config
from fedjax_lora.lora.adapters import rank_mask
from fedjax_lora.presets import preset
from fedjax_lora.prng import client_keys, round_keys
from fedjax_lora.sim.engine import Simulation
from fedjax_lora.sim.local import Client
from fedjax_lora.sim.round import train_cohort
from fedjax_lora.sparsifiers import random_rank, soft, soft_rotated, top_k
from fedjax_lora.sparsifiers.diagnostics import difference_energy
from fedjax_lora.sparsifiers.wire import FLOAT32
from fedjax_lora.strategies import Sparsifier

RATIOS = (0.125, 0.25, 0.5, 0.75, 1.0)
METHODS = {
    "component norm": (soft, soft.SoftConfig(send="change", orthogonality=0)),
    "soft_rotated": (soft_rotated, soft_rotated.SoftRotatedConfig()),
    "soft_rotated global": (soft_rotated, soft_rotated.SoftRotatedConfig(budget="global")),
    "top_k": (top_k, top_k.TopKConfig()),
    "random ranks": (random_rank, random_rank.RandomRankConfig()),
}


def train_once(simulation: Simulation, state, cohort: int) -> Adapters:
    """What each of the first `cohort` clients holds after its next local training: leaves `[cohort, ...]`."""
    ids = jnp.arange(cohort)
    data, keys = simulation.world.data, client_keys(round_keys(state.key, state.round).local, ids)
    own = jax.tree.map(lambda leaf: leaf[ids], state.clients)

    def train(world, state):
        clients = Client(data.index[ids], data.count[ids], keys, own)
        return train_cohort(simulation.parts, world, state, state.adapters, clients).adapters

    return jax.jit(train)(simulation.world, state)


def ratio_within(method: Sparsifier, scope: Scope, budget_bits: float) -> float:
    """The largest keep ratio, to 1e-4, that costs no more than the budget; 0 where none does."""
    ratios = jnp.arange(1, 10_001) / 10_000
    fitting = np.asarray(jax.jit(method.payload_bits)(ratios, scope)) <= budget_bits
    return float(ratios[np.flatnonzero(fitting)[-1]]) if fitting.any() else 0.0


def shares(start: Adapters, trained: Adapters, rank: int, key: jax.Array) -> dict[str, dict[str, dict[str, float]]]:
    """Method -> ratio -> shares kept, of the clients' changes (mean) and of the average's."""
    max_rank = next(iter(start.modules.values())).a.shape[-1]
    scope = Scope.whole(rank_mask(rank, max_rank))
    everywhere = {name: jnp.ones((f.a.shape[0], max_rank)) for name, f in start.modules.items()}
    cohort = jax.tree.leaves(trained)[0].shape[0]

    def energy(x: Adapters, y: Adapters) -> jax.Array:
        return difference_energy(x, y, everywhere)

    def mean(cohort_adapters: Adapters) -> Adapters:
        return jax.tree.map(lambda leaf: jnp.mean(leaf, 0), cohort_adapters)

    whole = jax.jit(jax.vmap(energy, (0, None)))(trained, start)
    of_average = energy(mean(trained), start)
    budget = soft.make(soft.SoftConfig(send="change"), start)
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name, (module, config) in METHODS.items():
        method = module.make(config, start, FLOAT32)
        compress = jax.jit(jax.vmap(method.compress, (None, 0, None, None, None, 0)))
        for ratio in RATIOS:
            within = ratio_within(method, scope, float(budget.payload_bits(jnp.float32(ratio), scope)))
            within = ratio if ratio == 1.0 else within
            sent, _ = compress(start, trained, (), jnp.float32(within), scope, jax.random.split(key, cohort))
            lost = jax.jit(jax.vmap(energy))(trained, sent.adapters) / whole
            lost_of_average = energy(mean(trained), mean(sent.adapters)) / of_average
            found.setdefault(name, {})[str(ratio)] = {
                "clients": float(1 - jnp.mean(lost)),
                "average": float(1 - lost_of_average),
                "keep_ratio": within,
            }
    found["svd"] = {str(ratio): {"clients": best_share(start, trained, int(ratio * rank))} for ratio in RATIOS}
    return found


def best_share(start: Adapters, trained: Adapters, kept: int) -> float:
    """Mean share of energy in the `kept` largest singular values of each matrix's change, NumPy in float64."""
    per_client = []
    for client in range(jax.tree.leaves(trained)[0].shape[0]):
        best = total = 0.0
        for name, old in start.modules.items():
            new = jax.tree.map(lambda leaf, k=client: np.asarray(leaf[k], np.float64), trained.modules[name])
            left = np.concatenate([new.a, -np.asarray(old.a, np.float64)], -1)
            right = np.concatenate([new.b, np.asarray(old.b, np.float64)], -2)
            core = np.linalg.qr(left)[1] @ np.swapaxes(np.linalg.qr(np.swapaxes(right, -1, -2))[1], -1, -2)
            energies = np.linalg.svd(core, compute_uv=False) ** 2
            best, total = best + energies[:, :kept].sum(), total + energies.sum()
        per_client.append(best / total)
    return float(np.mean(per_client))


SETTINGS = {
    "adamw": ["local.optimizer.name=adamw", "local.optimizer.learning_rate=1e-2"],
    "sgd": ["local.optimizer.name=sgd", "local.optimizer.learning_rate=0.3"],
}


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
    kept = json.loads(options.out.read_text())["results"] if options.out.exists() else {}
    for optimizer, overrides in SETTINGS.items():
        for regulariser in (0.0, 0.1):
            for rank in options.ranks:
                name = f"{optimizer}, lambda {regulariser}, r {rank}"
                if name in kept:
                    continue
                kept[name] = _measure(options, rank, regulariser, overrides)
                common.note(f"{name}: {json.dumps(kept[name]['late']['accuracy'])}")
                options.out.parent.mkdir(parents=True, exist_ok=True)
                written = {"environment": common.environment(), "results": kept}
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
    for moment, rounds in (("early", options.early), ("late", options.late - options.early)):
        state, _ = simulation.run(state, rounds)
        trained = train_once(simulation, state, options.cohort)
        found[moment] = {
            "round": int(state.round),
            "accuracy": simulation.evaluate(state)[1],
            "shares": shares(state.adapters, trained, rank, jax.random.key(1)),
        }
    return found


if __name__ == "__main__":
    main()
