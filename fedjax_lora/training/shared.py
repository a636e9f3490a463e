"""One copy of the server's adapters for all devices, which their steps change in turn.

After Z. Lin, X. Hu, Y. Zhang, Z. Chen, Z. Fang, X. Chen, A. Li, P. Vepakomma, Y. Gao, "SplitLoRA: A Split Parameter-
Efficient Fine-Tuning Framework for Large Language Models", arXiv 2407.00952. What is at a device is its own until it is
averaged. That the one copy has one state of the optimizer, and the rate of the step's number, is our choice.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from fedjax_lora.core import trees
from fedjax_lora.core.learning import Broadcast, Client, Trained
from fedjax_lora.core.sides import Side
from fedjax_lora.core.types import Adapters
from fedjax_lora.training.local import Steps


def together(steps: Steps, side: Side, in_turn: bool) -> Callable[[Broadcast, Client, Array], Trained]:
    """`Trainer.together` of devices that change one server copy.

    Args:
      steps: of one device.
      side: what is at the devices.
      in_turn: whether a device takes all its steps before the next one begins; else each takes one, around and around.
    """

    def train(given: Broadcast, clients: Client, here: Array) -> Trained:
        courses, rate = jax.vmap(steps.begin, (None, 0))(given, clients), steps.rates(given.round)
        devices, local_steps = jnp.arange(here.shape[0]), jnp.arange(rate.shape[0])
        pairs = jnp.meshgrid(devices, local_steps, indexing="ij" if in_turn else "xy")

        def step(carry: tuple[Any, Any], pair: tuple[Array, Array]):
            (server, server_state), owns = carry
            device, number = pair
            course, (own, own_state) = trees.take((courses, owns), device)
            adapters = side.put(side.take(own), server)
            gradient, data_loss = steps.gradient(given, course, adapters, number)
            new_server = steps.update(course, gradient, server_state, adapters, rate[number])
            new_own = steps.update(course, gradient, own_state, adapters, rate[number])
            taken = here[device] & trees.fits_float32(new_server[0])  # who diverged takes nobody else along
            server = trees.where(taken, new_server, (server, server_state))
            return (server, jax.tree.map(lambda all_, x: all_.at[device].set(x), owns, new_own)), data_loss

        start: Adapters = given.adapters
        first = start, steps.init(start)
        owns = jax.tree.map(lambda x: jnp.broadcast_to(x, (devices.size, *jnp.shape(x))), first)
        in_order = pairs[0].ravel(), pairs[1].ravel()
        ((server, _), (owns, _)), losses = lax.scan(step, (first, owns), in_order)
        losses = losses.reshape(pairs[0].shape)
        ended = jax.vmap(lambda own: side.put(side.take(own), server))(owns)
        return jax.vmap(steps.end, (None, 0, 0, 0))(given, courses, ended, losses if in_turn else losses.T)

    return train
