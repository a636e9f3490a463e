from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedjax_lora.training.optimizers import METHODS, OptimizerConfig, depends_on_rounds, direction, schedule
from oracles.contexts import context

SERVERS = {method.name: method for method in METHODS}

OPTAX = {
    "sgd": lambda rate: optax.sgd(rate),
    "momentum": lambda rate: optax.sgd(rate, momentum=0.8),
    "adamw": lambda rate: optax.adamw(rate, weight_decay=0.1),
}


@pytest.mark.parametrize("name", OPTAX)
@pytest.mark.parametrize("clip_norm", [None, 0.5])
def test_direction_times_rate_equals_optax_own_optimizer(name, clip_norm):
    weight_decay = 0.1 if name == "adamw" else 0.0
    momentum = 0.8 if name == "momentum" else None
    config = OptimizerConfig(name=name, momentum=momentum, weight_decay=weight_decay, clip_norm=clip_norm)
    ours = direction(config)
    clip = optax.identity() if clip_norm is None else optax.clip_by_global_norm(clip_norm)
    oracle = optax.chain(clip, OPTAX[name](0.02))
    params = {"x": jnp.array([1.0, -2.0, 3.0])}
    expected, our_state, oracle_state = params, ours.init(params), oracle.init(params)
    for step in range(3):
        gradient = {"x": jnp.sin(params["x"] + step)}
        updates, our_state = ours.update(gradient, our_state, params)
        params = jax.tree.map(lambda x, u: x - 0.02 * u, params, updates)
        oracle_gradient = {"x": jnp.sin(expected["x"] + step)}
        updates, oracle_state = oracle.update(oracle_gradient, oracle_state, expected)
        expected = optax.apply_updates(expected, updates)
    np.testing.assert_allclose(params["x"], expected["x"], rtol=1e-6)


def test_momentum_of_null_is_that_of_a_tenth_forgotten():
    """Closed form: the second direction of a constant gradient."""
    ours, x = direction(OptimizerConfig(name="momentum")), jnp.ones(3)
    updates, state = ours.update(x, ours.init(x), x)
    np.testing.assert_allclose(ours.update(x, state, x)[0], 1.9 * updates, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "closed_form"),
    [
        ("constant", lambda t: 1.0),
        ("linear", lambda t: 1 - t),
        ("cosine", lambda t: (1 + np.cos(np.pi * t)) / 2),
    ],
)
def test_schedule_against_closed_form_after_a_linear_rise(name, closed_form):
    factors = schedule(OptimizerConfig(schedule=name, warmup_steps=4), 20, jnp.arange(20))
    np.testing.assert_allclose(factors[:4], [0.25, 0.5, 0.75, 1.0], rtol=1e-6)
    np.testing.assert_allclose(factors[4:], [closed_form((step - 4) / 16) for step in range(4, 20)], atol=1e-6)


def server_optimizer(name, **options):
    return SERVERS[name].make(SERVERS[name].options(**options), context())


def test_server_sgd_at_rate_one_is_the_average_by_closed_form():
    optimizer = server_optimizer("sgd")
    broadcast, average = jnp.array([1.0, 2.0]), jnp.array([0.5, 3.0])
    updates, _ = optimizer.update(broadcast - average, optimizer.init(broadcast), broadcast)
    np.testing.assert_allclose(optax.apply_updates(broadcast, updates), average)


PSEUDO_GRADIENTS = np.array([[0.5, -1.0, 0.0], [0.2, 3.0, -0.1], [-2.0, 0.1, 0.3]])


def fed_avg_m(rate, gradients):
    """`v = beta v + g`, `x = x - rate v`."""
    x = v = 0.0
    for g in gradients:
        v = 0.8 * v + g
        x = x - rate * v
    return x


def fed_adaptive(second_moment, start):
    """`x = x - rate m' / (sqrt(v') + epsilon)` with moments from 0 and `start`, divided by `1 - beta^t`."""

    def steps(rate, gradients):
        x, m, v = 0.0, 0.0, start
        for t, g in enumerate(gradients, start=1):
            m = 0.7 * m + 0.3 * g
            v = second_moment(v, g)
            x = x - rate * (m / (1 - 0.7**t)) / (np.sqrt(v / (1 - 0.95**t)) + 0.01)
        return x

    return steps


FORMULAS = {
    "sgd": lambda rate, gradients: -rate * gradients.sum(0),
    "momentum": fed_avg_m,
    "adam": fed_adaptive(lambda v, g: 0.95 * v + 0.05 * g**2, 0.0),
    "yogi": fed_adaptive(lambda v, g: v - 0.05 * np.sign(v - g**2) * g**2, 1e-6),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_server_optimizers_against_their_formulas_by_hand(name):
    """Hsu et al. for FedAvgM; Reddi et al. for FedAdam and FedYogi, with moments that are corrected for their start."""
    adaptive = {"beta1": 0.7, "beta2": 0.95, "epsilon": 0.01}
    settings = {"sgd": {}, "momentum": {"momentum": 0.8}, "adam": adaptive, "yogi": adaptive}[name]
    optimizer = server_optimizer(name, learning_rate=0.3, **settings)
    x = jnp.zeros(3)
    state = optimizer.init(x)
    for g in PSEUDO_GRADIENTS:
        updates, state = optimizer.update(jnp.float32(g), state, x)
        x = optax.apply_updates(x, updates)
    np.testing.assert_allclose(x, FORMULAS[name](0.3, PSEUDO_GRADIENTS), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", FORMULAS)
def test_a_server_that_is_told_nothing_stays(name):
    """Invariance, to the bit: a pseudo-gradient of zero, over rounds."""
    optimizer, x = server_optimizer(name), jnp.ones(3)
    state = optimizer.init(x)
    for _ in range(3):
        updates, state = optimizer.update(jnp.zeros(3), state, x)
        np.testing.assert_array_equal(updates, 0.0)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("momentum", {"momentum": 1.0}, r"momentum must be in \[0, 1\), got 1.0"),
        ("adam", {"beta1": 1.0}, r"beta1 must be in \[0, 1\), got 1.0"),
        ("yogi", {"beta2": -0.1}, r"beta2 must be in \[0, 1\), got -0.1"),
        ("adam", {"epsilon": 0.0}, "epsilon must be above 0, got 0.0"),
        ("sgd", {"learning_rate": 0.0}, "learning_rate must be above 0, got 0.0"),
        ("yogi", {"name": "adam"}, "name must be 'yogi', got 'adam'"),
    ],
)
def test_a_server_value_out_of_range_is_refused_by_name(name, values, message):
    """The message itself."""
    with pytest.raises(ValueError, match=message):
        SERVERS[name].options(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate must be above 0, got 0.0"),
        ({"warmup_steps": -1}, "warmup_steps must be at least 0, got -1"),
        ({"name": "momentum", "momentum": 1.0}, r"momentum must be in \[0, 1\) or null, got 1.0"),
        ({"name": "sgd", "momentum": 0.9}, "momentum must be null where name is sgd, got 0.9"),
        ({"momentum": 0.9}, "momentum must be null where name is adamw, got 0.9"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0"),
        ({"name": "sgd", "weight_decay": 0.1}, "weight_decay must be 0 where name is sgd, got 0.1"),
        ({"name": "momentum", "weight_decay": 0.1}, "weight_decay must be 0 where name is momentum, got 0.1"),
        ({"clip_norm": 0.0}, "clip_norm must be above 0 or null"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(values, message):
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**values)


@pytest.mark.parametrize("name", get_args(OptimizerConfig.__dataclass_fields__["schedule"].type))
@pytest.mark.parametrize("warmup_steps", [0, 5])
def test_rates_depend_on_the_number_of_rounds_as_said(name, warmup_steps):
    """Oracle: the factors of the first twelve steps, where as many more follow and where none does."""
    config = OptimizerConfig(schedule=name, warmup_steps=warmup_steps)
    short, long = (schedule(config, total, jnp.arange(12)) for total in (12, 24))
    assert depends_on_rounds(config) == (not np.allclose(short, long))
