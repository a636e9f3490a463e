"""What tests with examples made at random share: how many there are, and which files a piece of code opens."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from hypothesis import HealthCheck, settings

ENVIRONMENT = "FUZZ_EXAMPLES"


def examples(number: int) -> Callable:
    """So many examples, the same each time; or as many as FUZZ_EXAMPLES says, and others each time."""
    many = os.environ.get(ENVIRONMENT)
    return settings(
        max_examples=int(many) if many else number,
        derandomize=not many,
        database=None,
        deadline=None,
        print_blob=bool(many),
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


_opened: list[Path] | None = None
_is_hooked = False


def _hook(event: str, arguments: tuple) -> None:
    if _opened is not None and event == "open" and isinstance(arguments[0], str | bytes):
        _opened.append(Path(os.fsdecode(arguments[0])))


@contextlib.contextmanager
def nothing_else_read(*given: Path) -> Iterator[None]:
    """Assert that Python opens no file in the block but the given ones, what is below them, and its own modules."""
    global _opened, _is_hooked
    if not _is_hooked:  # a hook stays as long as the process
        sys.addaudithook(_hook)
        _is_hooked = True
    _opened = []
    try:
        yield
        opened = [Path(os.path.realpath(path)) for path in _opened]
    finally:
        _opened = None
    modules = {Path(os.path.realpath(path)) for path in (*sys.path, sys.prefix, sys.base_prefix) if path}
    allowed = [*modules, *(Path(os.path.realpath(path)) for path in given), Path(os.devnull)]
    others = [path for path in opened if not any(path.is_relative_to(place) for place in allowed)]
    assert not others, others
