"""Arrays from Python as a data source: what they become, and one clear line for each thing that is wrong."""

import numpy as np
import pytest

from fedjax_lora.core.methods import Context
from fedjax_lora.data import sources

CONTEXT = Context(num_clients=1, cohort_size=1)
NAMES = ("no", "yes", "maybe")


def images(count=4, dtype=np.float64, shape=(5, 6, 2), **more):
    image = np.random.default_rng(count).uniform(size=(count, *shape)).astype(dtype)
    return {"image": image, "label": np.arange(count) % 3, **more}


def text(count=4, length=5, **more):
    mask = (np.arange(length) <= np.arange(count)[:, None]).astype(np.int64)
    return {"input_ids": mask * 7, "attention_mask": mask, "label": [i % 3 for i in range(count)], **more}


def load(method):
    source = method.make(method.options(), CONTEXT)
    assert not source.tokenizes
    return source.load(None, "")


def arrays(train, test=None, **more):
    return sources.arrays("mine", train=train, test=train if test is None else test, class_names=NAMES, **more)


def test_images_are_what_was_given_as_float32_invariance():
    train, test, public = images(6), images(3), images(5)
    method = arrays(train, test, public=public)
    assert (method.slot, method.name, method.options().source) == ("data", "mine", "mine")
    examples = load(method)
    assert examples.name == "mine" and examples.class_names == NAMES and examples.image_shape == (5, 6, 2)
    for given, found in ((train, examples.train), (test, examples.test), (public, examples.public)):
        assert found is not None and found["image"].dtype == np.float32 and found["label"].dtype == np.int32
        np.testing.assert_array_equal(found["image"], given["image"].astype(np.float32))
        np.testing.assert_array_equal(found["label"], given["label"])
    assert (examples.truncated, examples.tokenizer_hash) == (0, "")
    assert load(arrays(train, test)).public is None


def test_later_changes_of_the_arrays_do_not_reach_the_examples_invariance():
    train = images(dtype=np.float32)
    method, before = arrays(train), train["image"].copy()
    train["image"][:] = 0
    np.testing.assert_array_equal(load(method).train["image"], before)


def test_a_file_that_is_mapped_stays_mapped(tmp_path):
    """Oracle: the memory is that of the file."""
    np.save(tmp_path / "image.npy", np.ones((4, 8, 8, 1), np.float32))
    image = np.load(tmp_path / "image.npy", mmap_mode="r")
    train = {"image": image, "label": np.array([0, 1, 0, 1])}
    assert np.shares_memory(load(arrays(train)).train["image"], image)


def test_the_fingerprint_is_of_content_and_names_counting():
    train = images()
    other = {**train, "image": train["image"] + 1e-3}
    renamed = sources.arrays("mine", train=train, test=train, class_names=("a", "b", "c"))
    found = [load(arrays(train)), load(arrays(other)), load(arrays(train, other)), load(renamed)]
    assert len({examples.fingerprint for examples in found}) == 4
    single = {**train, "image": train["image"].astype(np.float32)}
    assert load(arrays(single)).fingerprint == found[0].fingerprint


def test_ids_and_mask_are_text_and_other_inputs_serve_a_model_of_ones_own():
    examples = load(arrays(text(), text(2)))
    assert examples.image_shape is None and examples.train["input_ids"].dtype == np.int32
    tabular = {"features": np.ones((4, 3)), "label": [0, 1, 2, 0]}
    assert load(arrays(tabular)).image_shape is None


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({}, "train must be a mapping with label and at least one input, got nothing"),
        ({"label": [0, 1]}, "train must be a mapping with label and at least one input, got label"),
        ([1, 2], "train must be a mapping with label and at least one input, got list"),
        (images(label=[0, 1, 3, 0]), "train/label must be from 0 to 2, one for each of class_names, got 3"),
        (images(label=[0, -1, 1, 0]), "train/label must be from 0 to 2, one for each of class_names, got -1"),
        (images(label=[0.0, 1.0, 1.0, 0.0]), "train/label must be [N] integers, at least one, got [4] of float32"),
        (images(label=[[0], [1]]), "train/label must be [N] integers, at least one, got [2, 1] of int32"),
        (images(0), "train/label must be [N] integers, at least one, got [0] of int32"),
        (images(label=["no", "yes"]), "train/label must be an array [N, ...] of floats or integers, got [2] of <U3"),
        (images(label=[0, 1]), "train/image must have 2 rows, as label has, got [4, 5, 6, 2]"),
        (images(label=[2**40] * 4), "train/label must fit int32, got 1099511627776"),
        (images(image=np.full((4, 5, 6, 2), np.nan)), "train/image must be finite in float32, got nan"),
        (images(image=np.full((4, 5, 6, 2), 1e39)), "train/image must be finite in float32, got inf"),
        (
            images(image=np.ones((4, 5, 6))),
            "train/image must be [N, height, width, channels] floats, got [4, 5, 6] of ",
        ),
        (
            images(dtype=np.uint8),
            "train/image must be [N, height, width, channels] floats, got [4, 5, 6, 2] of int32",
        ),
        (images(more=[[1], [1, 2]]), "train/more must be an array [N, ...] of floats or integers, got [] of object"),
        (images(**text()), "train must hold an image or input_ids, got both"),
        ({"input_ids": [[1]], "label": [0]}, "train must hold both input_ids and attention_mask, got input_ids, label"),
        (
            text(input_ids=np.ones((4, 5))),
            "train/input_ids must be [N, S] integers, as input_ids, got [4, 5] of float32",
        ),
        (text(input_ids=-np.ones((4, 5), int)), "train/input_ids must not be negative, got -1"),
        (
            text(attention_mask=np.ones((4, 3), int)),
            "train/attention_mask must be [N, S] integers, as input_ids, got [4, 3] of int32",
        ),
        (text(attention_mask=np.zeros((4, 5), int)), "train/attention_mask must be 1 and 0 with a 1 in each row"),
        (text(attention_mask=np.full((4, 5), 2)), "train/attention_mask must be 1 and 0 with a 1 in each row"),
    ],
)
def test_what_is_wrong_is_one_line_that_names_the_array(train, message):
    with pytest.raises(ValueError) as caught:
        arrays(train)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("test", "message"),
    [
        (images(2, more=[1, 2]), "test must hold image, label, as train does, got image, label, more"),
        (
            images(2, shape=(6, 5, 2)),
            "test/image must be [N, 5, 6, 2] of float32, as in train, got [N, 6, 5, 2] of float32",
        ),
        (images(2, label=[0, 3]), "test/label must be from 0 to 2, one for each of class_names, got 3"),
    ],
)
def test_parts_must_be_of_one_form(test, message):
    for more in ({"test": test}, {"public": test}):
        with pytest.raises(ValueError) as caught:
            arrays(images(), **more)
        assert str(caught.value) == message.replace("test", next(iter(more)))


@pytest.mark.parametrize("names", [(), ("one",), "ab", ("a", "a"), ("a", ""), (1, 2)])
def test_class_names_are_two_or_more_different_ones(names):
    with pytest.raises(ValueError, match=r"^class_names must be two or more different names, got "):
        sources.arrays("mine", train=images(), test=images(), class_names=names)


def test_a_name_is_ones_own_and_the_options_hold_to_it():
    for name in ("", "digits", "tsv"):
        with pytest.raises(ValueError, match=r"^name must be one that no other source has, got"):
            sources.arrays(name, train=images(), test=images(), class_names=NAMES)
    options = arrays(images()).options
    assert options() == options(source="mine") and hash(options()) == hash(options())
    with pytest.raises(ValueError, match=r"^source must be 'mine', got 'yours'$"):
        options(source="yours")


def test_the_packages_own_sources_say_whether_they_need_a_tokenizer():
    """Oracle: `load` itself."""
    names = ["digits", "tsv", "csv", "jsonl", "parquet", "datasets", "images"]
    assert [method.name for method in sources.METHODS] == names
    digits, tsv = (method.make for method in sources.METHODS[:2])
    source = digits(sources.DataConfig(), CONTEXT)
    assert not source.tokenizes
    assert source.load(None, "").fingerprint == sources.load(sources.DataConfig()).fingerprint
    source = tsv(sources.DataConfig(source="tsv", train="a", test="b"), CONTEXT)
    assert source.tokenizes
    with pytest.raises(ValueError, match=r"^data\.source must be one of images for a model without a tokenizer"):
        source.load(None, "")


def test_targets_and_clients_are_read_and_a_task_that_needs_targets_says_so():
    """By hand: texts and integers as clients, and targets of floats and of positions."""
    train = text(target=np.where(np.eye(4, 5, dtype=int) > 0, 3, -100), client=["b", "a", "b", "c"])
    method = sources.arrays(
        "mine", train=train, test=text(2, target=np.zeros((2, 5), int)), class_names=["one", "x", "y"]
    )
    source = method.make(method.options(), CONTEXT)
    examples = source.load(None, "", "next_token")
    assert examples.client_names == ("a", "b", "c") and examples.clients is not None
    np.testing.assert_array_equal(examples.clients, [1, 0, 1, 2])
    np.testing.assert_array_equal(examples.train["target"], train["target"])
    assert "client" not in examples.train
    numbers = images(target=[0.5, 1, 2, 3], label=[0] * 4, client=[10, 9, 9, 10])
    method = sources.arrays("mine", train=numbers, test=numbers, class_names=["all"])
    examples = method.make(method.options(), CONTEXT).load(None, "", "number")
    assert examples.client_names == ("9", "10") and examples.train["target"].dtype == np.float32
    plain = arrays(text())
    with pytest.raises(ValueError, match=r"^train must hold target for a task that learns number, got input_ids, "):
        plain.make(plain.options(), CONTEXT).load(None, "", "number")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"client": [1, 2]}, r"^train/client must be \[4\] integers or texts, got \[2\] of int64$"),
        ({"client": [0.5] * 4}, r"^train/client must be \[4\] integers or texts, got \[4\] of float64$"),
        ({"target": np.zeros((4, 3), int)}, r"^train/target must be \[4, 5\] integers, as input_ids, got \[4, 3\]$"),
        ({"target": np.full((4, 5), -1)}, r"^train/target must be -100 or not negative, got -1$"),
    ],
)
def test_targets_and_clients_that_are_wrong_are_one_line(more, message):
    with pytest.raises(ValueError, match=message):
        arrays(text(**more))


@pytest.mark.parametrize(
    ("learns", "target", "message"),
    [
        ("number", np.arange(4), "target must be [N] floats for a task that learns number, got [4] of int32"),
        ("number", np.ones((4, 1)), "target must be [N] floats for a task that learns number, got [4, 1] of float32"),
        (
            "token_label",
            np.ones((4, 6)),
            "target must be [N, S] integers for a task that learns token_label, got [4, 6] of float32",
        ),
        (
            "next_token",
            np.arange(4),
            "target must be [N, S] integers for a task that learns next_token, got [4] of int32",
        ),
        (
            "token_label",
            np.full((4, 6), 3),
            "target must be -100 or from 0 to 2, one for each of class_names, got 3",
        ),
    ],
)
def test_a_target_is_of_the_form_that_is_learned(learns, target, message):
    """The message names the array; a class needs no target, so that any is passed over."""
    good = np.zeros((4, 6), int) if target.ndim == 2 and target.dtype.kind == "i" else target
    for part in ("train", "test"):
        parts = {"train": images(target=good), "test": images(target=good)} | {part: images(target=target)}
        method = arrays(parts["train"], parts["test"])
        source = method.make(method.options(), CONTEXT)
        source.load(None, "", "label")
        with pytest.raises(ValueError) as caught:
            source.load(None, "", learns)
        assert str(caught.value).endswith(message) and "\n" not in str(caught.value)
