import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_lora.core.keys import client_keys
from fedjax_lora.sim.cohort import MAX_CPU_DEVICES, choose, device_mesh, map_over_devices, padded_size


def uniform(key, num_clients):
    return jax.vmap(jax.random.uniform)(client_keys(key, jnp.arange(num_clients)))


def test_full_participation_is_every_client_once_then_padding():
    ids, present = choose(None, 5, 5, 8)
    assert ids.tolist() == [0, 1, 2, 3, 4, 5, 5, 5]
    assert present.tolist() == [True] * 5 + [False] * 3


def test_a_sample_is_without_replacement_and_uniform_against_the_binomial():
    draws = jax.vmap(lambda key: choose(uniform(key, 12), 12, 3, 3)[0])(jax.random.split(jax.random.key(1), 4000))
    assert (np.diff(draws, axis=1) > 0).all()
    count = np.bincount(np.ravel(draws), minlength=12)
    # Each client is in with probability 1/4: 1000 times, with deviation 27.
    assert abs(count - 1000).max() < 4.5 * np.sqrt(4000 * 0.25 * 0.75)


def test_the_highest_priorities_take_part_and_none_of_minus_infinity():
    """By hand."""
    ids, present = choose(jnp.array([0.3, -jnp.inf, 2.0, -1.0, -jnp.inf]), 5, 2, 3)
    assert (ids.tolist(), present.tolist()) == ([0, 2, 5], [True, True, False])
    ids, present = choose(jnp.array([0.3, -jnp.inf, 2.0, -jnp.inf, -jnp.inf]), 5, 3, 4)
    assert (ids.tolist(), present.tolist()) == ([0, 2, 5, 5], [True, True, False, False])


def test_padding_of_the_sample_does_not_change_it():
    priority = uniform(jax.random.key(2), 9)
    short, _ = choose(priority, 9, 4, 4)
    long, present = choose(priority, 9, 4, 6)
    assert long[:4].tolist() == short.tolist()
    assert present.tolist() == [True] * 4 + [False] * 2


@pytest.mark.parametrize(("cohort", "chunk", "devices", "size"), [(10, 1, 1, 10), (10, 4, 1, 12), (10, 3, 2, 12)])
def test_padded_size_is_the_next_multiple_by_hand(cohort, chunk, devices, size):
    assert padded_size(cohort, chunk, devices) == size


@pytest.mark.parametrize("chosen", [{}, {"JAX_NUM_CPU_DEVICES": "3"}])
def test_every_core_is_a_device_unless_the_environment_says_otherwise(chosen):
    """Oracle: the cores that the operating system gives this process."""
    script = "import fedjax_lora, jax; fedjax_lora.use_cpu_cores(); print(jax.device_count())"
    environment = {name: value for name, value in os.environ.items() if name != "JAX_NUM_CPU_DEVICES"} | chosen
    found = subprocess.run([sys.executable, "-c", script], env=environment, check=True, capture_output=True, text=True)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    assert int(found.stdout) == (3 if chosen else min(cores, MAX_CPU_DEVICES))


@pytest.mark.parametrize("chunk", [1, 2, 6])
def test_mapping_over_clients_equals_a_python_loop(chunk):
    w, clients = jnp.arange(12.0).reshape(3, 4), jnp.arange(18.0).reshape(6, 3)
    mapped = map_over_devices(lambda w, x: jnp.sin(x) @ w, w, clients, chunk, device_mesh())
    loop = np.stack([np.sin(np.asarray(x)) @ np.asarray(w) for x in clients])
    np.testing.assert_allclose(mapped, loop, rtol=2e-5)
