"""Markdown tables of measured numbers."""

from collections.abc import Mapping, Sequence

Row = Sequence[str]


def table(head: Row, rows: Sequence[Row]) -> str:
    """A table; nothing where there is no row."""
    if not rows:
        return ""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def times(spread: Mapping[str, float]) -> str:
    """A ratio's median and extremes."""
    return f"{spread['median']:.2f}× ({spread['min']:.2f}–{spread['max']:.2f})"


def seconds(value: float) -> str:
    """A time in the unit that reads well, three digits."""
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if value * factor >= 1.0:
            return f"{three(value * factor)} {unit}"
    return f"{three(value * 1e6)} µs"


def percent(share: float) -> str:
    """A share in whole per cent."""
    return f"{100 * share:.0f} %"


def three(value: float) -> str:
    """Three digits, or all before the point."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"
