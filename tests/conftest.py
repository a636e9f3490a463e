"""What all tests share: a cache of their own, one device, and how much XLA optimises.

Compiling takes most of the suite's time, so XLA does less than a user's does, unless JAX_DISABLE_MOST_OPTIMIZATIONS is
set to false beforehand, as `make test-all` does.
"""

import atexit
import os
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path

import pytest

# Before anything of the project is imported: no test reads or fills a user's cache. Processes that test side by side
# share one, with the programs that were compiled in it.
if "PYTEST_XDIST_WORKER" not in os.environ:
    cache = tempfile.mkdtemp(prefix="fedjax-lora-test-")
    atexit.register(shutil.rmtree, cache, ignore_errors=True)
    os.environ["FEDJAX_LORA_CACHE"] = os.environ["JAX_COMPILATION_CACHE_DIR"] = cache
    # Small programs too, of which tests share many: a tenth of the suite's time.
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# One device, on however many cores: a command that is called in this process finds the number chosen.
os.environ["JAX_NUM_CPU_DEVICES"] = "1"
_IN_FULL = os.environ.get("JAX_DISABLE_MOST_OPTIMIZATIONS", "").lower() in ("0", "false")
_EMITTERS_ARE_OPTIONAL = tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11)
if not _IN_FULL:
    # A module of LLVM for each part of a program costs more than the cores gain, which have two workers already.
    flags = ["--xla_cpu_parallel_codegen_split_count=1"]
    if _EMITTERS_ARE_OPTIONAL:  # they take more than half of the time of compiling for a processor
        flags.append("--xla_cpu_use_fusion_emitters=false")
    # Where each operation was written is for those who read dumps, and costs a tenth of tracing and compiling.
    os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *flags])

SLOW = Path(__file__).with_name("slow.txt")
"""Tests that take more than about three seconds on two cores and are not the only ones of what they test, by their ids.

They are marked `slow`, and `make test` leaves them out. `pytest --durations=0` tells when the list should change.
"""

# Modules whose programs take longer to run than to compile.
_RUN_LONG = {"test_tsfa_laws", "test_tsfa_offline"}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what is listed in SLOW; a line that names no test of a file that was collected whole is an error."""
    listed = set(SLOW.read_text(encoding="utf-8").splitlines())
    for item in items:
        if item.nodeid in listed:
            item.add_marker(pytest.mark.slow)
    if not any("::" in argument for argument in config.args):
        found = {item.nodeid for item in items}
        files = {nodeid.partition("::")[0] for nodeid in found}
        if lost := sorted(line for line in listed - found if line.partition("::")[0] in files):
            raise pytest.UsageError(f"{SLOW} must name tests that are there, got {lost[0]}")


@pytest.fixture(autouse=True, scope="module")
def compiled_fast(request):
    """Little optimisation by XLA, here and in processes that are started, but in the modules of `_RUN_LONG`."""
    import jax  # it reads the environment that is set above

    few = not _IN_FULL and request.path.stem not in _RUN_LONG
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", str(few))
        jax.config.update("jax_disable_most_optimizations", few)
        yield
