"""A model family: a perceptron of two layers for images, whose second layer may carry an adapter.

fedjax-lora run CONFIG --methods examples/methods/mlp.py --set model=mlp 'lora.targets=[second]'
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array

from fedjax_lora.methods import Adapters, Context, Features, Hidden, Method, Model, Options, Site


@dataclasses.dataclass(frozen=True, kw_only=True)
class MlpConfig(Options):
    """Shape of the perceptron.

    width: of both layers; a shape, so it is not traced.
    """

    name: Literal["mlp"] = "mlp"
    width: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width < 1:
            raise ValueError(f"width must be at least 1, got {self.width}")


def make(options: MlpConfig, context: Context) -> Model:
    """The model of `image: [B, height, width, channels]`; its parts can be cut apart.

    Raises:
      ValueError: the data are no images.
    """
    if context.image_shape is None:
        raise ValueError("model.name must be of a model of text for text, got 'mlp'")
    task, adapter, d = context.made["task"], context.made["adapter"], options.width
    height, width, channels = context.image_shape
    sites = {"second": Site("second", 0, d, d)}  # columns 0 ... d of base["layers"]["second"]["w"], [L, d, d]

    def init(key: Array) -> dict:
        first_key, second_key = jax.random.split(key)
        pixels = height * width * channels
        return {
            "first": {"w": jax.random.normal(first_key, (pixels, d)) * pixels**-0.5, "b": jnp.zeros(d)},
            "layers": {"second": {"w": jax.random.normal(second_key, (1, d, d)) * d**-0.5, "b": jnp.zeros((1, d))}},
        }

    def embed(base: Any, batch: Mapping[str, Array], key: Array | None) -> Hidden:
        pixels = batch["image"].reshape(batch["image"].shape[0], -1)
        values = jax.nn.relu(pixels @ base["first"]["w"] + base["first"]["b"])
        return Hidden(values[:, None], jnp.ones((values.shape[0], 1)))  # one position for each image

    def layers(base: Any, adapters: Adapters, hidden: Hidden, key: Array | None) -> Hidden:
        weights, modules = jax.tree.map(lambda leaf: leaf[0], (base["layers"]["second"], adapters.modules))
        own = {name: (sites[name].first, leaves) for name, leaves in modules.items()}  # none where none is a target
        return hidden._replace(values=jax.nn.relu(adapter.project(hidden.values, weights["w"], own) + weights["b"]))

    def outputs(base: Any, adapters: Adapters, hidden: Hidden, key: Array | None) -> Array:
        return task.read(adapters.head, Features(hidden, lambda: hidden.values[:, 0]))

    return Model(
        init=init,
        init_head=lambda key: task.head(key, d, True),
        embed=embed,
        layers=layers,
        task=outputs,
        sites=sites,
        num_layers=1,
    )


METHOD = Method("model", "mlp", MlpConfig, make)
