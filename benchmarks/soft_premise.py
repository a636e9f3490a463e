"""What makes native SOFT's premise true, and at what cost: start, optimizer, regulariser and rotation by the server.

The premise is that few components carry most of what a client learned. Each setting trains on digits with `soft` at
keep ratio 1/4 and no network, 10 of 50 clients a round; factors are sent unless its name says `change`. Halfway the
clients of a cohort train once more, and `share_1/4` and `share_1/2` are what `soft`, selecting as it is configured,
keeps of the energy of their change (as in sparsifier_fidelity.py); `random_1/4` is what the same number of random
components keeps, and `cosine` the largest |cosine| between two components of a client. `accuracy` is on development
examples, the last fifth of each client's, which nobody trains on; the test examples are not touched. Means and
deviations are over the seeds.
"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import NamedTuple

import common
import jax
import jax.numpy as jnp
import numpy as np
from sparsifier_fidelity import kept_shares, train_once

from fedjax_lora.adapters.lora import rank_mask
from fedjax_lora.config.assemble import build
from fedjax_lora.config.experiment import load_config
from fedjax_lora.config.presets import preset
from fedjax_lora.core.exchange import Sparsifier
from fedjax_lora.core.methods import Context
from fedjax_lora.core.types import Adapters, Dataset, Factors, FedState, Scope
from fedjax_lora.report.cells import Spread
from fedjax_lora.sim.engine import Simulation
from fedjax_lora.sparsifiers import random_rank
from fedjax_lora.sparsifiers.diagnostics import orthogonality
from fedjax_lora.sparsifiers.soft import Send
from fedjax_lora.sparsifiers.svd import thin_svd

BASE = [
    "rounds=40",
    "clients.per_round=10",
    "sparsifier.name=soft",
    "control.name=ideal",
    "control.keep_ratio=0.25",
    "engine.eval_every=20",
]
SGD = ["local.optimizer.name=sgd", "local.optimizer.learning_rate=0.3", "local.optimizer.clip_norm=1.0"]
MOMENTUM = ["local.optimizer.name=momentum", "local.optimizer.learning_rate=0.1", "local.optimizer.clip_norm=1.0"]


class Setting(NamedTuple):
    """Overrides, and the number of rounds between two rotations by the server; 0 for none."""

    overrides: list[str]
    rotate_every: int = 0


def _soft(*overrides: str, orthogonality: float = 0.1, send: Send = "factors") -> list[str]:
    return [f"sparsifier.orthogonality={orthogonality}", f"sparsifier.send={send}", *overrides]


SETTINGS = {
    "adamw dense": Setting(["sparsifier.name=dense"]),
    "adamw": Setting(_soft()),
    "adamw, rotated every round": Setting(_soft(), 1),
    "adamw, lambda 0": Setting(_soft(orthogonality=0.0)),
    "adamw, lambda 0, rotated every round": Setting(_soft(orthogonality=0.0), 1),
    "adamw, rotated every 5": Setting(_soft(), 5),
    "adamw, lambda 0.01": Setting(_soft(orthogonality=0.01)),
    "adamw, lambda 1": Setting(_soft(orthogonality=1.0)),
    "adamw, lambda 10": Setting(_soft(orthogonality=10.0)),
    "adamw, a_only": Setting(_soft("sparsifier.form=a_only")),
    "adamw, identity": Setting(_soft("sparsifier.form=identity")),
    "adamw, start 0.3": Setting(_soft("lora.init_scale=0.3")),
    "adamw, start 3": Setting(_soft("lora.init_scale=3")),
    "adamw, change": Setting(_soft(send="change")),
    "adamw, lambda 0, change": Setting(_soft(send="change", orthogonality=0.0)),
    "adamw, lambda 0.01, change": Setting(_soft(send="change", orthogonality=0.01)),
    "adamw, lambda 1, change": Setting(_soft(send="change", orthogonality=1.0)),
    "adamw, a_only, change": Setting(_soft("sparsifier.form=a_only", send="change")),
    "adamw, start 0.3, change": Setting(_soft("lora.init_scale=0.3", send="change")),
    "adamw, lambda 0, change, rotated every round": Setting(_soft(send="change", orthogonality=0.0), 1),
    "sgd dense": Setting(["sparsifier.name=dense", *SGD]),
    "sgd": Setting(_soft(*SGD)),
    "sgd, lambda 0": Setting(_soft(*SGD, orthogonality=0.0)),
    "sgd, lambda 0, rotated every round": Setting(_soft(*SGD, orthogonality=0.0), 1),
    "momentum dense": Setting(["sparsifier.name=dense", *MOMENTUM]),
    "momentum, lambda 0": Setting(_soft(*MOMENTUM, orthogonality=0.0)),
    "momentum, lambda 0, rotated every round": Setting(_soft(*MOMENTUM, orthogonality=0.0), 1),
}


def hold_out(data: Dataset) -> Dataset:
    """The last fifth of each client's training examples as what is evaluated on, and trained on by nobody."""
    index, count = np.asarray(data.index), np.asarray(data.count)
    left = np.maximum(count - count // 5, 1)
    rows = np.concatenate([index[k, left[k] : count[k]] for k in range(len(count))])
    test = {name: leaf[rows] for name, leaf in data.train.items()}
    return dataclasses.replace(data, count=jnp.asarray(left, data.count.dtype), test=test)


@jax.jit
def rotate(adapters: Adapters) -> Adapters:
    """The same products by components that are their singular triples: a with columns of one length, b with the values.

    The length is the root mean square of the columns before, so that no component without a value dies.
    """

    def turned(f: Factors) -> Factors:
        u, s, v = thin_svd(f.a, f.b)
        length = jnp.sqrt(jnp.mean(jnp.sum(f.a**2, axis=-2), axis=-1))[:, None, None]
        return Factors(a=length * u, b=s[..., None] * jnp.swapaxes(v, -1, -2) / length)

    return dataclasses.replace(adapters, modules={name: turned(f) for name, f in adapters.modules.items()})


def advance(simulation: Simulation, state: FedState, rounds: int, rotate_every: int) -> FedState:
    """So many rounds, the adapters rotated after every `rotate_every` of them."""
    each = rotate_every or rounds
    for _ in range(rounds // each):
        state, _ = simulation.run(state, each)
        if rotate_every:
            state = dataclasses.replace(state, adapters=rotate(state.adapters))
    return state


def measure(setting: Setting, seed: int, simulation: Simulation, random: Sparsifier) -> dict[str, float]:
    """One run; the premise is measured halfway."""
    state = advance(simulation, simulation.init(jax.random.key(seed)), 20, setting.rotate_every)
    trained = train_once(simulation, state, 10)
    ranks = rank_mask(8, 8)
    key, scope = jax.random.key(1), Scope.whole(ranks)

    def share(method: Sparsifier, ratio: float) -> float:
        return float(kept_shares(method, state.adapters, trained, jnp.float32(8 * ratio), scope, key)[0])

    chosen = simulation.make_parts(simulation.numbers).sparsifier
    found = {
        "share_1/4": share(chosen, 0.25),
        "share_1/2": share(chosen, 0.5),
        "random_1/4": share(random, 0.25),
        "cosine": float(jnp.mean(jax.vmap(orthogonality, (0, None))(trained, ranks))),
    }
    return {**found, "accuracy": simulation.evaluate(advance(simulation, state, 20, setting.rotate_every))[1]}


def summarize(runs: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Mean and deviation of every number over the seeds."""
    spreads = {name: Spread.of(run[name] for run in runs) for name in runs[0]}
    return {name: {"mean": s.mean, "deviation": s.deviation or 0.0} for name, s in spreads.items() if s}


def main() -> None:
    """Run what the output file does not hold yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS), metavar="NAME")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/soft_premise.json"))
    options = parser.parse_args()
    environment = common.environment()  # before the output, which git may know, is written
    kept = json.loads(options.out.read_text())["runs"] if options.out.exists() else {}
    for name in options.settings:
        setting = SETTINGS[name]
        missing = range(len(kept.get(name, [])), options.seeds)
        if not missing:
            continue
        simulation = build(load_config(None, [*BASE, *setting.overrides], base=preset("digits")))
        simulation.world = dataclasses.replace(simulation.world, data=hold_out(simulation.world.data))
        like = simulation.init(jax.random.key(0)).adapters
        random = random_rank.make(random_rank.RandomRankConfig(), Context(num_clients=1, cohort_size=1, like=like))
        for seed in missing:
            kept.setdefault(name, []).append(measure(setting, seed, simulation, random))
        table = {name: summarize(runs) for name, runs in kept.items()}
        common.note(f"{name}: " + ", ".join(f"{key} {value['mean']:.3f}" for key, value in table[name].items()))
        options.out.parent.mkdir(parents=True, exist_ok=True)
        written = {"environment": environment, "table": table, "runs": kept}
        options.out.write_text(json.dumps(written, indent=2) + "\n")
    print(json.dumps({name: summarize(runs) for name, runs in kept.items()}, indent=2))


if __name__ == "__main__":
    main()
