"""Which of a model's modules carry an adapter."""

import difflib
from collections.abc import Mapping, Sequence

from fedjax_lora.core.learning import Site


def choose(names: Sequence[str], sites: Mapping[str, Site]) -> dict[str, Site]:
    """Entries of `sites` under `names`, in the order of the names.

    Args:
      names: of the modules that shall carry an adapter.
      sites: `Model.sites`.

    Raises:
      ValueError: for a name the model does not have, with the nearest one and all that there are.
    """
    for name in names:
        if name not in sites:
            nearest = difflib.get_close_matches(name, sites, n=1, cutoff=0.0)[0]
            valid = ", ".join(sites)
            raise ValueError(f"lora.targets must be among {valid}, got {name!r} (did you mean {nearest!r}?)")
    return {name: sites[name] for name in names}
