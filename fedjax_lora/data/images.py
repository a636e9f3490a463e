"""Images as arrays: from a folder for each class, or from the column of a data set."""

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedjax_lora.core.errors import reason_of
from fedjax_lora.data import tables
from fedjax_lora.data.arrays import Pool
from fedjax_lora.data.examples import Examples, gather
from fedjax_lora.data.known import HubColumns
from fedjax_lora.data.readers import missing_library
from fedjax_lora.data.tables import Table, shorten_list

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
"""Of files that are taken for images, in capitals too; others in a class's folder are none."""

_MODES = {1: "L", 3: "RGB"}
_EIGHT_BITS = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")


def encode(name: str, parts: Iterable[Table], image_size: int, channels: int, **more: Any) -> Examples:
    """Examples of images: `image: [N, image_size, image_size, channels]` float32 in [0, 1], and `label: [N]` int32.

    Args:
      name: of the source.
      parts: tables of training and of testing, with the columns `image` (paths, or images of Pillow) and `label`.
      image_size: height and width, to which an image of another size is scaled, whatever its shape.
      channels: 1, gray, or 3.
      more: other fields of `Examples`.

    Raises:
      ValueError: an image is damaged, or of more than 8 bits a channel; names it.
    """
    train, test = parts
    names = tables.class_names(train, test)
    ids = {label: number for number, label in enumerate(names)}
    pools: list[Pool] = []
    for table in (train, test):
        image = pixels(table, image_size, channels)
        label = np.asarray([ids[word] for word in tables.labels(table)], np.int32)
        pools.append({"image": image, "label": label})
    return gather(name, pools[0], pools[1], names, image_shape=(image_size, image_size, channels), **more)


def pixels(table: Table, image_size: int, channels: int) -> np.ndarray:
    """`[N, image_size, image_size, channels]` of the column `image`, see `encode`."""
    image = np.empty((len(table.lines), image_size, image_size, channels), np.float32)
    for row, value in enumerate(table.columns["image"]):
        image[row] = _pixels(value, table.at(row), image_size, channels)
    return image


def inputs(path: str, field: str) -> Table:
    """A file of an image, or those of a folder, sorted: paths, in the column `image`.

    Raises:
      ValueError: there is neither, or the folder holds no image.
    """
    if not (given := Path(path)).is_dir():
        if not given.is_file():
            raise ValueError(f"{field} must be an image or a folder of images, got {path}, which is neither")
        return Table(f"{field} {path}", {"image": [path]}, [1], "image")
    found = sorted(str(file) for file in given.iterdir() if file.suffix.lower() in SUFFIXES)
    if not found:
        raise ValueError(f"{field} must be a folder that holds images ({', '.join(SUFFIXES)}), got none in {path}")
    return Table(f"{field} {path}", {"image": found}, range(1, len(found) + 1), "image")


def folder(path: str, field: str) -> Table:
    """The images of a folder that holds a folder for each class: paths, sorted, and the names of their classes.

    Raises:
      ValueError: it is no folder, has none within, or one of these has no image.
    """
    try:
        inside = sorted(entry for entry in Path(path).iterdir() if entry.is_dir())
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL
        raise ValueError(f"{field} must be a folder that can be read, got {path}: {reason_of(error)}") from None
    if not inside:
        raise ValueError(f"{field} must hold a folder for each class, got none in {path}")
    images, classes = [], []
    for entry in inside:
        found = sorted(file for file in entry.iterdir() if file.suffix.lower() in SUFFIXES)
        if not found:
            raise ValueError(f"{field} must hold images ({', '.join(SUFFIXES)}) of each class, got none in {entry}")
        images += map(str, found)
        classes += [entry.name] * len(found)
    return Table(f"{field} {path}", {"image": images, "label": classes}, range(1, len(images) + 1), "image")


def of_columns(table: Table, columns: HubColumns) -> Table:
    """A data set's table with the columns `image` and `label` alone.

    Raises:
      ValueError: it lacks one of them.
    """
    found = {"image": str(columns.image), "label": columns.label or tables.label_of(table)}
    for role, name in found.items():
        if name not in table.columns:
            listed = shorten_list(table.columns)
            raise ValueError(f"data.columns.{role} must be a column of {table.name}: {listed}, got {name!r}")
    return tables.by_role(table, found)


def _pixels(value: Any, where: str, image_size: int, channels: int) -> np.ndarray:
    """`[image_size, image_size, channels]` float32 in [0, 1] of a path or an image of Pillow."""
    try:
        import PIL.Image as pillow  # of an extra, and slow to import
        import PIL.ImageOps as operations
    except ImportError:
        raise missing_library("images", "Pillow") from None
    if isinstance(value, str):
        where = value
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pillow.DecompressionBombWarning)
            image = pillow.open(value) if isinstance(value, str) else value
            image.load()
            return _scaled(operations.exif_transpose(image), image_size, channels)
    except _NotEightBits as error:
        raise ValueError(f"{where}: must be an image of 8 bits a channel, got mode {error}") from None
    except Exception as error:  # Pillow raises errors of many kinds on a damaged file
        raise ValueError(f"{where}: must be an image that can be read, got {reason_of(error)}") from None


class _NotEightBits(ValueError):
    """An image whose values are not from 0 to 255."""


def _scaled(image: "Image", image_size: int, channels: int) -> np.ndarray:
    if image.mode not in _EIGHT_BITS:
        raise _NotEightBits(image.mode)
    if "transparency" in image.info:
        image = image.convert("RGBA")
    image = image.convert(_MODES[channels])
    if image.size != (image_size, image_size):
        image = image.resize((image_size, image_size))
    return np.asarray(image, np.float32).reshape(image_size, image_size, channels) / np.float32(255)
