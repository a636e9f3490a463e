"""The laws of sources of data."""

from typing import Any

import chex
import numpy as np

from fedjax_lora.data.arrays import check_pools
from fedjax_lora.testing import examples
from fedjax_lora.testing.laws import Subject, named, same_form


def _load(subject: Subject) -> Any:
    source = subject.made({})
    return source.load(examples.tokenizer() if source.tokenizes else None, "")


def pools_are_examples_of_one_form(subject: Subject) -> None:
    """Training, test and public examples hold the same inputs, finite float32 or int32, and a label that has a name."""
    found = _load(subject)
    pools = {"train": found.train, "test": found.test} | ({} if found.public is None else {"public": found.public})
    checked, _ = check_pools(pools, found.class_names)
    same_form(pools, checked)


def images_say_their_shape(subject: Subject) -> None:
    """`image_shape` is that of the images, and None where there are none."""
    found = _load(subject)
    shape = found.train["image"].shape[1:] if "image" in found.train else None
    assert found.image_shape == shape, f"got {found.image_shape} for {shape}"


def examples_are_the_same_every_time(subject: Subject) -> None:
    """Two readings give equal arrays and one fingerprint: it is what a run is recognised by."""
    first, second = _load(subject), _load(subject)
    chex.assert_trees_all_equal((first.train, first.test, first.public), (second.train, second.test, second.public))
    assert first.fingerprint and first.fingerprint == second.fingerprint, "fingerprints differ"
    assert len(first.train["label"]) and len(first.test["label"]), "a pool is empty"
    assert np.unique(first.train["label"]).size > 1, "all training examples have one label"


LAWS = named(pools_are_examples_of_one_form, images_say_their_shape, examples_are_the_same_every_time)
