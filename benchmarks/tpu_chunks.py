"""What a TPU would do in one training step, by its compiler alone: bytes, FLOP and estimated time, without a TPU.

One layer of MiniLM's shape, forward and backward to its input and to its adapters, for 1 ... 64 clients at once, and
the projection to queries, keys and values alone with its factors apart, side by side, and side by side for several
clients. A layer that is scanned is counted once by the compiler, hence one layer; a round has LAYERS * STEPS of them.

It needs `libtpu` (the extra `tpu`), and no TPU.
"""

import argparse
import functools
import importlib.metadata
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import jax
import jax.numpy as jnp
import random_model
from common import RANK, emit, environment, note
from jax import Array
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from fedjax_lora.adapters import lora
from fedjax_lora.core.learning import Hidden
from fedjax_lora.core.methods import Context
from fedjax_lora.core.types import Adapters, Factors
from fedjax_lora.models import bert
from fedjax_lora.ops import primitives
from fedjax_lora.ops.lora_matmul import lora_matmul
from fedjax_lora.tasks import classification

CHUNKS = (1, 2, 4, 8, 16, 32, 64)
SHAPE = random_model.SHAPES["minilm"]
LAYERS, STEPS, BATCH, LENGTH = SHAPE["num_hidden_layers"], 2, 8, 64
MODULES = ("query", "key", "value")
FIELDS = {"flops": "flop", "bytes accessed": "bytes", "optimal_seconds": "estimated_s"}


def apart(x: Array, w: Array, adapters: dict[str, tuple[int, Factors]]) -> Array:
    """`adapters.lora.project` with the factors of each module on their own."""
    y, dtype = primitives.project(x, w), primitives.unpack(w).dtype
    for first, factors in adapters.values():
        a, b = factors.a.astype(dtype), factors.b.astype(dtype)
        narrow = jnp.matmul(x.astype(dtype), a, preferred_element_type=jnp.float32).astype(dtype)
        added = jnp.matmul(narrow, b, preferred_element_type=jnp.float32)
        y = y + jnp.pad(added, ((0, 0),) * (y.ndim - 1) + ((first, y.shape[-1] - first - b.shape[-1]),))
    return y


def layer(project: Callable, clients: int) -> tuple[Callable, tuple]:
    """One layer with adapters on q, k and v: its gradients, and the shapes of its arguments."""
    context = Context(num_clients=1, cohort_size=1, num_classes=2)
    adapter = lora.make(lora.LoraAdapterOptions(), context)._replace(project=project)
    task = classification.make(classification.ClassificationOptions(), context)
    shape = bert.shape(SHAPE | {"num_hidden_layers": 1, "vocab_size": 30522}, compute_dtype="bfloat16")
    model = bert.bert(shape, task, adapter)
    base = jax.eval_shape(model.init, jax.random.key(0))
    sites = {name: model.sites[name] for name in MODULES}
    one = jax.eval_shape(lambda key: adapter.init(key, sites, 1, RANK), jax.random.key(0))
    modules = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((clients, *leaf.shape), leaf.dtype), one)
    values = jax.ShapeDtypeStruct((clients, BATCH, LENGTH, shape.width), jnp.float32)

    def total(values: Array, modules: Any, base: Any) -> Array:
        hidden = Hidden(values=values, mask=jnp.ones((BATCH, LENGTH)))
        return jnp.sum(model.layers(base, Adapters(modules=modules, head={}), hidden, None).values ** 2)

    def step(values: Array, modules: Any, base: Any) -> Any:
        return jax.vmap(jax.grad(total, argnums=(0, 1)), (0, 0, None))(values, modules, base)

    return step, (values, modules, base)


def projection(side_by_side: str, clients: int) -> tuple[Callable, tuple]:
    """The projection to q, k and v of all clients: its gradients, and the shapes of its arguments."""
    width, rows = SHAPE["hidden_size"], BATCH * LENGTH
    x = jax.ShapeDtypeStruct((clients, rows, width), jnp.float32)
    w = jax.ShapeDtypeStruct((width, 3 * width), jnp.bfloat16)
    a = jax.ShapeDtypeStruct((clients, width, RANK), jnp.float32)
    b = jax.ShapeDtypeStruct((clients, RANK, width), jnp.float32)

    def total(x: Array, modules: dict[str, Factors], w: Array) -> Array:
        placed = {name: (place * width, factors) for place, (name, factors) in enumerate(modules.items())}
        if side_by_side == "clients":
            joined = jax.vmap(lambda own: lora._side_by_side(own, 3 * width), (dict.fromkeys(placed, (None, 0)),))
            return jnp.sum(lora_matmul(x, w, joined(placed), implementation="pallas") ** 2)
        project = apart if side_by_side == "nothing" else lora.project
        each = jax.vmap(lambda x, own: project(x, w, own), (0, dict.fromkeys(placed, (None, 0))))
        return jnp.sum(each(x, placed) ** 2)

    return jax.grad(total, argnums=(0, 1)), (x, {name: Factors(a=a, b=b) for name in MODULES}, w)


CASES: dict[str, Callable[[int], tuple[Callable, tuple]]] = {
    "layer, q k v side by side": functools.partial(layer, lora.project),
    "layer, factors apart": functools.partial(layer, apart),
    "projection, factors apart": functools.partial(projection, "nothing"),
    "projection, q k v side by side": functools.partial(projection, "modules"),
    "projection, clients too": functools.partial(projection, "clients"),
}


def compiled(case: str, clients: int, device: Any) -> dict[str, Any]:
    """The compiler's account of a case: of all its clients, memory beside them, seconds of compiling."""
    function, shapes = CASES[case](clients)
    sharding = SingleDeviceSharding(device)
    placed = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes)
    started = time.perf_counter()
    program = jax.jit(function).lower(*placed).compile()
    seconds = time.perf_counter() - started
    costs, memory = program.cost_analysis(), program.memory_analysis()
    assert isinstance(costs, dict) and memory is not None
    row = {"case": case, "clients": clients, "compile_s": seconds, "temporary_bytes": memory.temp_size_in_bytes}
    found: dict[str, float | None] = {name: costs[field] for field, name in FIELDS.items()}
    if costs["optimal_seconds"] < 0:  # a part of the program has no estimate
        found["estimated_s"] = None
    return row | found


def main() -> None:
    """Compile all cases for the targets that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--targets", nargs="+", default=["v5e:2x2"], help="topologies (%(default)s)")
    parser.add_argument("--chunks", nargs="+", type=int, default=CHUNKS, help="clients at once (%(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the JSON there too")
    options = parser.parse_args()
    result: dict[str, Any] = {
        "benchmark": "tpu_chunks",
        "environment": environment() | {"libtpu": importlib.metadata.version("libtpu")},
        "workload": {"shape": SHAPE, "batch": BATCH, "length": LENGTH, "rank": RANK, "modules": MODULES},
        "layers_of_a_round": LAYERS * STEPS,
        "targets": {},
    }
    for target in options.targets:
        device = topologies.get_topology_desc(target, platform="tpu").devices[0]
        rows = result["targets"][target] = []
        for case in CASES:
            for clients in options.chunks:
                row = compiled(case, clients, device)
                rows.append(row)
                if options.out is not None:  # each row is kept as it is found
                    options.out.write_text(json.dumps(result, indent=2) + "\n")
                each = {name: row[name] / clients for name in FIELDS.values() if row[name] is not None}
                note(f"{target} {case:32} {clients:3} " + " ".join(f"{name} {x:.3g}" for name, x in each.items()))
    emit(result, options.out)


if __name__ == "__main__":
    main()
