"""The digits that come with scikit-learn, 8x8 images, in a fixed split."""

import numpy as np

from fedjax_lora.data.examples import Examples, gather

# The split of the digits is part of the data set: every experiment, whatever its seed, sees the same one.
_DIGITS_SEED = 2024
_DIGITS_TEST_SHARE = 0.2
_DIGITS_PUBLIC_SHARE = 0.45
_DIGITS_PUBLIC_CLASSES = range(5)


def load() -> Examples:
    """The 1,797 digits of scikit-learn, split once and for all.

    Of each class a fifth is held out for testing; of what is left, 45 % of the classes 0-4 is public. So a model
    that was pre-trained on the public part has yet to learn the classes 5-9.
    """
    from sklearn.datasets import load_digits  # here, since a run on text should not wait for scikit-learn

    images, labels = load_digits(return_X_y=True)
    images = (np.asarray(images).reshape(-1, 8, 8, 1) / 16).astype(np.float32)
    labels = np.asarray(labels).astype(np.int32)

    generator = np.random.default_rng(_DIGITS_SEED)
    rows: dict[str, list[np.ndarray]] = {"test": [], "public": [], "train": []}
    for label in range(10):
        shuffled = generator.permutation(np.flatnonzero(labels == label))
        num_test = round(_DIGITS_TEST_SHARE * len(shuffled))
        public_share = _DIGITS_PUBLIC_SHARE if label in _DIGITS_PUBLIC_CLASSES else 0.0
        num_public = round(public_share * (len(shuffled) - num_test))
        parts = np.split(shuffled, [num_test, num_test + num_public])
        for part, members in zip(rows, parts, strict=True):
            rows[part].append(members)

    def pool(part: str) -> dict[str, np.ndarray]:
        index = np.sort(np.concatenate(rows[part]))
        return {"image": images[index], "label": labels[index]}

    return gather(
        "digits",
        pool("train"),
        pool("test"),
        tuple(str(label) for label in range(10)),
        public=pool("public"),
        image_shape=(8, 8, 1),
    )
