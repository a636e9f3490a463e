"""What all tests share: a cache of their own, and one device."""

import atexit
import os
import shutil
import tempfile

# Before anything of the project is imported: no test reads or fills a user's cache.
os.environ["FEDJAX_LORA_CACHE"] = tempfile.mkdtemp(prefix="fedjax-lora-test-")
atexit.register(shutil.rmtree, os.environ["FEDJAX_LORA_CACHE"], ignore_errors=True)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# One device, on however many cores: a command that is called in this process finds the number chosen.
os.environ["JAX_NUM_CPU_DEVICES"] = "1"
