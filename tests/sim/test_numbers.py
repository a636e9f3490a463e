"""Every traced number of an experiment: it is an operand of its program, and no part of its structure."""

import jax
import jax.numpy as jnp

from fedjax_lora.core.numbers import split, traced_keys
from fedjax_lora.sim.engine import make_segment
from oracles.method_settings import SETTINGS
from toy import config, simulation


def used(settings):
    """The traced numbers of a configuration, and those that its program uses."""
    sim = simulation(*settings)
    segment = make_segment(sim.make_parts, 64, 2)

    def run(numbers):
        return segment(sim.world, sim.program.init(jax.random.key(3), numbers), jnp.int32(2))[1:]

    jaxpr = jax.make_jaxpr(run)(sim.numbers).jaxpr
    names = [key for key, _ in sorted(sim.numbers.items())]
    taken = {id(variable) for equation in jaxpr.eqns for variable in equation.invars}
    return set(names), {name for name, variable in zip(names, jaxpr.invars, strict=True) if id(variable) in taken}


def test_no_traced_number_is_left_unused():
    """Structure: each is an operand of the program in one of the settings at least."""
    found = [used(settings) for settings in SETTINGS.values()]
    assert set().union(*(every for every, _ in found)) == set().union(*(taken for _, taken in found))


def test_a_structure_holds_no_number_and_is_one_for_all_of_them():
    """Invariance: configurations that differ in traced numbers alone have one structure."""
    first, second = (config(f"control.keep_ratio={ratio}", f"wireless.power_dbm={ratio}") for ratio in (0.3, 0.4))
    assert split(first)[0] == split(second)[0] and hash(split(first)[0]) == hash(split(second)[0])
    assert set(split(first)[1]) == set(traced_keys(first))
    assert split(config("wireless.fading=none"))[0] != split(first)[0]
