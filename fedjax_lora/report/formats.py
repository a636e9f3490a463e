"""How numbers are written, alike on a page and in a terminal."""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

MISSING = "–"
"""What stands for a value that was not measured."""

_PREFIXES = (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3))
_UNITS = {"_s": " s", "_j": " J", "_hz": " Hz", "_db": " dB", "_dbm": " dBm", "_m": " m"}
"""Ends of the names of options -> what to write behind their values."""


class Shown(NamedTuple):
    """A value as it is shown, and in full where that says more, else ""."""

    text: str
    exact: str = ""


Format = Callable[[Any], Shown]


def number(value: float) -> Shown:
    """Four significant digits, with separators of thousands: `33.6`, `1,344`."""
    text = _rounded(value)
    exact = f"{value:,.15g}"
    return Shown(text, "" if exact == text else exact)


def accuracy(value: float) -> Shown:
    """Four places: `0.9359`."""
    return Shown(f"{value:.4f}")


def count(value: int) -> Shown:
    """All digits, with separators of thousands: `12,288`."""
    return Shown(f"{value:,d}")


def times(value: float) -> Shown:
    """A ratio: `1.68×`."""
    shown = number(value)
    return Shown(f"{shown.text}×", shown.exact and f"{shown.exact}×")


def bits(value: float) -> Shown:
    """With a decimal prefix: `533.1 Mbit`."""
    return _prefixed(round(value), "bit", "bits")


def bits_alike(values: Sequence[float]) -> tuple[str, Format]:
    """One unit for numbers of bits, and how they are written in it, three digits each."""
    middle = math.sqrt(min(values) * max(values))
    prefix, scale = next(((p, s) for p, s in _PREFIXES if middle >= s), ("", 1))
    return f"{prefix}bit", lambda value: Shown(f"{float(f'{value / scale:.3g}'):,.15g}")


def memory(value: int) -> Shown:
    """With a decimal prefix: `1.242 GB`."""
    return _prefixed(value, "B", "bytes")


def found(value: Any) -> Shown:
    """Text, or lists and mappings of numbers, with six digits each."""
    return Shown(_joined(value, lambda item: f"{item:.6g}"))


def setting(value: Any) -> Shown:
    """A value of a configuration, in full."""
    return Shown(_joined(value, lambda item: repr(item).removesuffix(".0")))


def option(key: str, value: Any) -> str:
    """An option in words, with the unit that its name ends in: `latency budget 20 s`."""
    return f"{option_name(key)} {option_value(key, value)}"


def option_name(key: str) -> str:
    """An option without its section and its unit: `latency budget`; of a method's name, the section: `sparsifier`."""
    section, _, name = key.rpartition(".")
    if name == "name" and section:
        return option_name(section)
    return name.removesuffix(_unit_end(name)).replace("_", " ")


def metric_name(name: str) -> str:
    """What a method measures, in words: `macro f1` of `task/macro_f1`."""
    return name.rpartition("/")[2].replace("_", " ")


def option_value(key: str, value: Any) -> str:
    """The value of an option, with the unit that its name ends in: `20 s`."""
    return f"{setting(value).text}{_UNITS.get(_unit_end(key), '')}"


def spread(form: Format, mean: float, deviation: float | None) -> Shown:
    """A mean and a deviation of two digits: `33.6 ± 1.2`; the mean alone where there is none, or it is 0."""
    shown = form(mean)
    if deviation is None or deviation <= 1e-9 * abs(mean):
        return shown
    around = form(deviation if form is accuracy else float(f"{deviation:.2g}"))
    exact = f"{shown.exact or shown.text} ± {around.exact or around.text}" if shown.exact or around.exact else ""
    return Shown(f"{shown.text} ± {around.text}", exact)


def last_name(path: Any) -> str:
    """What a path or a hub id ends in."""
    return re.split(r"[/\\]", str(path).rstrip("/\\"))[-1] or str(path)


def _unit_end(name: str) -> str:
    return next((end for end in _UNITS if name.endswith(end)), "")


def _rounded(value: float) -> str:
    return f"{float(f'{value:.4g}'):,.15g}"


def _prefixed(value: float, unit: str, name: str) -> Shown:
    rounded = abs(float(f"{value:.4g}"))
    prefix, scale = next(((p, s) for p, s in _PREFIXES if rounded >= s), ("", 1))
    return Shown(f"{_rounded(value / scale)} {prefix}{unit}", f"{value:,} {name}" if prefix else "")


def _joined(value: Any, of_float: Callable[[float], str]) -> str:
    if value is None:
        return MISSING
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return ", ".join(f"{key} {_joined(item, of_float)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(_joined(item, of_float) for item in value) or "[]"
    return of_float(value) if isinstance(value, float) else str(value)
