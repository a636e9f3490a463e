"""How many clients at once, and the bytes that decide about it."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_lora.adapters import lora
from fedjax_lora.aggregation import fedit
from fedjax_lora.core.learning import Hidden, Model, Site
from fedjax_lora.core.types import Adapters, Dataset, Factors
from fedjax_lora.sim import chunk
from fedjax_lora.sim.cohort import device_mesh
from fedjax_lora.sim.parts import World
from fedjax_lora.sparsifiers import dense
from fedjax_lora.tasks import classification
from oracles.contexts import context

WIDTH, CLASSES = 5, 3
LIKE = Adapters(
    modules={"inner": Factors(a=jnp.ones((1, WIDTH, 2)), b=jnp.ones((1, 2, WIDTH)))},
    head={"w": jnp.ones((WIDTH, CLASSES))},
)


def perceptron(depth: int) -> Model:
    """`depth` sines after one matrix with an adapter, and a linear head."""

    def run(base, adapters, hidden, key):
        inner = adapters.modules["inner"]
        values = hidden.values @ base["w"] + (hidden.values @ inner.a[0]) @ inner.b[0]
        for _ in range(depth):
            values = jnp.sin(values)
        return hidden._replace(values=values)

    return Model(
        init=lambda key: {"w": jnp.eye(WIDTH)},
        init_head=lambda key: LIKE.head,
        embed=lambda base, batch, key: Hidden(batch["x"][:, None], jnp.ones((batch["x"].shape[0], 1))),
        layers=run,
        task=lambda base, adapters, hidden, key: hidden.values[:, 0] @ adapters.head["w"],
        sites={"inner": Site("inner", 0, WIDTH, WIDTH)},
        num_layers=1,
    )


def activation_bytes(depth: int, batch_size: int) -> int:
    pool = {"x": jnp.ones((7, WIDTH)), "label": jnp.zeros(7, jnp.int32)}
    data = Dataset(train=pool, index=jnp.zeros((1, 7), jnp.int32), count=jnp.full(1, 7), test=pool)
    model, made = perceptron(depth), context(like=LIKE, num_classes=CLASSES)

    def make_parts(numbers):
        return SimpleNamespace(
            model=model,
            adapter=lora.make(lora.LoraAdapterOptions(), made),
            task=classification.make(classification.ClassificationOptions(), made),
            sparsifier=dense.make(dense.DenseConfig(), made),
            aggregator=fedit.make(fedit.FedItConfig(), made),
            rank=numbers["rank"],
            scale=jnp.float32(2.0),
        )

    world = World(base=model.init(jax.random.key(0)), data=data)
    return chunk.activation_bytes(make_parts, {"rank": jnp.float32(2.0)}, world, LIKE, batch_size)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_each_sine_keeps_its_cosine_by_hand(batch_size):
    """Closed form: what a sine needs backwards is one float32 for each of its values."""
    found = [activation_bytes(depth, batch_size) for depth in (1, 2, 5)]
    one = 4 * batch_size * WIDTH
    assert [found[1] - found[0], found[2] - found[0]] == [one, 4 * one]


def test_activations_grow_in_proportion_to_the_batch():
    """Closed form: what is kept whatever the batch (weights, adapters) does not count."""
    assert activation_bytes(2, 12) == 3 * activation_bytes(2, 4) > 0


@pytest.mark.parametrize(
    ("cohort", "megabytes", "budget", "expected"),
    [
        (32, 80, 32, 1),
        (32, 8, 32, 4),
        (10, 4, 32, 5),
        (64, 100, 8192, 64),
        (64, 400, 8192, 16),
        (7, 10, 32, 1),
        (61, 1, 60, 32),
    ],
)
def test_chunk_is_the_largest_that_fits_and_hardly_pads_by_hand(cohort, megabytes, budget, expected):
    assert chunk.choose_chunk(cohort, megabytes * 2**20, budget * 2**20) == expected


class Accelerator:
    platform = "gpu"

    def memory_stats(self):
        return {"bytes_limit": 2**34}


def test_the_budget_is_a_share_of_an_accelerators_memory_by_hand(monkeypatch):
    assert chunk.activation_budget_bytes(device_mesh()) == chunk.CPU_CACHE_BYTES
    here, elsewhere = Accelerator(), Accelerator()
    monkeypatch.setattr(jax, "local_devices", lambda: [here])
    for device, expected in ((here, 2**33), (elsewhere, chunk.UNTOLD_BYTES // 2)):
        assert chunk.activation_budget_bytes(SimpleNamespace(devices=np.array([device]), size=1)) == expected
