"""What one accelerator does with the engine and its parts, beside the device's own ceilings and a PyTorch loop.

Run as `python benchmarks/accelerator.py`. Each part runs in a process of its own and is saved as it ends; parts that
the file holds already are not run again. A part that fails is kept with its error and does not stop the others.
`--quick` is a small form of everything, for a machine without an accelerator.
"""

import argparse
import importlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from common import environment, note

PARTS = (
    "ceilings",
    "roberta_base",
    "minilm_bfloat16",
    "peer",
    "trials",
    "sparsifiers",
    "kernels",
    "minilm_float32",
    "clients",
    "tsfa",
)


def main() -> None:
    """Run the parts that the file does not hold yet; with `--part`, that one in this process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/accelerator.json"))
    parser.add_argument("--model", required=True, metavar="DIR", help="folder with the tokenizer.json of a BERT")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to run")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds that one part may take (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        parts = importlib.import_module("accelerator_parts")
        print(json.dumps(getattr(parts, options.part)(options.model, options.quick)))
        return
    found: dict[str, Any] = (
        json.loads(options.out.read_text()) if options.out.exists() else {"benchmark": "accelerator"}
    )
    found["environment"] = environment()
    for part in options.only:
        if part in found.get("parts", {}) and "error" not in found["parts"][part]:
            continue
        started = time.perf_counter()
        result = _run(part, options)
        found.setdefault("parts", {})[part] = {**result, "part_s": time.perf_counter() - started}
        note(f"{part}: {json.dumps(result)[:1500]}")
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(found, indent=2) + "\n")


def _run(part: str, options: argparse.Namespace) -> dict[str, Any]:
    """The JSON of one part, or its error."""
    command = [sys.executable, __file__, "--part", part, "--model", options.model]
    try:
        done = subprocess.run(
            [*command, "--quick"] if options.quick else command, capture_output=True, text=True, timeout=options.limit
        )
    except subprocess.TimeoutExpired:
        return {"error": f"took more than {options.limit:.0f} s"}
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:500]}
    return json.loads(done.stdout.strip().splitlines()[-1])


if __name__ == "__main__":
    main()
