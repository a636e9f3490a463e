"""What a sweep varies, as axes: their values in order, how they are called, the colours that stand for them."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from matplotlib.colors import LinearSegmentedColormap, to_hex

from fedjax_lora.config.sweeps import Setting
from fedjax_lora.report.cells import Results, same
from fedjax_lora.report.drawing import run_colors
from fedjax_lora.report.formats import MISSING, option_name, option_value
from fedjax_lora.report.runs import part

_MOST_NAMES = 4  # in the title
_MOST_KEYS = 3  # in the name of an axis
_LOG_SPAN = 30.0

_SEQUENCE = LinearSegmentedColormap.from_list("", ["#3b82f6", "#8b5cf6", "#ec4899", "#f59e0b"])
"""Mid-tones in an order, legible on white and on near-black."""

Values = tuple[tuple[str, str], ...]
"""(key, `same` of its value) of the keys that a setting has: where it stands on an axis."""


class Axis(NamedTuple):
    """One key, or keys that vary together, as those do that only some settings have.

    keys: of it. settings: one for each place on it, in order: numbers ascending, else as they were given.
    places: where each stands.
    """

    keys: tuple[str, ...]
    settings: list[Setting]
    places: dict[Values, int]

    @classmethod
    def of(cls, keys: tuple[str, ...], settings: Sequence[Setting]) -> "Axis":
        """The different values of the keys."""
        return cls(keys, list(settings), {_values(setting, keys): place for place, setting in enumerate(settings)})

    @property
    def title(self) -> str:
        """What varies, in words."""
        names = list(map(option_name, self.keys))
        return ", ".join(names) if len(names) <= _MOST_KEYS else f"{names[0]} and {len(names) - 1} more"

    @property
    def numbers(self) -> list[float] | None:
        """The values where all are numbers, of a single key."""
        values: list[Any] = [setting.get(self.keys[0]) for setting in self.settings]
        numeric = all(type(value) in (int, float) and math.isfinite(value) for value in values)
        return values if len(self.keys) == 1 and numeric else None

    @property
    def is_log(self) -> bool:
        """Whether the numbers span orders of magnitude."""
        return spans_orders(self.numbers or [])

    @property
    def labels(self) -> list[str]:
        """The values in words; paths in full where their ends do not tell them apart."""
        key, *others = self.keys
        if others:
            return [", ".join(part(*item) for item in setting.items()) or MISSING for setting in self.settings]
        short = [_label(key, setting) for setting in self.settings]
        if len(set(short)) == len(short):
            return short
        return [option_value(key, setting[key]) if key in setting else MISSING for setting in self.settings]

    def named(self, label: str) -> str:
        """A label that says what it is of."""
        return f"{self.title} {label}" if len(self.keys) == 1 else label

    @property
    def colors(self) -> list[str]:
        """A sequence where the values are numbers, else colours that are easy to tell apart."""
        count = len(self.settings)
        if self.numbers is None or count < 2:
            return run_colors(count)
        return [to_hex(_SEQUENCE(place / (count - 1))) for place in range(count)]

    def place(self, setting: Setting) -> int:
        """Where a setting stands on it."""
        return self.places[_values(setting, self.keys)]


def axes_of(found: Results) -> list[Axis]:
    """The axes of a sweep, in the order of its keys.

    Keys that some settings are without stem from a list of settings: with all keys of that list they are one axis.
    """
    settings = [cell.setting for cell in found.cells]
    partial = tuple(key for key in found.keys if any(key not in setting for setting in settings))
    joined: list[tuple[str, ...]] = [
        partial if key in partial else (key,) for key in found.keys if key not in partial[1:]
    ]
    while pair := _next_pair(joined, settings):
        first, second = pair
        joined = [keys for keys in joined if keys != second]
        joined[joined.index(first)] = tuple(key for key in found.keys if key in (*first, *second))
    return [_axis(keys, settings) for keys in joined]


def is_grid(axes: Sequence[Axis], found: Results) -> bool:
    """Whether most combinations of the values have a cell, as in a grid and unlike in random draws."""
    return 2 * len(found.cells) > math.prod(len(axis.settings) for axis in axes)


def title_of(found: Results, axes: Sequence[Axis]) -> str:
    """What varies, and in how many trials: `V × latency budget, 3 seeds: 64 trials`."""
    names = [axis.title for axis in axes]
    if len(names) > _MOST_NAMES:
        names = [*names[: _MOST_NAMES - 1], f"{len(names) - _MOST_NAMES + 1} more"]
    varied = [" × ".join(names)] if names else []
    seeds = [f"{found.seeds} seeds"] if found.seeds > 1 else []
    trials = "1 trial" if len(found.trials) == 1 else f"{len(found.trials)} trials"
    return f"{', '.join([*varied, *seeds])}: {trials}" if varied or seeds else trials


def spans_orders(values: Iterable[float]) -> bool:
    """Whether positive numbers are so far apart that a logarithm shows them better."""
    known = list(values)
    return bool(known) and min(known) > 0 and max(known) > _LOG_SPAN * min(known)


def key_axis(key: str, found: Results) -> Axis:
    """One key alone."""
    return _axis((key,), [cell.setting for cell in found.cells])


def _axis(keys: tuple[str, ...], settings: Sequence[Setting]) -> Axis:
    distinct = {_values(setting, keys): {key: setting[key] for key in keys if key in setting} for setting in settings}
    axis = Axis.of(keys, list(distinct.values()))
    return axis if axis.numbers is None else Axis.of(keys, sorted(axis.settings, key=lambda setting: setting[keys[0]]))


def _next_pair(
    joined: Sequence[tuple[str, ...]], settings: Sequence[Setting]
) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
    """Two axes that are one: some settings have no key of the one, and what it is follows from the other, or turned."""
    for i, first in enumerate(joined):
        for second in joined[i + 1 :]:
            some = any(key not in setting for key in (*first, *second) for setting in settings)
            counts = [_count(keys, settings) for keys in (first, second, first + second)]
            if some and counts[2] == max(counts[:2]):
                return first, second
    return None


def _count(keys: tuple[str, ...], settings: Sequence[Setting]) -> int:
    return len({_values(setting, keys) for setting in settings})


def _values(setting: Setting, keys: tuple[str, ...]) -> Values:
    return tuple((key, same(setting[key])) for key in keys if key in setting)


def _label(key: str, setting: dict[str, Any]) -> str:
    if key not in setting:
        return MISSING
    value = setting[key]
    return part(key, value) if isinstance(value, str) else option_value(key, value)
