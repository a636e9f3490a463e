"""Folders of images: values and classes by hand, scaling against Pillow itself, and one line for each that is wrong."""

import numpy as np
import pytest
from PIL import Image

from fedjax_lora.data.options import ImagesConfig
from fedjax_lora.data.sources import load


@pytest.fixture
def folders(tmp_path):
    """Writes images to `part/class/name` and gives the options that name the two parts."""

    def write(images, **options):
        for name, image in images.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(image, bytes):
                path.write_bytes(image)
            else:
                image.save(path)
        return ImagesConfig(train=str(tmp_path / "train"), test=str(tmp_path / "test"), **{"image_size": 4, **options})

    return write


def noise(seed, size=(4, 4), mode="RGB"):
    shape = (size[1], size[0]) if mode == "L" else (size[1], size[0], len(mode))
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, np.uint8), mode=None)


def test_folders_are_classes_and_pixels_are_shares_of_255_closed_form(folders):
    given = {
        "train/no/a.png": noise(0),
        "train/yes/b.PNG": noise(1),
        "train/yes/c.bmp": noise(2),
        "test/yes/d.png": noise(3),
    }
    examples = load(folders({**given, "train/yes/notes.txt": b"no image"}))
    assert examples.class_names == ("no", "yes") and examples.image_shape == (4, 4, 3)
    np.testing.assert_array_equal(examples.train["label"], [0, 1, 1])
    np.testing.assert_array_equal(examples.test["label"], [1])
    expected = [np.asarray(image, np.float32) / np.float32(255) for image in given.values()]
    np.testing.assert_array_equal(examples.train["image"], expected[:3])
    np.testing.assert_array_equal(examples.test["image"], expected[3:])
    assert examples.train["image"].dtype == np.float32 and examples.train["label"].dtype == np.int32


def test_classes_that_are_numbers_are_in_their_order(folders):
    images = {f"{part}/{label}/a.png": noise(0) for part in ("train", "test") for label in (10, 9, 2)}
    assert load(folders(images)).class_names == ("2", "9", "10")


@pytest.mark.parametrize("channels", [1, 3])
def test_sizes_and_channels_are_those_asked_for_pillow(folders, channels):
    """Against Pillow's own conversion and scaling; transparency is dropped after a palette is resolved."""
    wide, gray, clear = noise(0, (9, 6)), noise(1, (5, 7), "L"), noise(2, (4, 4), "RGBA")
    images = {"train/a/1.png": wide, "train/b/2.png": gray, "train/b/3.png": clear, "test/a/4.png": wide}
    examples = load(folders(images, channels=channels))
    mode = {1: "L", 3: "RGB"}[channels]
    for found, image in zip(examples.train["image"], (wide, gray, clear), strict=True):
        scaled = image.convert(mode)
        scaled = scaled if scaled.size == (4, 4) else scaled.resize((4, 4))
        np.testing.assert_array_equal(found, np.asarray(scaled, np.float32).reshape(4, 4, channels) / np.float32(255))


def test_a_photo_is_turned_as_its_exif_says_closed_form(folders):
    """Orientation 6 of Exif: a quarter turn clockwise."""
    image, exif = noise(0), Image.Exif()
    exif[0x0112] = 6
    config = folders({"train/a/1.png": image, "train/b/2.png": noise(1), "test/a/3.png": image})
    image.save(str(config.test) + "/a/3.png", exif=exif)
    examples = load(config)
    np.testing.assert_array_equal(examples.test["image"][0], np.rot90(examples.train["image"][0], -1))


def test_what_is_wrong_is_one_line_that_names_it(folders, tmp_path):
    good = {"train/a/1.png": noise(0), "train/b/2.png": noise(1), "test/a/3.png": noise(2)}
    deep = Image.fromarray(np.zeros((4, 4), np.uint16))
    for images, message in (
        (
            {"train/b/cut.png": b"\x89PNG\r\n\x1a\n and no more"},
            "train/b/cut.png: must be an image that can be read, got",
        ),
        ({"train/b/cut.png": b""}, "train/b/cut.png: must be an image that can be read, got"),
        ({"train/b/deep.png": deep}, "train/b/deep.png: must be an image of 8 bits a channel, got mode I;16"),
        ({"test/z/4.png": noise(3)}, "must be a label of data.train, 'a, b', got 'z'"),
        ({"train/c/readme.txt": b"none"}, f"got none in {tmp_path / 'train' / 'c'}"),
    ):
        for path in tmp_path.rglob("*.*"):
            path.unlink()
        for path in (tmp_path / "test" / "z", tmp_path / "train" / "c"):
            if path.is_dir():
                path.rmdir()
        with pytest.raises(ValueError) as caught:
            load(folders({**good, **images}))
        assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_that_is_missing_or_empty_is_one_line(folders, tmp_path):
    (tmp_path / "test").mkdir()
    with pytest.raises(ValueError, match=r"^data\.train must be a folder that can be read, got .*train: No such file"):
        load(folders({}))
    with pytest.raises(ValueError, match=r"^data\.test must hold a folder for each class, got none in .*test$"):
        load(folders({"train/a/1.png": noise(0)}))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"train": None}, r"^train must be the path of a folder when source is images, got None$"),
        ({"channels": 4}, r"^channels must be 1 or 3, got 4$"),
        ({"image_size": 0}, r"^image_size must be at least 1, got 0$"),
    ],
)
def test_config_errors_name_field_value_and_range(fields, message):
    with pytest.raises(ValueError, match=message):
        ImagesConfig(**{"train": "a", "test": "b", **fields})
