"""Where what is made once is kept: compiled programs, tokens, training pools, centrally trained models."""

import os
import re
import warnings
from pathlib import Path
from typing import NamedTuple

_PROGRAMS = "programs"
_SHORTEST = "jax_persistent_cache_min_compile_time_secs"
_KEPT = {
    "programs": (_PROGRAMS, r"\w+-[0-9a-f]{64}-(cache|atime)"),
    "kernels tuned by XLA": (f"{_PROGRAMS}/xla_gpu_per_fusion_autotune_cache_dir", r".+"),
    "tokens": ("", r"tokens-[0-9a-f]{64}\.safetensors.*"),
    "training pools": ("", r"pool-[0-9a-f]{64}\.npy.*"),
    "pretrained models": ("", r"\.?pretrained-[0-9a-f]{16}\.safetensors.*"),
}
"""What is kept -> its folder in the cache and the names of its files, also of those that a kill left unfinished."""


class Kept(NamedTuple):
    """Files of one kind in the cache, and the size of all of them."""

    what: str
    folder: Path
    files: list[Path]
    num_bytes: int


def cache_folder() -> Path:
    """$FEDJAX_LORA_CACHE, or ~/.cache/fedjax-lora; it may not exist yet."""
    return Path(os.environ.get("FEDJAX_LORA_CACHE") or Path.home() / ".cache" / "fedjax-lora")


def contents() -> list[Kept]:
    """What the cache holds; files that others have put into its folder do not belong to it."""
    found = []
    for what, (below, pattern) in _KEPT.items():
        folder = cache_folder() / below
        files = [path for path in sorted(folder.glob("*")) if path.is_file() and re.fullmatch(pattern, path.name)]
        found.append(Kept(what, folder, files, sum(path.stat().st_size for path in files)))
    return found


def clear() -> list[Kept]:
    """Remove what the cache holds; returns what it was."""
    found = contents()
    for kept in found:
        for path in kept.files:
            path.unlink(missing_ok=True)
    return found


def keep_programs() -> None:
    """Have JAX keep compiled programs on disk: the second run of a setting does not compile again.

    A folder that JAX has been told of already, by JAX_COMPILATION_CACHE_DIR or in Python, stands.
    """
    import jax  # slow to import: not where the cache is only looked at

    if jax.config.jax_compilation_cache_dir:  # pyright: ignore[reportAttributeAccessIssue]  # made at run time
        return
    folder = cache_folder() / _PROGRAMS
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:  # a read-only home should cost time, not the run
        warnings.warn(f"compiled programs are not kept, {folder}: {error.strerror}", stacklevel=2)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    shortest_s = min(0.1, jax.config.values[_SHORTEST])  # JAX would keep none below a second
    jax.config.update(_SHORTEST, shortest_s)
