"""Rounds of MiniLM with LoRA on sentences in float32, beside Flower's simulation engine, one side after the other.

Run as `python benchmarks/flower_text.py --flower-python PATH --text FILE`, with the python of an environment of
`peers/flower_text.txt`. Each side is a process of its own. Flower's actors train by PEFT, batches padded dynamically.
"""

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from client_overhead import CORES, HERE, Peer, Settings, fastest
from common import LEARNING_RATE, Quiet, Remote, Workload, emit, environment, note, workload, workload_arguments

PACKAGES = ("flwr", "ray", "torch", "transformers", "peft", "numpy")
TRIED = tuple(dict.fromkeys(Settings(*shared, False) for shared in ((CORES, 1), (1, CORES))))


def main() -> None:
    """Measure what the command line asks for."""
    options = _parser().parse_args()
    shape = workload(options)
    script = HERE / "peers/flower_rounds.py"
    peer = Peer("flower", options.flower_python, script, (), PACKAGES)
    result: dict[str, Any] = {
        "benchmark": "flower_text",
        "environment": environment() | {"peers": {"flower": peer.versions()}},
        "workload": {**vars(shape), "text": shape.text and shape.text.name, "model": Path(shape.model).parent.name},
    }
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        shape.write(folder)
        result["engine"] = _engine(shape, folder, options.rounds)
        tried = [_tried(peer, settings, _given(shape, folder)) for settings in TRIED]
        result["tried"] = tried
        result["flower"] = peer.run(fastest(tried), rounds=options.rounds, **_given(shape, folder))
    medians = [statistics.median(result[side]["round_s"]) for side in ("engine", "flower")]
    result["ratio"] = medians[1] / medians[0]
    note(f"a round: {medians[0]:.3g} s, Flower {medians[1]:.3g} s, {result['ratio']:.2f} times")
    emit(result, options.out)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--flower-python", metavar="PATH", required=True, help="python of the peer's environment")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds, after one to warm up (%(default)s)")
    workload_arguments(parser, clients=32)
    return parser


def _engine(shape: Workload, folder: Path, rounds: int) -> dict[str, Any]:
    """This project's side; it leaves its pool of tokens for the other."""
    given = {"dtype": "float32", "client_chunk": "auto", "wireless": False}
    with Remote("engine:Engine", workload=shape, folder=folder, **given) as engine:
        (input_ids, mask), label = engine.call("tokens"), engine.call("labels")
        pool = {"input_ids": input_ids, "attention_mask": mask, "label": label, "model": np.array(shape.model)}
        np.savez(_pool(folder), **pool)
        factors = engine.call("adapters")
        _, first_loss = engine.call("round")
        quiet = Quiet(engine)
        done = [engine.call("round") for _ in range(rounds)]
        return {
            **engine.call("describe"),
            "round_s": [seconds for seconds, _ in done],
            "train_loss": [first_loss, *(loss for _, loss in done)],
            "trained_parameters": sum(leaf.size for leaf in factors.values()),
            "cpu_share_of_others": quiet.share_of_others(),
        }


def _given(shape: Workload, folder: Path) -> dict[str, Any]:
    """The round, for Flower."""
    size = {"clients": shape.clients, "steps": shape.steps, "batch": shape.batch}
    return {"data": str(_pool(folder)), "learning_rate": LEARNING_RATE, "trainer": "torch_text", **size}


def _pool(folder: Path) -> Path:
    return folder / "pool.npz"


def _tried(peer: Peer, settings: Settings, given: dict[str, Any]) -> dict[str, Any]:
    """Seconds of one round at these settings."""
    found = {**settings._asdict(), "round_s": peer.run(settings, rounds=1, **given)["round_s"][0]}
    note(f"flower: {found}")
    return found


if __name__ == "__main__":
    main()
