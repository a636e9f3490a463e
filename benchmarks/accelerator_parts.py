"""The parts of `accelerator.py`: each is `(folder with a tokenizer, quick) -> what goes into the JSON`."""

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
from common import RANK, TARGETS, Dtype, PeerSettings, Workload, in_turns

ROBERTA_BASE, MINILM = random_model.SHAPES["roberta-base"], random_model.SHAPES["minilm"]
Chunk = int | Literal["auto"]
LOW = {"activation_dtype": "bfloat16"}
SETTINGS: tuple[tuple[Chunk, dict[str, Any]], ...] = (
    ("auto", {}),
    ("auto", LOW),
    ("auto", {**LOW, "unroll": True}),
    (32, LOW),
)
"""Clients trained at once, and options of a model in bfloat16."""
PEERS: tuple[tuple[Dtype, Dtype], ...] = (("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float32", "float32"))
"""Dtype of the products and of the frozen matrices."""
ROW_S = 0.05
"""Seconds that a row of calls takes, about."""
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
    return _rounds(model, SMALL if quick else MINILM, "bfloat16", SETTINGS, quick)


def minilm_float32(model: str, quick: bool) -> dict[str, Any]:
    """The same in float32 as the device multiplies it by default."""
    return _rounds(model, SMALL if quick else MINILM, "float32", (("auto", {}),), quick)


def roberta_base(model: str, quick: bool) -> dict[str, Any]:
    """Rounds of 256 clients of RoBERTa-base's shape, and the frozen model alone on as many samples."""
    return _rounds(model, SMALL if quick else ROBERTA_BASE, "bfloat16", SETTINGS, quick)


def _rounds(
    model: str, shape: dict[str, int], dtype: Dtype, settings: tuple[tuple[Chunk, dict[str, Any]], ...], quick: bool
) -> dict[str, Any]:
    """By clients trained at once and options of the model; the frozen model alone as the best of them has it."""
    from engine import Engine

    with checkpoint(model, shape) as folder:
        work = Workload(model=str(folder), clients=4 if quick else 256, length=16 if quick else 64)
        work.write(folder)
        rows = []
        for chunk, options in settings:
            engine = Engine(work, folder, dtype, chunk, wireless=False, **options)
            engine.round()
            seconds = [engine.round()[0] for _ in range(5)]
            rate = work.samples / statistics.median(seconds)
            row = engine.describe() | {"asked": chunk, "options": options, "round_s": seconds, "samples_per_s": rate}
            row["tflops"] = rate * work.flop([work.length]) / 1e12
            row["peak_memory_bytes_so_far"] = engine.peak_memory_bytes()
            rows.append(row)
            del engine
            gc.collect()
        best = max(rows, key=lambda row: row["samples_per_s"])
        frozen = frozen_rate(folder, work, {"compute_dtype": dtype, **best["options"]}, best["client_chunk"])
        return {
            "workload": {**vars(work), "model": shape, "gflop_per_sample": work.flop([work.length]) / 1e9},
            "dtype": dtype,
            "rows": rows,
            "best_chunk": best["client_chunk"],
            "best_options": best["options"],
            "tflops": best["tflops"],
            "frozen_model_alone_samples_per_s": frozen,
            "over_the_frozen_model_alone": frozen / best["samples_per_s"] - 1.0,
        }


def frozen_rate(folder: Path, work: Workload, options: dict[str, Any], chunk: int) -> float:
    """Samples/s of the frozen blocks forward and backward to their input, without adapters, `chunk` batches at once.

    options: of the model.
    """
    from fedjax_lora.adapters import lora
    from fedjax_lora.core.methods import Context
    from fedjax_lora.core.types import Adapters
    from fedjax_lora.models.load import ModelConfig, build_model
    from fedjax_lora.tasks import classification

    context = Context(num_clients=1, cohort_size=1, num_classes=2)
    task = classification.make(classification.ClassificationOptions(), context)
    made = {"task": task, "adapter": lora.make(lora.LoraAdapterOptions(), context)}
    config = ModelConfig(pretrained=str(folder), **options)
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
    """Trials of digits that differ in their seeds: all at once in one program, beside one at a time."""
    del model
    import sweep_throughput

    count, rounds = (4, 1) if quick else (64, 3)
    overrides = [f"rounds={rounds}", f"engine.eval_every={rounds}", *(["pretrain.steps=5"] if quick else [])]
    of = sweep_throughput.group(overrides, count)
    found: dict[str, Any] = {"trials": count, "rounds": rounds}
    for name, at_once in (("one", 1), ("all", count)):
        program = sweep_throughput.training(of, at_once, rounds)
        seconds = in_turns({name: program.run}, 3, 0.0)[name]
        found |= {f"{name}, compile_s": program.compile_s, f"{name}, run_s": statistics.median(seconds)}
    return found | {"ratio": count * found["one, run_s"] / found["all, run_s"]}


def clients(model: str, quick: bool) -> dict[str, Any]:
    """Rounds of the digits preset by number of clients: seconds of a round."""
    del model
    rows = []
    for count in (5,) if quick else (50, 1000):
        more = ["clients.partition.kind=iid"] if count > 500 else []  # more than the examples could serve otherwise
        rows.append({"clients": count, **_digits_rounds("digits", [f"clients.count={count}", *more])})
    return {"rows": rows}


def split(model: str, quick: bool) -> dict[str, Any]:
    """Rounds of digits, whole at the clients and split between them and the server: seconds of a round."""
    del model
    rows = {}
    for name in ("digits", "digits-split", "digits-splitfrozen"):
        overrides = ["pretrain.steps=5", "clients.count=4"] if quick else []
        rows[name] = _digits_rounds(name, overrides)
    return {"rows": rows}


def _digits_rounds(name: str, overrides: list[str]) -> dict[str, Any]:
    from fedjax_lora.config.assemble import build
    from fedjax_lora.config.experiment import load_config
    from fedjax_lora.config.presets import preset

    simulation = build(load_config(None, ["engine.eval_every=5", "rounds=20", *overrides], base=preset(name)))
    state, _ = simulation.run(simulation.init(jax.random.key(0)), 5)
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        state, _ = simulation.run(state, 5)
        seconds.append((time.perf_counter() - started) / 5)
    return {"chunk": simulation.layout.chunk, "compile_s": simulation.compile_s, "round_s": seconds}


def sparsifiers(model: str, quick: bool) -> dict[str, Any]:
    """Every sparsifier's messages of half of the components: clients/s, and GB/s of the least bytes it could take."""
    del model
    import sparsifier_programs as programs
    from sparsifier_torch import Size, draw

    from fedjax_lora.config.catalogue import Catalogue

    size = Size(4, 4, 32) if quick else Size(4096, 16, 768)
    held, found = programs.cohort(draw(size)), {}
    for name, method in Catalogue.of().by_slot["sparsifier"].items():
        try:
            program = programs.message(programs.made(method, held.start, size.clients), held, size.rank // 2)
            seconds = timed(program.begin)
            sent_bytes = float(jnp.sum(program.call()[-1])) / 8
        except Exception as error:  # what a method does not do on this device is a result
            found[name] = {"error": str(error).splitlines()[0][:300]}
            continue
        floor = size.clients * size.factor_bytes + size.factor_bytes + sent_bytes
        rates = {"clients_per_s": size.clients / seconds, "gb_per_s": floor * 1e-9 / seconds}
        found[name] = {"compile_s": program.compile_s, "call_s": seconds, **rates}
    return {**size._asdict(), "methods": found}


def tsfa(model: str, quick: bool) -> dict[str, Any]:
    """The online controller's round by number of clients: seconds of a call."""
    del model
    from solver_tsfa import measure

    return {str(count): measure(count, 2, 0.2) for count in ((16,) if quick else (256, 4096))}


def peer(model: str, quick: bool) -> dict[str, Any]:
    """The loop of PyTorch + PEFT over clients on the same device, at MiniLM's shape; beside it, `minilm`."""
    import torch
    from peer import Peer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    found: dict[str, Any] = {"device": device, "torch": torch.__version__}
    if jax.devices()[0].platform != device.replace("cuda", "gpu"):
        return found | {"left_out": f"PyTorch must have the accelerator {jax.devices()[0].platform}, got {device}"}
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


def timed(program: Callable[..., Any], *arguments: Any) -> float:
    """Seconds of a call among calls that follow one another: the median of five rows of them, after one to warm up.

    A row is waited for once, so that the time to dispatch a call, and to hear that it is done, is hidden or shared.
    """

    def row(calls: int) -> float:
        started = time.perf_counter()
        for _ in range(calls - 1):
            program(*arguments)
        jax.block_until_ready(program(*arguments))
        return (time.perf_counter() - started) / calls

    row(1)
    calls = min(max(int(ROW_S / row(1)), 1), 100)
    return statistics.median(row(calls) for _ in range(5))
