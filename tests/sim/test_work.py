"""FLOP and bytes of programs that can be counted by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from fedjax_lora.sim.cohort import device_mesh
from fedjax_lora.sim.work import work_of

A, B = jnp.ones((3, 5)), jnp.ones((5, 7))
ONE = (2 * 3 * 5 * 7, 4 * (15 + 35 + 21))
"""FLOP and bytes of A @ B."""


def test_a_product():
    assert work_of(jnp.matmul, A, B) == ONE


def test_a_batch_of_products():
    found = work_of(jax.vmap(jnp.matmul, (0, None)), jnp.ones((4, 3, 5)), B)
    assert found == (4 * ONE[0], 4 * (60 + 35 + 84))


def test_loops_count_as_often_as_they_are_passed():
    def steps(a, b):
        return lax.scan(lambda carry, _: (carry, lax.fori_loop(0, 3, lambda i, x: x + a @ b, a @ b)), a, length=4)[1]

    assert work_of(steps, A, B) == (4 * 4 * ONE[0], 4 * 4 * ONE[1])


def test_a_loop_of_unknown_length_counts_once():
    def loop(a, b, n):
        return lax.fori_loop(0, n, lambda i, x: x + a @ b, jnp.zeros((3, 7)))

    assert work_of(loop, A, B, jnp.int32(9)) == ONE


def test_the_larger_side_of_a_choice_counts():
    def choice(a, b):
        return lax.cond(a[0, 0] > 0, lambda: a @ b, lambda: 0 * a @ b + a @ b)

    assert work_of(jax.jit(choice), A, B) == (2 * ONE[0], 2 * ONE[1])


def test_each_device_counts():
    work = jax.shard_map(jnp.matmul, mesh=device_mesh(), in_specs=(P(), P()), out_specs=P(), check_vma=False)
    assert work_of(work, A, B) == (jax.device_count() * ONE[0], jax.device_count() * ONE[1])


@pytest.mark.parametrize("groups", [1, 2])
def test_a_convolution(groups):
    x, kernel = jnp.ones((2, 4, 6, 6)), jnp.ones((8, 4 // groups, 3, 3))
    found = work_of(lambda x, k: lax.conv_general_dilated(x, k, (1, 1), "VALID", feature_group_count=groups), x, kernel)
    assert found.flop == 2 * (2 * 8 * 4 * 4) * (4 // groups * 3 * 3)
