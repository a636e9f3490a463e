"""Laws of every slot: `check(METHOD)` raises an AssertionError that names the law that a method breaks.

A law holds for every method of its slot, whatever its idea is: numbers are traced, a batch of settings equals single
runs, what is kept whole arrives whole, weights sum to 1, bits count the index. The package's own methods are held to
the same ones.

Example:
  >>> from fedjax_lora.sparsifiers import top_k
  >>> check(top_k.METHOD)
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from fedjax_lora.core.methods import Context, Method
from fedjax_lora.core.numbers import Numbers, Options, fill, split
from fedjax_lora.testing import examples

FACTORS = 1.0, 0.93, 0.86
"""By which the numbers of a method are multiplied, all at once; one that is 0 becomes 1 less the factor."""


@dataclasses.dataclass(frozen=True)
class Subject:
    """A method with its options, in an experiment.

    held: what laws have in common, see `once`.
    """

    method: Method
    options: Any
    context: Context
    held: dict[Callable[["Subject"], Any], Any] = dataclasses.field(default_factory=dict)

    def once(self, make: Callable[["Subject"], Any]) -> Any:
        """What `make` gives of this subject, made for the first law that asks."""
        if make not in self.held:
            self.held[make] = make(self)
        return self.held[make]

    @functools.cached_property
    def numbers(self) -> Numbers:
        """The traced numbers of the options."""
        return split(self.options)[1]

    @functools.cached_property
    def record(self) -> Any:
        """What the method makes of its options' own numbers, its functions compiled."""
        made = self.made(self.numbers)
        functions = {name: jax.jit(value) for name, value in made._asdict().items() if name in _COMPILED and value}
        return made._replace(**functions)

    def made(self, numbers: Numbers) -> Any:
        """What the method makes of these numbers."""
        return self.method.make(fill(self.options, numbers), self.context)


_COMPILED = {
    *("offer", "encode", "decode", "remember", "penalty"),
    *("aggregate", "enter", "next_rank"),
    *("allocate", "update", "schedule"),
    *("step", "observe", "deliver"),
    *("loss", "score", "finish", "weigh", "effective", "merge"),
    *("gradient", "next_client", "next_server", "train", "work"),
}
"""Functions of records that take arrays alone."""

Law = Callable[[Subject], None]
Exercise = Callable[[Any, Context], Any]
"""`(record, context) -> tree`: what the functions of a record give on the examples."""


def check(method: Method, options: Options | None = None, context: Context | None = None) -> None:
    """Hold a method to the laws of its slot.

    Args:
      method: to be checked.
      options: of it; its defaults if None.
      context: what it is made for, such as shapes; that of `testing.slots.context` if None.

    Raises:
      AssertionError: names the method, the law that it breaks, and how.
    """
    from fedjax_lora.testing import slots  # which are written in terms of this module

    if method.slot not in slots.LAWS:
        raise ValueError(f"slot must be one of {', '.join(slots.LAWS)}, got {method.slot!r}")
    options = method.options() if options is None else options
    subject = Subject(method, options, slots.context(method.slot) if context is None else context)
    exercise = slots.EXERCISES.get(method.slot)
    laws = general(exercise, subject) if exercise else {}
    for name, law in {**laws, **slots.LAWS[method.slot]}.items():
        try:
            law(subject)
        except Exception as error:  # whatever a method raises on valid inputs is its own fault
            lines = [line for line in str(error).strip().splitlines() if line.strip()] or [type(error).__name__]
            raise AssertionError(f"{method.slot} {method.name} breaks the law {name!r}: {lines[0]}") from error


def named(*laws: Law) -> dict[str, Law]:
    """Laws by their names, which are those of the functions in words."""
    return {law.__name__.strip("_").replace("_", " "): law for law in laws}


def general(exercise: Exercise, subject: Subject) -> dict[str, Law]:
    """The laws of all slots, by what the functions of a record give; what they run is compiled once for all of them."""
    chex.clear_trace_counter()

    def outcome(numbers: Numbers) -> Any:
        return exercise(subject.made(numbers), subject.context)

    run = jax.jit(chex.assert_max_traces(outcome, 1))
    settings = [{key: np.float32(_varied(value, by)) for key, value in subject.numbers.items()} for by in FACTORS]

    def numbers_are_traced(subject: Subject) -> None:
        for key in subject.numbers:  # one at a time, so that the one that is branched on is named
            rest = {other: value for other, value in subject.numbers.items() if other != key}
            try:
                jax.eval_shape(lambda value, key=key, rest=rest: outcome({**rest, key: value}), subject.numbers[key])
            except (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError, TypeError) as error:
                raise AssertionError(f"{key} must be used as an array, got {type(error).__name__}") from error

    def traced_once(subject: Subject) -> None:
        for setting in settings:
            jax.block_until_ready(run(setting))

    def a_batch_of_settings_equals_single_runs(subject: Subject) -> None:
        if not subject.numbers:
            return
        batch = {key: jnp.stack([setting[key] for setting in settings]) for key in subject.numbers}
        close(jax.jit(jax.vmap(outcome))(batch), examples.stack([run(setting) for setting in settings]))

    def results_are_finite(subject: Subject) -> None:
        chex.assert_tree_all_finite(run(settings[0]))

    def results_are_of_32_bits(subject: Subject) -> None:
        for leaf in jax.tree.leaves(run(settings[0])):
            assert leaf.dtype.itemsize <= 4 or leaf.dtype == jnp.complex64, f"got {leaf.dtype}"

    return named(
        numbers_are_traced,
        traced_once,
        a_batch_of_settings_equals_single_runs,
        results_are_finite,
        results_are_of_32_bits,
    )


def _varied(value: Any, by: float) -> Any:
    return np.where(np.asarray(value) == 0, 1.0 - by, np.asarray(value) * by)


def close(found: Any, expected: Any, rtol: float = 2e-4, atol: float = 2e-5) -> None:
    """Trees are equal, in float32 and by the size of each leaf."""
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        size = float(np.max(np.abs(np.asarray(y)), initial=0.0))  # of a complex number its modulus
        chex.assert_trees_all_close(np.asarray(x), np.asarray(y), rtol=rtol, atol=atol * max(size, 1e-3))


def same_form(before: Any, after: Any) -> None:
    """A state has the structure, shapes and dtypes that it had."""
    chex.assert_trees_all_equal_structs(before, after)
    chex.assert_trees_all_equal_shapes_and_dtypes(before, after)


def rows(tree: Any, order: Sequence[int]) -> Any:
    """The rows of every leaf, in this order."""
    return jax.tree.map(lambda leaf: leaf[jnp.array(order)], tree)
