"""What all tests share: a cache of their own, one device, and how much XLA optimises."""

import atexit
import os
import shutil
import tempfile

import pytest

# Before anything of the project is imported: no test reads or fills a user's cache.
os.environ["FEDJAX_LORA_CACHE"] = tempfile.mkdtemp(prefix="fedjax-lora-test-")
atexit.register(shutil.rmtree, os.environ["FEDJAX_LORA_CACHE"], ignore_errors=True)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# One device, on however many cores: a command that is called in this process finds the number chosen.
os.environ["JAX_NUM_CPU_DEVICES"] = "1"

# Many programs that run once or twice on little: compiling them takes longer than running them.
_COMPILED_FAST = {"laws", "sim"}


@pytest.fixture(autouse=True, scope="module")
def compiled_fast(request):
    """Little optimisation by XLA in the folders of `_COMPILED_FAST`; all of it elsewhere, and in other processes."""
    import jax  # it reads the environment that is set above

    jax.config.update("jax_disable_most_optimizations", request.path.parent.name in _COMPILED_FAST)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
