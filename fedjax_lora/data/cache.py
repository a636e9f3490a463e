"""Where what is made once is kept."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """$FEDJAX_LORA_CACHE, or ~/.cache/fedjax-lora; it may not exist yet."""
    return Path(os.environ.get("FEDJAX_LORA_CACHE") or Path.home() / ".cache" / "fedjax-lora")
