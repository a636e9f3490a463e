"""What all tests share: a cache of their own, and a small federated text task."""

import os
import tempfile

# Before anything of the project is imported: no test reads or fills a user's cache.
os.environ["FEDJAX_LORA_CACHE"] = tempfile.mkdtemp(prefix="fedjax-lora-test-")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
