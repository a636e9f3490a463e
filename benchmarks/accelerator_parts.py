"""The parts of `accelerator.py`: each is `(folder with a tokenizer, quick) -> what goes into the JSON`."""

import functools
import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import random_model
from common import RANK, TARGETS, Dtype, PeerSettings, Workload

ROBERTA_BASE, MINILM = random_model.SHAPES["roberta-base"], random_model.SHAPES["minilm"]
IMPLEMENTATIONS: tuple[Literal["xla", "pallas"], ...] = ("xla", "pallas")
PEERS: tuple[tuple[Dtype, Dtype], ...] = (("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float32", "float32"))
"""Dtype of the products and of the frozen matrices."""
SMALL = {"num_hidden_layers": 2, "hidden_size": 48, "num_attention_heads": 3, "intermediate_size": 96}


def ceilings(model: str, quick: bool) -> dict[str, Any]:
    """Matrix rate by dtype and precision, and the bandwidth of a copy (bytes read and written)."""
    del model
    size, numbers = (256, 2**16) if quick else (8192, 2**30)
    found: dict[str, Any] = {"device": jax.devices()[0].device_kind, "size": size}
    for name, dtype, precision in (
        ("bfloat16", jnp.bfloat16, None),
        ("float32 by default", jnp.float32, None),
        ("float32 at highest precision", jnp.float32, "highest"),
    ):
        x = jax.random.normal(jax.random.key(0), (size, size), dtype)
        seconds = timed(jax.jit(lambda x, precision=precision: jnp.matmul(x, x, precision=precision)), x)
        found[f"{name}, TFLOP/s"] = 2e-12 * size**3 / seconds
    x = jax.random.normal(jax.random.key(0), (numbers,))
    found["copy, GB/s"] = 8e-9 * numbers / timed(jax.jit(lambda x: x + 1.0), x)
    return found


def minilm_bfloat16(model: str, quick: bool) -> dict[str, Any]:
    """Rounds of 256 clients of MiniLM's shape by clients trained at once."""
    return _rounds(model, SMALL if quick else MINILM, "bfloat16", ("auto", 32, 8), quick)


def minilm_float32(model: str, quick: bool) -> dict[str, Any]:
    """The same in float32 as the device multiplies it by default."""
    return _rounds(model, SMALL if quick else MINILM, "float32", ("auto", 32), quick)


def roberta_base(model: str, quick: bool) -> dict[str, Any]:
    """Rounds of 256 clients of RoBERTa-base's shape, and the frozen model alone on as many samples."""
    return _rounds(model, SMALL if quick else ROBERTA_BASE, "bfloat16", ("auto", 32, 8), quick)


def _rounds(
    model: str, shape: dict[str, int], dtype: Dtype, chunks: tuple[int | Literal["auto"], ...], quick: bool
) -> dict[str, Any]:
    from engine import Engine

    with checkpoint(model, shape) as folder:
        work = Workload(model=str(folder), clients=4 if quick else 256, length=16 if quick else 64)
        work.write(folder)
        rows = []
        for chunk in chunks:
            engine = Engine(work, folder, dtype, chunk, wireless=False)
            engine.round()
            seconds = [engine.round()[0] for _ in range(5)]
            rate = work.samples / statistics.median(seconds)
            row = engine.describe() | {"asked": chunk, "round_s": seconds, "samples_per_s": rate}
            row["tflops"] = rate * work.flop([work.length]) / 1e12
            row["peak_memory_bytes_so_far"] = engine.peak_memory_bytes()
            rows.append(row)
            del engine
            gc.collect()
        best = max(rows, key=lambda row: row["samples_per_s"])
        return {
            "workload": {**vars(work), "model": shape, "gflop_per_sample": work.flop([work.length]) / 1e9},
            "dtype": dtype,
            "rows": rows,
            "best_chunk": best["client_chunk"],
            "frozen_model_alone_samples_per_s": frozen_rate(folder, work, dtype, best["client_chunk"]),
        }


def frozen_rate(folder: Path, work: Workload, dtype: Dtype, chunk: int) -> float:
    """Samples/s of the frozen blocks forward and backward to their input, without adapters, `chunk` batches at once."""
    from fedjax_lora.adapters import lora
    from fedjax_lora.core.methods import Context
    from fedjax_lora.core.types import Adapters
    from fedjax_lora.models.load import ModelConfig, build_model
    from fedjax_lora.tasks import classification

    context = Context(num_clients=1, cohort_size=1, num_classes=2)
    task = classification.make(classification.ClassificationOptions(), context)
    made = {"task": task, "adapter": lora.make(lora.LoraAdapterOptions(), context)}
    config = ModelConfig(pretrained=str(folder), compute_dtype=dtype)
    model, base = build_model(config, context._replace(made=made))
    assert base is not None
    batch, empty = chunk * work.batch, Adapters(modules={}, head={})
    ids = jax.random.randint(jax.random.key(0), (batch, work.length), 1000, 2000)
    inputs = {"input_ids": ids, "attention_mask": jnp.ones_like(ids)}
    hidden = jax.jit(lambda base: model.embed(base, inputs, None))(base)

    def total(values: jax.Array, base: Any) -> jax.Array:
        return jnp.sum(model.layers(base, empty, hidden._replace(values=values), None).values)

    return batch / timed(jax.jit(jax.grad(total)), hidden.values, base)


def trials(model: str, quick: bool) -> dict[str, Any]:
    """Trials of digits (keys and learning rates) in one program by `vmap` over the state, beside one at a time."""
    del model
    from fedjax_lora.config.assemble import build
    from fedjax_lora.config.experiment import load_config
    from fedjax_lora.config.presets import preset
    from fedjax_lora.sim.round import make_round

    count, rounds = (4, 1) if quick else (64, 5)
    simulation = build(load_config(None, ["pretrain.steps=5"] if quick else [], base=preset("digits")))
    step = make_round(simulation.make_parts)

    def run(world: Any, state: Any) -> Any:
        def body(state: Any, _: None) -> tuple[Any, jax.Array]:
            state, metrics = step(world, state)
            return state, metrics.train_loss

        return jax.lax.scan(body, state, None, rounds)

    states = [simulation.init(jax.random.key(seed)) for seed in range(count)]
    many = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    found: dict[str, Any] = {"trials": count, "rounds": rounds, "chunk": simulation.layout.chunk}
    for name, program, argument in (
        ("one", jax.jit(run), states[0]),
        ("all", jax.jit(jax.vmap(run, in_axes=(None, 0))), many),
    ):
        started = time.perf_counter()
        compiled = program.lower(simulation.world, argument).compile()
        found[f"{name}, compile_s"] = time.perf_counter() - started
        found[f"{name}, run_s"] = timed(compiled, simulation.world, argument, repeats=3)
    found["ratio"] = count * found["one, run_s"] / found["all, run_s"]
    return found


def clients(model: str, quick: bool) -> dict[str, Any]:
    """Rounds of the digits preset by number of clients: seconds of a round."""
    del model
    from fedjax_lora.config.assemble import build
    from fedjax_lora.config.experiment import load_config
    from fedjax_lora.config.presets import preset

    rows = []
    for count in (5,) if quick else (50, 200, 1000):
        overrides = [f"clients.count={count}", "engine.eval_every=5", "rounds=20"]
        if count > 500:  # more clients than the 1,100 examples could serve otherwise
            overrides.append("clients.partition.kind=iid")
        simulation = build(load_config(None, overrides, base=preset("digits")))
        state = simulation.init(jax.random.key(0))
        state, _ = simulation.run(state, 5)
        seconds = []
        for _ in range(3):
            started = time.perf_counter()
            state, _ = simulation.run(state, 5)
            seconds.append((time.perf_counter() - started) / 5)
        chunk, compile_s = simulation.layout.chunk, simulation.compile_s
        rows.append({"clients": count, "chunk": chunk, "compile_s": compile_s, "round_s": seconds})
    return {"rows": rows}


def sparsifiers(model: str, quick: bool) -> dict[str, Any]:
    """Every sparsifier over many clients' adapters: clients/s and GB/s (read once, written once)."""
    del model
    from fedjax_lora.config.catalogue import Catalogue
    from fedjax_lora.core.methods import Context
    from fedjax_lora.core.types import Adapters, Factors, Scope

    layers, width, rank, count = (2, 32, 4, 3) if quick else (12, 768, 8, 256)
    shapes = {"a": (layers, width, rank), "b": (layers, rank, width)}

    def adapters(key: jax.Array, *leading: int) -> Adapters:
        parts = {
            name: Factors(
                **{
                    part: jax.random.normal(jax.random.fold_in(key, 2 * i + j), (*leading, *shape))
                    for j, (part, shape) in enumerate(shapes.items())
                }
            )
            for i, name in enumerate(("query", "value"))
        }
        return Adapters(modules=parts, head={})

    start, trained = adapters(jax.random.key(0)), adapters(jax.random.key(1), count)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(trained))
    scope = Scope.whole(jnp.ones(rank))
    found: dict[str, Any] = {"clients": count, "layers": layers, "width": width, "rank": rank, "bytes": size}
    for name, listed in Catalogue.of().by_slot["sparsifier"].items():
        method = listed.make(listed.options(), Context(count, count, like=start))
        memory = jax.vmap(method.init)(trained)

        def compress(trained: Any, memory: Any, method: Any = method) -> Any:
            def one(own: Any, memory: Any, key: jax.Array) -> Any:
                message = method.encode(start, own, memory, jnp.float32(rank / 4), scope, key)
                return method.decode(start, message, scope)

            return jax.vmap(one)(trained, memory, jax.random.split(jax.random.key(2), count))

        try:
            seconds = timed(jax.jit(compress), trained, memory)
            found[name] = {"seconds": seconds, "clients_per_s": count / seconds, "GB/s": 2e-9 * size / seconds}
        except Exception as error:  # what a method does not do on this device is a result
            found[name] = {"error": str(error).splitlines()[0][:300]}
    return found


def kernels(model: str, quick: bool) -> dict[str, Any]:
    """The Pallas kernel of rank energies beside XLA's: GB/s (both factors read once), and the relative difference."""
    del model
    from fedjax_lora.ops.rank_energy import rank_energy

    found: dict[str, Any] = {}
    for leading, width, rank in ((4, 32, 8),) if quick else ((6144, 768, 8), (6144, 768, 16), (1024, 4096, 64)):
        x, x0 = jax.random.normal(jax.random.key(0), (2, leading, width, rank))
        row: dict[str, Any] = {}
        results = []
        for implementation in IMPLEMENTATIONS:
            program = jax.jit(functools.partial(rank_energy, axis=-2, implementation=implementation))
            try:
                row[f"{implementation}, GB/s"] = 2e-9 * x.nbytes / timed(program, x, x0)
                results.append(program(x, x0))
            except Exception as error:  # what a compiler refuses is a result
                row[f"{implementation}, error"] = str(error).splitlines()[0][:300]
        if len(results) == len(IMPLEMENTATIONS):
            apart = [jnp.max(jnp.abs(p - q)) / jnp.max(jnp.abs(p)) for p, q in zip(*results, strict=True)]
            row["largest relative difference"] = max(map(float, apart))
        found[f"{leading} x {width} x {rank}"] = row
    return found


def tsfa(model: str, quick: bool) -> dict[str, Any]:
    """The online controller's round by number of clients: seconds of a call."""
    del model
    from tsfa_solver import measure

    return {str(count): measure(count, 2, 0.2) for count in ((16,) if quick else (256, 1024, 4096))}


def peer(model: str, quick: bool) -> dict[str, Any]:
    """The loop of PyTorch + PEFT over clients on the same device, at MiniLM's shape; beside it, `minilm`."""
    import torch
    from peer import Peer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    found: dict[str, Any] = {"device": device, "torch": torch.__version__}
    shape = SMALL if quick else MINILM
    with checkpoint(model, shape) as folder:
        work = Workload(model=str(folder), clients=2 if quick else 16, length=16 if quick else 64)
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(1000, 2000, (work.samples, work.length), generator=generator).numpy()
        labels = torch.arange(work.samples).numpy() % 2
        rows = torch.arange(work.samples).reshape(work.clients, work.steps, work.batch).numpy()
        for dtype, frozen in PEERS:
            side = Peer(work, dtype, PeerSettings("sdpa", frozen, compile=False), device=device)
            side.start(_zero_adapters(shape), (ids, ids * 0 + 1), labels)
            side.round(rows)
            seconds = min(side.round(rows)[0] for _ in range(3))
            found[f"{dtype}, frozen in {frozen}, samples/s"] = work.samples / seconds
    return found


def _zero_adapters(shape: dict[str, int]) -> dict[str, np.ndarray]:
    """Global factors and head to start a peer from, by name as `Engine.adapters` has them."""
    layers, width = shape["num_hidden_layers"], shape["hidden_size"]
    a, b = np.ones((layers, width, RANK), np.float32), np.zeros((layers, RANK, width), np.float32)
    factors = {f"{name}/{part}": value for name in TARGETS for part, value in (("a", a), ("b", b))}
    return factors | {"head/w": np.zeros((width, 2), np.float32), "head/b": np.zeros(2, np.float32)}


@contextmanager
def checkpoint(tokenizer: str, shape: dict[str, int]) -> Iterator[Path]:
    """A BERT folder of random weights of that shape with the given tokenizer."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        random_model.save(folder, Path(tokenizer), shape)
        yield folder


def timed(program: Callable[..., Any], *arguments: Any, repeats: int = 10) -> float:
    """Median seconds of a call, after one that compiles and warms up."""
    jax.block_until_ready(program(*arguments))
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready(program(*arguments))
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)
