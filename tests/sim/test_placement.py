import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from fedjax_lora.core.types import Adapters, ClientState, FedState
from fedjax_lora.sim.cohort import CLIENTS, MODEL, TRIALS, device_mesh, map_in_order
from fedjax_lora.sim.options import EngineConfig
from fedjax_lora.sim.parts import Layout
from fedjax_lora.sim.placement import state_shardings


def layout(trials, clients, in_order=False):
    mesh = AbstractMesh((trials, clients, 1), (TRIALS, CLIENTS, MODEL))
    return Layout(cohort_size=4, chunk=1, mesh=mesh, everyone=True, one_rank=True, in_order=in_order)


def state(lead, clients):
    """Shapes of a state of so many clients, each leaf behind the axes `lead`."""

    def leaf(*shape):
        return jax.ShapeDtypeStruct((*lead, *shape), jnp.float32)

    return FedState(
        key=leaf(2),
        round=leaf(),
        numbers={"V": leaf()},
        adapters=Adapters(modules={}, head={"w": leaf(clients, 3)}),  # as long as there are clients, and of none
        merged={},
        elapsed_s=leaf(),
        methods={"wireless": {"gain": leaf(clients)}, "control": leaf(clients)},
        clients=ClientState(rank=leaf(clients), personal={"b": leaf(clients, 5)}, methods={}),
    )


def specs(shardings):
    of_clients = shardings.clients.rank, shardings.clients.personal["b"], shardings.methods["wireless"]["gain"]
    (each,) = {sharding.spec for sharding in of_clients}
    (rest,) = {leaf.spec for leaf in (shardings.round, shardings.adapters.head["w"], shardings.methods["control"])}
    return each, rest


def test_what_is_of_each_client_is_split_where_devices_divide_the_clients_by_hand():
    assert specs(state_shardings(state((), 8), layout(1, 4))) == (P(CLIENTS), P())
    assert specs(state_shardings(state((), 6), layout(1, 4))) == (P(None), P())
    lanes = state_shardings(state((2,), 8), layout(2, 4), lanes=True)
    assert specs(lanes) == (P(TRIALS, CLIENTS), P(TRIALS))


def test_every_device_holds_all_clients_where_they_are_worked_on_in_order():
    assert specs(state_shardings(state((), 8), layout(1, 4, in_order=True))) == (P(), P())


def test_a_cohort_in_order_is_padded_to_chunks_whatever_the_devices_by_hand():
    sizes = {devices: layout(1, devices, in_order=True)._replace(cohort_size=5, chunk=2) for devices in (1, 4)}
    assert [own.padded_cohort for own in sizes.values()] == [6, 6]
    assert layout(1, 4)._replace(cohort_size=5, chunk=2).padded_cohort == 8


@pytest.mark.parametrize("chunk", [1, 2, 6])
def test_mapping_in_order_equals_a_python_loop(chunk):
    w, clients = jnp.arange(12.0).reshape(3, 4), jnp.arange(18.0).reshape(6, 3)
    mapped = jax.jit(lambda w, x: map_in_order(lambda w, x: jnp.sin(x) @ w, w, x, chunk, device_mesh()))(w, clients)
    loop = np.stack([np.sin(np.asarray(x)) @ np.asarray(w) for x in clients])
    np.testing.assert_allclose(mapped, loop, rtol=2e-5)


def test_a_loop_over_one_block_stays_a_loop():
    """Oracle: the compiled program. What XLA takes out of a loop it may fuse with what is around it."""
    args = jnp.ones((3, 4)), jnp.ones((2, 3))
    mapped = jax.jit(lambda w, x: map_in_order(lambda w, x: jnp.sin(x) @ w, w, x, 2, device_mesh()))
    assert " while(" in mapped.lower(*args).compile().as_text()


def test_reproducible_needs_a_chunk_that_no_device_chooses():
    with pytest.raises(ValueError, match="client_chunk must be a number where reproducible is true, got 'auto'"):
        EngineConfig(reproducible=True)
    assert dataclasses.replace(EngineConfig(client_chunk=2), reproducible=True).client_chunk == 2
