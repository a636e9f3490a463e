"""How fast a cohort sparsifies, beside what the memory can do and beside PyTorch; and what energy that keeps. JSON.

Each client holds the factors of one matrix and sends half of the components. A call is what a round computes of it for
all clients: tail energies to choose by, the message and its bits. Rates are of the least bytes that it could take: the
trained factors and what all share are read once, and what is sent is written once. The share of the copy bandwidth is
that of the faster of two copies, PyTorch's into memory at hand and JAX's into new memory. `choosing` times the energies
of all components alone. PyTorch works on the same numbers with as many threads; a full SVD is of a few clients.

Compiling is apart; calls are timed in turns. Sizes of which three copies would fill half of the memory are skipped and
listed. Each size is saved as it ends, and a second start goes on. `energy` is the share of the clients' changes, after
real training on digits, that arrives for no more bits than `soft` takes.
"""

import argparse
import functools
import itertools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import common
import jax
import jax.numpy as jnp
import sparsifier_programs as programs
from sparsifier_torch import Size, draw

from fedjax_lora import use_cpu_cores
from fedjax_lora.config import user_methods
from fedjax_lora.config.catalogue import Catalogue
from fedjax_lora.core.methods import Method

COPIES = 3
"""Of the trained factors: what is given, what is sent, and as much between them."""

FULL_WIDTH, FULL_CLIENTS = 1024, 4
"""The widest matrix whose full SVD is awaited, and of how many clients."""

MOST_S = 20.0
"""For which one is timed at one size at the most, beside its first call."""

CHECKED = {"rank": 16, "width": 768}
ASKED = {
    "soft, share of copy": (">=", 0.6),
    "QR-based SVD over soft": (">=", 1.0),
    "full SVD of the product over soft": (">=", 1000.0),
    "soft_rotated over soft": ("<=", 2.0),
}
"""What is asked of every cohort at CHECKED: seconds a client over those of `soft`, but for the first."""


def measure(size: Size, methods: Mapping[str, Method], options: argparse.Namespace, peer: common.Remote) -> dict:
    """One size: all methods, the choices alone, and PyTorch."""
    kept = max(1, size.rank // 2)
    full = min(size.clients, max(FULL_CLIENTS, jax.device_count())) if size.width <= FULL_WIDTH else 0
    held = programs.cohort(draw(size))
    made = {
        name: programs.message(programs.made(m, held.start, size.clients), held, kept) for name, m in methods.items()
    }
    of = {name: full if name == "full SVD" else size.clients for name in programs.CHOICES}
    chosen = {name: programs.choice(programs.CHOICES[name], held, count) for name, count in of.items() if count}
    every = made | {f"choosing by {name}": program for name, program in chosen.items()}
    bits_of: dict[str, Any] = {}
    calls = {
        name: functools.partial(_send, program, bits_of, name) if name in made else program.call
        for name, program in every.items()
    }
    turns = options.repeats, options.seconds, MOST_S
    seconds = common.in_turns(calls, *turns)
    bits = {name: float(jnp.mean(found)) for name, found in bits_of.items()}
    compile_s = {name: program.compile_s for name, program in every.items()}
    del held, made, chosen, every, calls, bits_of  # PyTorch is to have their memory
    row: dict[str, Any] = {**size._asdict(), "kept": kept, "methods": {}, "choosing": {}}
    for name in methods:
        floor = size.clients * (size.factor_bytes + bits[name] / 8) + size.factor_bytes
        rates = [floor * 1e-9 / s for s in seconds[name]]
        row["methods"][name] = {"compile_s": compile_s[name], "bits": bits[name], "floor_bytes": floor} | {
            "gb_per_s": common.spread(rates),
            **_calls(seconds[name], size.clients),
        }
    for name, count in of.items():
        if count:
            timed = f"choosing by {name}"
            row["choosing"][name] = {"compile_s": compile_s[timed], **_calls(seconds[timed], count)}
    found = peer.call("times", size, kept, full, *turns)
    row["torch"] = {
        name: _calls(times, full if name.startswith("full") else size.clients) for name, times in found.items()
    }
    return row


def _send(program: programs.Program, bits_of: dict[str, Any], name: str) -> None:
    """One call; its bits are kept, and the messages let go."""
    bits_of[name] = program.call()[-1]


def _calls(seconds: list[float], clients: int) -> dict[str, Any]:
    """Of calls of so many clients."""
    spread = common.spread(seconds)
    return {"clients": clients, "turns": len(seconds), "call_s": spread, "clients_per_s": clients / spread["median"]}


def checks(rows: list[dict[str, Any]], copy_gb_per_s: float) -> dict[str, Any]:
    """What is asked and found by number of clients, and whether all of it holds; nothing where no row is CHECKED."""
    found: dict[str, dict[str, float]] = {name: {} for name in ASKED}
    for row in rows:
        if {name: row[name] for name in CHECKED} != CHECKED or not {"soft", "soft_rotated", "svd"} <= set(
            row["methods"]
        ):
            continue
        rates = {name: each["clients_per_s"] for name, each in row["methods"].items()}
        full = max(
            row["choosing"]["full SVD"]["clients_per_s"], row["torch"]["full SVD of the product"]["clients_per_s"]
        )
        values = (
            row["methods"]["soft"]["gb_per_s"]["median"] / copy_gb_per_s,
            rates["soft"] / max(rates["svd"], row["torch"]["QR-based SVD"]["clients_per_s"]),
            rates["soft"] / full,
            rates["soft"] / rates["soft_rotated"],
        )
        for name, value in zip(ASKED, values, strict=True):
            found[name][str(row["clients"])] = value
    return {
        name: {
            "asked": f"{sign} {bound}",
            "by_clients": of,
            "holds": all(value >= bound if sign == ">=" else value <= bound for value in of.values()),
        }
        for name, (sign, bound) in ASKED.items()
        if (of := found[name])
    }


def sizes(options: argparse.Namespace) -> tuple[list[Size], list[dict[str, Any]]]:
    """What is measured, and what is skipped with the bytes that it would take."""
    limit = common.total_memory_bytes() // 2
    every = [Size(*size) for size in itertools.product(options.clients, options.ranks, options.widths)]
    needed = {size: COPIES * size.clients * size.factor_bytes for size in every}
    skipped = [
        {**size._asdict(), "bytes": needed[size], "limit_bytes": limit} for size in every if needed[size] > limit
    ]
    return [size for size in every if needed[size] <= limit], skipped


def main() -> None:
    """Measure what the output does not hold yet."""
    options = _parser().parse_args()
    if options.quick:
        options.clients, options.ranks, options.widths, options.repeats = [64], [16], [768], 3
    use_cpu_cores()
    methods = Catalogue.of(user_methods.load(options.methods).methods).by_slot["sparsifier"]
    made_with = {"methods": list(methods), "repeats": options.repeats, "seconds": options.seconds}
    held = json.loads(options.out.read_text()) if options.out and options.out.exists() else {}
    result: dict[str, Any] = held if held.get("made_with") == made_with else {"rows": []}
    measured, skipped = sizes(options)
    result |= {"benchmark": "sparsifier_throughput", "environment": common.environment(), "made_with": made_with}
    result["threads"] = threads = len(os.sched_getaffinity(0))
    result["device"] = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    result["skipped"] = skipped
    with common.Remote("sparsifier_torch:Torch", threads=threads) as peer:
        copies = {
            "torch, memory at hand": peer.call("copy_gb_per_s", options.copy_numbers, options.repeats),
            "jax, new memory": programs.copy_gb_per_s(
                options.copy_numbers, lambda call: common.in_turns({"copy": call}, options.repeats, 0.0)["copy"]
            ),
        }
        result["copy_gb_per_s"] = {name: common.spread(rates) for name, rates in copies.items()}
        best = max(rate["median"] for rate in result["copy_gb_per_s"].values())
        done = {(row["clients"], row["rank"], row["width"]) for row in result["rows"]}
        for size in measured:
            if tuple(size) not in done:
                row = measure(size, methods, options, peer) | {"git_commit": result["environment"]["git_commit"]}
                result["rows"].append(row)
                soft = row["methods"]["soft"]["gb_per_s"]["median"]
                common.note(f"{size}: soft {soft:.2f} GB/s of {best:.2f}")
            for row in result["rows"]:
                for each in row["methods"].values():
                    each["share_of_copy"] = each["gb_per_s"]["median"] / best
            result["checks"] = checks(result["rows"], best)
            _save(result, options.out)
    if not options.skip_energy and "energy" not in result:
        import sparsifier_energy

        result["energy"] = sparsifier_energy.measure(methods, options.quick)
    common.emit(result, options.out)


def _save(result: dict[str, Any], out: Path | None) -> None:
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=2) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[16, 256, 4096], help="(%(default)s)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 16, 64], help="(%(default)s)")
    parser.add_argument("--widths", type=int, nargs="+", default=[384, 768, 4096], help="(%(default)s)")
    parser.add_argument("--methods", nargs="+", default=[], metavar="FILE.py", help="sparsifiers of your own, too")
    parser.add_argument("--repeats", type=int, default=5, help="turns (%(default)s)")
    parser.add_argument("--seconds", type=float, default=0.1, help="of calls of one in a turn (%(default)s)")
    parser.add_argument("--copy-numbers", type=int, default=2**27, help="float32 that are copied (%(default)s)")
    parser.add_argument("--skip-energy", action="store_true", help="time alone")
    parser.add_argument("--quick", action="store_true", help="one size, and a short training: a minute")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="write the JSON there too; sizes that it holds are kept"
    )
    return parser


if __name__ == "__main__":
    main()
