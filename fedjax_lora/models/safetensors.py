"""Hugging Face folders: `config.json` and `model.safetensors`, whole or in shards.

Only safetensors are read, never a pickle, and nothing of a folder is executed.
"""

import contextlib
import fnmatch
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from fedjax_lora.core.errors import reason_of
from fedjax_lora.core.types import Base
from fedjax_lora.models.table import Row, Table, in_layers

_WHOLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_DTYPES = ("F64", "F32", "F16", "BF16")
_READ = ["*.json", "*.safetensors", "*.txt", "tokenizer.model", "chat_template.jinja"]
_NOT_READ = ["*/*", "consolidated*"]
"""Files of a hub's model that are read or go with its weights, and among them those of other programs."""

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def resolve(pretrained: str) -> Path:
    """The local folder of a model: the path itself, or the download of a hub id.

    Raises:
      ValueError: where it is neither.
    """
    folder = os.path.expanduser(pretrained)
    if os.path.isdir(folder):  # unlike Path's, it is just false for a name that no file system takes
        return Path(folder)
    if not _HUB_ID.fullmatch(pretrained):
        raise ValueError(
            f"model.pretrained must be a folder that exists or a Hugging Face model id, got {pretrained!r}"
        )
    try:
        return Path(huggingface_hub.snapshot_download(pretrained, allow_patterns=_READ, ignore_patterns=_NOT_READ))
    except Exception as error:  # the hub client raises errors of several libraries
        raise ValueError(
            "model.pretrained must be an existing folder or a model that the Hugging Face hub has, "
            f"got {pretrained!r} ({reason_of(error)}); without a network it must be a folder, or in the hub's cache "
            "already (HF_HOME), then with HF_HUB_OFFLINE=1"
        ) from None


def read_json(path: Path, field: str = "model.pretrained") -> dict[str, Any]:
    """Fields of a JSON file; `field` names its folder in messages.

    Raises:
      ValueError: where the file is missing or is not a JSON object.
    """
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = reason_of(error)
        raise ValueError(f"{field} must hold a readable {path.name}, got {path} ({reason})") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{field} must hold a JSON object in {path.name}, got {path}")
    return fields


def tensor_files(folder: Path) -> dict[str, Path]:
    """Tensor name -> file that holds it, for all tensors that transformers would load from a folder.

    That is the whole file, or else what the index's shards hold; where `config.json` has `transformers_weights`, the
    file or the index of that name.

    Raises:
      ValueError: where the folder holds no safetensors, or a damaged file.
    """
    named = read_json(folder / "config.json").get("transformers_weights")
    choices = (_WHOLE, _INDEX) if named is None else (str(named),)
    # os.path.isfile is just false for a name that no file system takes.
    chosen = next((name for name in choices if Path(name).name == name and os.path.isfile(folder / name)), None)
    if chosen is None:
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        without = f"without, but {pickles[0]}, a pickle, which is never read" if pickles else "without"
        raise ValueError(f"model.pretrained must hold {' or '.join(choices)}, got {folder} {without}")
    tensors = {}
    for shard in _shards(folder / chosen) if chosen.endswith(".index.json") else (chosen,):
        with _open(folder / shard) as handle:
            tensors |= dict.fromkeys(handle.keys(), folder / shard)
    return tensors


def _shards(index: Path) -> list[str]:
    """Names of the files that an index lists, all beside it."""
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict):
        raise ValueError(f"model.pretrained must map tensors to files beside it in {index}")
    for tensor, shard in shards.items():
        if shard == ".." or Path(str(shard)).name != shard:
            raise ValueError(
                f"model.pretrained must map tensors to files beside it in {index}, got {shard!r} for {tensor!r}"
            )
    return sorted(set(shards.values()))


def load(
    folder: Path,
    table: Table,
    shapes: Base,
    prefixes: Sequence[str] = ("",),
    ignored: Sequence[str] = (),
    renamed: Mapping[str, str] | None = None,
) -> Base:
    """Frozen weights of a folder.

    Args:
      folder: holds the safetensors.
      table: of the model.
      shapes: of `table.shapes`.
      prefixes: what may stand before all names; the one under which most are found is taken.
      ignored: patterns (with `*`) of names that need no place in the model. What lies under none of the prefixes nor
        in a module of the model is of a task head, and needs none either.
      renamed: parts of names in older checkpoints -> what stands there in the table, replaced in this order.

    Raises:
      ValueError: for tensors that are missing, unexpected, of another shape or type or not finite, and for a damaged
        file.
    """
    files = tensor_files(folder)
    stored = {_current(name, renamed or {}): name for name in files}
    leaves: dict[str, Any] = flatten_dict(shapes, sep="/")
    wanted = _wanted(table, leaves)
    prefix, names = _placed(stored, wanted, prefixes)
    inside = tuple({f"{name.partition('.')[0]}." for name in wanted} | {*prefixes} - {""})
    found = {name for name in stored if name.startswith(inside)}
    _check(folder, found, set(names.values()), [prefix + pattern for pattern in ignored])
    with contextlib.ExitStack() as stack:
        handles = {file: stack.enter_context(_open(file)) for file in set(files.values())}

        def read(name: str) -> np.ndarray:
            name = stored[names[name]]
            return _read(handles[files[name]], files[name], name)

        return unflatten_dict({path: _leaf(row, path, leaves[path], read) for path, row in table.items()}, sep="/")


def spare(
    folder: Path,
    table: Table,
    shapes: Base,
    prefixes: Sequence[str] = ("",),
    ignored: Sequence[str] = (),
    renamed: Mapping[str, str] | None = None,
) -> dict[str, np.ndarray]:
    """The tensors of floats that `load` ignores, such as a pooler that no head looks through, by today's names.

    Arguments and errors are those of `load`; no name has a prefix.
    """
    files = tensor_files(folder)
    stored = {_current(name, renamed or {}): name for name in files}
    wanted = _wanted(table, flatten_dict(shapes, sep="/"))
    prefix, _ = _placed(stored, wanted, prefixes)
    found = {}
    for name in sorted(stored):
        own, whole = name.removeprefix(prefix), stored[name]
        if name.startswith(prefix) and any(fnmatch.fnmatch(own, pattern) for pattern in ignored) and own not in wanted:
            with _open(files[whole]) as handle:
                if handle.get_slice(whole).get_dtype() in _DTYPES:
                    found[own] = _read(handle, files[whole], whole)
    return found


def read_all(file: Path, field: str) -> dict[str, np.ndarray]:
    """All tensors of a file, in float32; `field` names it in messages.

    Raises:
      ValueError: it cannot be read, or a tensor is of another type or not finite.
    """
    with _open(file, field) as handle:
        return {name: _read(handle, file, name, field) for name in handle.keys()}  # noqa: SIM118


def save(path: Path, tree: Base, metadata: Mapping[str, str]) -> None:
    """Write nested dictionaries of arrays as one safetensors file, so that `restore` gives them back.

    A reader never sees half a file: it is written under another name and then renamed.
    """
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    leaves = {name: np.asarray(leaf) for name, leaf in flatten_dict(tree, sep="/").items()}
    save_file(leaves, partial, dict(metadata))
    partial.replace(path)


def restore(path: Path) -> tuple[Base, dict[str, str]]:
    """The tree and the metadata that `save` wrote.

    Raises:
      ValueError: for a missing file, or one whose damage the format tells; a change of values it does not.
    """
    with _open(path) as handle:
        tree = {name: jnp.asarray(handle.get_tensor(name)) for name in handle.keys()}  # noqa: SIM118
        return unflatten_dict(tree, sep="/"), handle.metadata() or {}


def _open(file: Path, field: str = "model.pretrained") -> Any:
    try:
        return safe_open(file, framework="np")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{field} must hold readable files, got {file} ({reason_of(error)})") from None


def _read(handle: Any, file: Path, name: str, field: str = "model.pretrained") -> np.ndarray:
    """A tensor in float32, checked."""
    try:
        dtype = handle.get_slice(name).get_dtype()
        if dtype not in _DTYPES:
            raise ValueError(f"{field} must hold tensors of {', '.join(_DTYPES)}, got {dtype} of {name} in {file}")
        tensor = handle.get_tensor(name)
    except SafetensorError as error:
        raise ValueError(f"{field} must hold readable files, got {file} ({reason_of(error)})") from None
    with np.errstate(over="ignore"):
        tensor = tensor.astype(np.float32, copy=False)
    if not np.isfinite(tensor).all():
        raise ValueError(f"{field} must hold finite weights, got NaN or infinity in {name} of {file}")
    return tensor


def _current(name: str, renamed: Mapping[str, str]) -> str:
    """The name with today's parts."""
    for old, new in renamed.items():
        name = name.replace(old, new)
    return name


def _names(row: Row, path: str, shape: tuple[int, ...]) -> list[str]:
    """All tensors of a leaf."""
    layers = range(shape[0]) if in_layers(path) else (0,)
    return [name.format(layer=layer) for layer in layers for name in row.names]


def _wanted(table: Table, leaves: Mapping[str, Any]) -> dict[str, bool]:
    """All tensors of a table -> whether the prefix stands before its name."""
    return {name: row.prefixed for path, row in table.items() for name in _names(row, path, leaves[path].shape)}


def _placed(
    stored: Mapping[str, str], wanted: Mapping[str, bool], prefixes: Sequence[str]
) -> tuple[str, dict[str, str]]:
    """The prefix under which most are found, and each wanted tensor -> its name with it."""
    full = {prefix: {name: prefix * prefixed + name for name, prefixed in wanted.items()} for prefix in prefixes}
    prefix = max(prefixes, key=lambda prefix: sum(name in stored for name in full[prefix].values()))
    return prefix, full[prefix]


def _check(folder: Path, found: set[str], wanted: set[str], ignored: Sequence[str]) -> None:
    """Raise where a wanted tensor is missing or an unexpected one is there."""
    unexpected = {name for name in found - wanted if not any(fnmatch.fnmatch(name, pattern) for pattern in ignored)}
    for problem, names in (("lacks", wanted - found), ("has unexpected", unexpected)):
        if names:
            listed = ", ".join(sorted(names)[:3]) + (" ..." if len(names) > 3 else "")
            raise ValueError(
                f"model.pretrained must match the model: {folder} {problem} {len(names)} tensors: {listed}"
            )


def _leaf(row: Row, path: str, shape: jax.ShapeDtypeStruct, read: Callable[[str], np.ndarray]) -> jax.Array:
    """One stacked leaf: a layer's tensors side by side, layers on a leading axis."""
    layers = []
    for layer in range(shape.shape[0] if in_layers(path) else 1):
        names = [name.format(layer=layer) for name in row.names]
        tensors = [read(name) for name in names]
        want = [row.stored.write(np.empty(part.shape)).shape for part in _parts(row)]
        if [tensor.shape for tensor in tensors] != want:
            shapes = " and ".join(map(str, want)), " and ".join(str(tensor.shape) for tensor in tensors)
            raise ValueError(
                f"model.pretrained must match the model: {' and '.join(names)} must be of {shapes[0]}, got {shapes[1]}"
            )
        # Of half the size in bfloat16 before all layers are held.
        layers.append(np.concatenate([row.stored.read(tensor) for tensor in tensors], axis=-1).astype(shape.dtype))
    return jnp.asarray(np.stack(layers) if in_layers(path) else layers[0])


def _parts(row: Row) -> list[jax.ShapeDtypeStruct]:
    """Shapes of the columns of each tensor."""
    return [jax.ShapeDtypeStruct((*row.shape[:-1], n), "float32") for n in row.columns or row.shape[-1:]]
