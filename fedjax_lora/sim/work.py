"""The arithmetic of a traced program: what its products of matrices take, through all of its loops."""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from jax.extend import core


class Work(NamedTuple):
    """FLOP of all products, and bytes of their operands and results: less than what a device does and moves."""

    flop: float
    bytes: float


def work_of(function: Callable[..., Any], *given: Any) -> Work:
    """The work of a function on arguments of these shapes, on all devices together.

    A loop whose length is not known before it runs counts once, and of a choice the larger side counts. Kernels written
    by hand are not seen.
    """
    return _of(jax.make_jaxpr(function)(*given).jaxpr)


def _of(jaxpr: core.Jaxpr) -> Work:
    found = [_of_equation(equation) for equation in jaxpr.eqns]
    return Work(sum(work.flop for work in found), sum(work.bytes for work in found))


def _of_equation(equation: core.JaxprEqn) -> Work:
    name, params = equation.primitive.name, equation.params
    if name in ("dot_general", "conv_general_dilated"):
        return Work(2.0 * _terms(equation), float(sum(map(_bytes, (*equation.invars, *equation.outvars)))))
    inner = [_of(jaxpr) for value in params.values() for jaxpr in _jaxprs(value)]
    if not inner:
        return Work(0.0, 0.0)
    if name == "cond":
        return max(inner)
    times = {
        "scan": params.get("length"),
        "shard_map": math.prod(params["mesh"].shape.values()) if "mesh" in params else 1,
    }
    each = times.get(name, 1)
    return Work(each * sum(work.flop for work in inner), each * sum(work.bytes for work in inner))


def _terms(equation: core.JaxprEqn) -> int:
    """Products of two numbers that are added up in the results of all."""
    result: Any = equation.outvars[0].aval
    operand: Any = equation.invars[1].aval
    size, kernel = math.prod(result.shape), operand.shape
    if equation.primitive.name == "dot_general":
        (_, contracted), _ = equation.params["dimension_numbers"]
        return size * math.prod(kernel[axis] for axis in contracted)
    outputs = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
    return size * math.prod(kernel) // outputs


def _bytes(variable: Any) -> int:
    return math.prod(variable.aval.shape) * variable.aval.dtype.itemsize


def _jaxprs(value: Any) -> Iterator[core.Jaxpr]:
    if isinstance(value, core.ClosedJaxpr):
        yield value.jaxpr
    elif isinstance(value, core.Jaxpr):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _jaxprs(item)
