"""What a user's arrays must be to serve as examples: each mistake is one line that names the array."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fedjax_lora.core.learning import Learned
from fedjax_lora.core.types import IGNORED

Pool = dict[str, np.ndarray]

_TOKENS = ("input_ids", "attention_mask", "token_type_ids")
_INT32 = np.iinfo(np.int32)


def check_pools(
    parts: Mapping[str, Mapping[str, Any]], class_names: Sequence[str]
) -> tuple[dict[str, Pool], tuple[str, ...]]:
    """The parts of a data set as float32 and int32 arrays, and the names of its labels.

    Args:
      parts: "train", "test" and maybe "public" -> input name -> `[N, ...]`, `label` among them.
      class_names: of the labels 0, 1, ...

    Raises:
      ValueError: the names are not two or more different ones (one or more where there is a `target`), a part lacks an
        array or has one of another shape than the first part, or an array is not what its name says.
    """
    names = (class_names,) if isinstance(class_names, str) else tuple(class_names)
    least = 1 if any("target" in leaves for leaves in parts.values() if isinstance(leaves, Mapping)) else 2
    if len(names) < least or len(set(names)) < len(names) or not all(isinstance(name, str) and name for name in names):
        many = "two" if least == 2 else "one"
        raise ValueError(f"class_names must be {many} or more different names, got {class_names!r}")
    pools = {part: _pool(part, leaves, len(names)) for part, leaves in parts.items()}
    first, *others = pools
    for part in others:
        if pools[part].keys() != pools[first].keys():
            want, got = (", ".join(sorted(pools[name])) for name in (first, part))
            raise ValueError(f"{part} must hold {want}, as {first} does, got {got}")
        for name, leaf in pools[part].items():
            if leaf.shape[1:] != pools[first][name].shape[1:] or leaf.dtype != pools[first][name].dtype:
                want, got = (
                    f"[{', '.join(map(str, ('N', *x.shape[1:])))}] of {x.dtype}" for x in (pools[first][name], leaf)
                )
                raise ValueError(f"{part}/{name} must be {want}, as in {first}, got {got}")
    return pools, names


def check_target(parts: Mapping[str, Pool | None], learns: Learned, num_classes: int) -> None:
    """Raise ValueError where a part holds no `target` of the form that is learned; parts that are None are none."""
    for part, pool in parts.items():
        if learns == "label" or pool is None:
            continue
        if "target" not in pool:
            raise ValueError(f"{part} must hold target for a task that learns {learns}, got {', '.join(pool)}")
        target, axes = pool["target"], 1 if learns == "number" else 2
        wanted = ("[N] floats", np.float32) if learns == "number" else ("[N, S] integers", np.int32)
        if target.ndim != axes or target.dtype != wanted[1]:
            raise ValueError(
                f"{part}/target must be {wanted[0]} for a task that learns {learns}, got {_shape(target)} of "
                f"{target.dtype}"
            )
        if learns == "token_label" and target.max(initial=0) >= num_classes:
            raise ValueError(
                f"{part}/target must be {IGNORED} or from 0 to {num_classes - 1}, one for each of class_names, got "
                f"{target.max()}"
            )


def holders(train: Mapping[str, Any]) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """Who holds each example: `[N]` int32 and the names of the clients in order; None where `client` is not given.

    Raises:
      ValueError: there is not an integer or a text for each label.
    """
    if not isinstance(train, Mapping) or "client" not in train:
        return None, ()
    given, count = np.asarray(train["client"]), len(train.get("label", ()))
    if given.ndim != 1 or given.dtype.kind not in "iuU" or len(given) != count:
        raise ValueError(f"train/client must be [{count}] integers or texts, got {_shape(given)} of {given.dtype}")
    names, clients = np.unique(given, return_inverse=True)
    return clients.astype(np.int32), tuple(map(str, names))


def without_holders(leaves: Any) -> Any:
    """The arrays that a batch holds."""
    return {name: leaf for name, leaf in leaves.items() if name != "client"} if isinstance(leaves, Mapping) else leaves


def _pool(part: str, leaves: Mapping[str, Any], num_classes: int) -> Pool:
    """One part, each array by itself and all of one length."""
    if not isinstance(leaves, Mapping) or "label" not in leaves or len(leaves) < 2:
        got = ", ".join(map(str, leaves)) if isinstance(leaves, Mapping) else type(leaves).__name__
        raise ValueError(f"{part} must be a mapping with label and at least one input, got {got or 'nothing'}")
    pool = {name: _array(f"{part}/{name}", leaf) for name, leaf in leaves.items()}
    label = pool["label"]
    if label.ndim != 1 or label.dtype != np.int32 or not label.size:
        raise ValueError(f"{part}/label must be [N] integers, at least one, got {_shape(label)} of {label.dtype}")
    if label.min() < 0 or label.max() >= num_classes:
        wrong = label[(label < 0) | (label >= num_classes)][0]
        raise ValueError(f"{part}/label must be from 0 to {num_classes - 1}, one for each of class_names, got {wrong}")
    for name, leaf in pool.items():
        if leaf.shape[:1] != label.shape:
            raise ValueError(f"{part}/{name} must have {label.size} rows, as label has, got {_shape(leaf)}")
    _check_known(part, pool)
    return pool


def _array(name: str, given: Any) -> np.ndarray:
    """`[N, ...]` float32 or int32, a copy but of what is so already and read-only, such as a file that is mapped."""
    try:
        array = np.asarray(given)
    except ValueError:  # rows of unequal length
        array = np.asarray(None)
    kind = array.dtype.kind
    if kind not in "fiub" or array.ndim == 0:
        raise ValueError(
            f"{name} must be an array [N, ...] of floats or integers, got {_shape(array)} of {array.dtype}"
        )
    if kind == "f":
        with np.errstate(over="ignore"):
            array = array.astype(np.float32, copy=array.flags.writeable)
        if not np.isfinite(array).all():
            raise ValueError(f"{name} must be finite in float32, got {array[~np.isfinite(array)][0]}")
        return array
    if array.size and (array.min() < _INT32.min or array.max() > _INT32.max):
        raise ValueError(f"{name} must fit int32, got {array.max() if array.max() > _INT32.max else array.min()}")
    return array.astype(np.int32, copy=array.flags.writeable)


def _check_known(part: str, pool: Pool) -> None:
    """What `image` and the names of tokens say of an array."""
    if "image" in pool and (pool["image"].ndim != 4 or pool["image"].dtype != np.float32):
        raise ValueError(
            f"{part}/image must be [N, height, width, channels] floats, got {_shape(pool['image'])} of "
            f"{pool['image'].dtype}"
        )
    if ("input_ids" in pool) != ("attention_mask" in pool):
        raise ValueError(f"{part} must hold both input_ids and attention_mask, got {', '.join(pool)}")
    if "input_ids" in pool and "image" in pool:
        raise ValueError(f"{part} must hold an image or input_ids, got both")
    for name in _TOKENS:
        if name not in pool:
            continue
        leaf = pool[name]
        if leaf.ndim != 2 or leaf.dtype != np.int32 or leaf.shape != pool.get("input_ids", leaf).shape:
            raise ValueError(f"{part}/{name} must be [N, S] integers, as input_ids, got {_shape(leaf)} of {leaf.dtype}")
        if leaf.size and leaf.min() < 0:
            raise ValueError(f"{part}/{name} must not be negative, got {leaf.min()}")
    if (target := pool.get("target")) is not None and target.dtype == np.int32:
        if target.shape != pool.get("input_ids", target).shape:
            want = _shape(pool["input_ids"])
            raise ValueError(f"{part}/target must be {want} integers, as input_ids, got {_shape(target)}")
        if target.min(initial=0) < 0 and (target[target < 0] != IGNORED).any():
            raise ValueError(f"{part}/target must be {IGNORED} or not negative, got {target.min()}")
    if "attention_mask" in pool:
        mask = pool["attention_mask"]
        if mask.max(initial=0) > 1 or not mask.any(axis=1).all():
            raise ValueError(f"{part}/attention_mask must be 1 and 0 with a 1 in each row")


def _shape(array: np.ndarray) -> str:
    return f"[{', '.join(map(str, array.shape))}]"
