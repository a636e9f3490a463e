"""Which of a model's modules carry an adapter."""

import difflib
from collections.abc import Mapping, Sequence


def choose(names: Sequence[str], targets: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """Entries of `targets` under `names`, in the order of the names.

    Args:
      names: of the modules that shall carry an adapter.
      targets: `Model.targets`, module name -> `(n_in, n_out)`.

    Raises:
      ValueError: for a name the model does not have, with the nearest one and all that there are.
    """
    for name in names:
        if name not in targets:
            nearest = difflib.get_close_matches(name, targets, n=1, cutoff=0.0)[0]
            valid = ", ".join(targets)
            raise ValueError(f"lora.targets must be among {valid}, got {name!r} (did you mean {nearest!r}?)")
    return {name: targets[name] for name in names}
