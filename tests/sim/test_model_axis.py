"""The frozen base over the mesh axis `model`: which of its axes are split, and that a run on it is the same run."""

import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from fedjax_lora.core.mapping import Mapped
from fedjax_lora.models import bert, table
from fedjax_lora.sim.cohort import CLIENTS, MODEL, TRIALS, mesh_shape
from fedjax_lora.sim.options import EngineConfig
from fedjax_lora.sim.parts import Layout
from fedjax_lora.sim.placement import base_bytes, base_shardings
from oracles.processes import ROOT, started
from oracles.toy_bert import WORDS, save_bert

SHAPE = {"num_hidden_layers": 2, "hidden_size": 24, "num_attention_heads": 3, "intermediate_size": 40}


def layout(model, axes=None):
    mesh: Any = AbstractMesh((1, 2, model), (TRIALS, CLIENTS, MODEL))
    return Layout(cohort_size=4, chunk=1, mesh=mesh, everyone=True, one_rank=True, axes=Mapped(axes or {}))


def shapes(**leaves):
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in leaves.items()}


def test_a_matrix_is_split_by_its_logical_axes_and_a_vector_is_whole_by_hand():
    """10 words: two devices divide them, four do not and take the width."""
    config = bert.shape(SHAPE | {"vocab_size": 10})
    rows = bert.weights(config)
    like = table.shapes(rows, config.num_layers, "float32")
    for devices, words in ((2, P(MODEL)), (4, P(None, MODEL))):
        found = base_shardings(like, layout(devices, table.axes(rows)))
        layers = {name: group["w"].spec for name, group in found["layers"].items() if "w" in group}
        assert layers == {
            "query_key_value": P(None, None, MODEL),
            "output": P(None, MODEL),
            "up": P(None, None, MODEL),
            "down": P(None, MODEL),
        }
        assert found["embeddings"]["word"].spec == words
        assert found["layers"]["up"]["b"].spec == found["layers"]["norm_mlp"]["scale"].spec == P()


def test_without_logical_axes_the_longer_axis_that_devices_divide_is_split_by_hand():
    like = {
        **shapes(wide=(3, 8), tall=(8, 4), odd=(9, 6), none=(9, 5), vector=(8,)),
        "layers": shapes(w=(4, 6, 5), b=(4, 8)),
    }
    found = jax.tree.map(lambda sharding: sharding.spec, base_shardings(like, layout(2)))
    assert found == {
        "wide": P(None, MODEL),
        "tall": P(MODEL),
        "odd": P(None, MODEL),
        "none": P(),
        "vector": P(),
        "layers": {"w": P(None, MODEL), "b": P()},
    }
    assert base_bytes(like, layout(2)) == 4 * (3 * 4 + 4 * 4 + 9 * 3 + 9 * 5 + 8 + 4 * 3 * 5 + 4 * 8)
    assert all(sharding.spec == P() for sharding in jax.tree.leaves(base_shardings(like, layout(1))))


def test_a_number_of_devices_that_cannot_be_is_refused_in_one_line():
    with pytest.raises(ValueError, match="model_devices must be at least 1, got 0"):
        EngineConfig(model_devices=0)
    with pytest.raises(ValueError, match="model_devices must be 1 where reproducible is true, got 2"):
        EngineConfig(client_chunk=1, reproducible=True, model_devices=2)
    with pytest.raises(ValueError, match=r"engine\.model_devices must divide the number of devices, 8, got 3"):
        mesh_shape(8, model=3)
    assert mesh_shape(8, trials=6, model=2) == (2, 2, 2)


MAPPED = """
import json, jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
from fedjax_lora.sim.cohort import MODEL, TRIALS, device_mesh, map_over_devices

mesh = device_mesh(2, model=MODEL_DEVICES)
up, down = (0.3 * jnp.sin(jnp.arange(3.0 * 8 * 20)).reshape(3, *shape) for shape in ((8, 20), (20, 8)))
shards = [NamedSharding(mesh, P(None, None, MODEL)), NamedSharding(mesh, P(None, MODEL))]
base = [jax.device_put(w, shard) for w, shard in zip((up, down), shards)]

def layer(x, w):
    return x + jnp.tanh(x @ w[0]) @ w[1], None

def loss(x, base):
    return jnp.sum(jnp.cos(jax.lax.scan(jax.checkpoint(layer), x, base)[0]))

def gradient(base, x):
    return jax.grad(loss)(x, base)

def trial(base, x):
    return map_over_devices(gradient, base, x, 2, mesh, of_model=True)

x = jnp.cos(jnp.arange(2 * 4 * 5 * 8.0)).reshape(2, 4, 5, 8)
compiled = jax.jit(jax.vmap(trial, (None, 0), spmd_axis_name=TRIALS)).lower(base, x).compile()
print(json.dumps([compiled(base, x).tolist(), compiled.as_text(), base[0].addressable_shards[0].data.size]))
"""


def test_a_scan_over_split_layers_is_the_same_and_no_weights_are_gathered():
    """Oracles: one device, and the compiled program, which exchanges sums of activations and no array of weights.

    Trials of clients, whose gradients go through a loop over layers that is computed again.
    """
    command = [sys.executable, "-c"]
    cases = [
        ([*command, MAPPED.replace("MODEL_DEVICES", str(model))], {"JAX_NUM_CPU_DEVICES": str(devices)})
        for devices, model in ((1, 1), (8, 2))
    ]
    (alone, _, whole), (split, text, part) = map(json.loads, started(cases))
    np.testing.assert_allclose(split, alone, rtol=1e-5, atol=1e-5)
    assert part == whole / 2
    assert " all-reduce(" in text and " all-gather(" not in text


DIGITS = [
    "rounds=2",
    "pretrain.steps=2",
    "clients={count: 8, partition: {alpha: 1.0}}",
    "lora={max_rank: 4, rank: 3, targets: [query, up]}",
    "local={steps: 1, batch_size: 4}",
    "engine={eval_every: 2, client_chunk: 1}",
]
TEXT = [
    "rounds=2",
    "data={source: tsv, max_length: 24}",
    "clients.count=4",
    "local={steps: 2, batch_size: 4, optimizer: {name: sgd, learning_rate: 0.5}}",
    "lora={max_rank: 2, rank: 2, targets: [query]}",
    "sparsifier=dense",
    "engine={eval_every: 2, eval_batch_size: 5, client_chunk: 1}",
]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A small BERT, and sentences of 1 to 20 words: on one device batches are packed."""
    folder, random = tmp_path_factory.mktemp("text"), np.random.default_rng(0)
    for name, count in (("train", 60), ("test", 13)):
        lengths = np.minimum(random.geometric(0.2, count), 20)
        lines = (f"{' '.join(random.choice(WORDS, length))}\t{random.integers(2)}\n" for length in lengths)
        (folder / f"{name}.tsv").write_text("".join(lines))
    (folder / "bert").mkdir()
    data = [f"data.{name}={folder / name}.tsv" for name in ("train", "test")]
    return [*TEXT, *data, f"model.pretrained={save_bert(folder / 'bert', SHAPE)}"]


def runs(settings, *model_devices):
    """What a run tells on one device, and on eight of which so many hold one base."""
    command = [sys.executable, str(ROOT / "tests/oracles/run_here.py"), *settings]
    several = [([*command, f"engine.model_devices={n}"], {"JAX_NUM_CPU_DEVICES": "8"}) for n in model_devices]
    return list(map(json.loads, started([(command, {}), *several])))


def check_same(one, other, model_devices):
    """Losses to 1e-4, relative, and matrices of the layers in equal shares."""
    for name in ("train_loss", "eval_loss"):
        np.testing.assert_allclose(other[name], one[name], rtol=1e-4)
    shares = {path: share for path, share in other["held"].items() if path.endswith("/w") and "layers" in path}
    assert len(shares) == 4 and set(shares.values()) == {1 / model_devices}
    assert other["argument_bytes"] < one["argument_bytes"]


def test_a_run_on_split_weights_equals_one_device(text):
    one, four = runs(text, 4)
    check_same(one, four, 4)


def test_a_run_on_digits_equals_one_device_and_its_mean_is_a_sum_over_devices():
    """The compiled program: of the clients' factors none of all clients is gathered, and their changes are summed."""
    one, whole, two = runs(DIGITS, 1, 2)
    check_same(one, two, 2)
    np.testing.assert_allclose(whole["train_loss"], one["train_loss"], rtol=1e-5)
    clients, rank, narrowest = 8, 4, 64
    assert max(whole["gathered"]) < clients * rank * narrowest
    assert whole["summed"].count(rank * narrowest) >= 3  # a and b of `query`, a of `up`, a layer at a time
