"""Which of a model's modules carry an adapter."""

import difflib
import re
from collections.abc import Mapping, Sequence

from fedjax_lora.core.learning import Site


def choose(names: Sequence[str], sites: Mapping[str, Site], num_layers: int) -> dict[str, Site]:
    """The entries of `sites` that are named, in the order of the names and, under one name, of the model.

    A name is that of a site or of its role, or else what PEFT takes for `target_modules`: the end of a module's path in
    the checkpoint, from a dot on; `all-linear`; or a regular expression that matches the whole path.

    Args:
      names: of the modules that shall carry an adapter.
      sites: `Model.sites`.
      num_layers: L.

    Raises:
      ValueError: for a name the model does not have, with the nearest one and all that there are; or for one that is of
        some layers alone.
    """
    found: dict[str, Site] = {}
    for name in names:
        chosen = [name] if name in sites else [key for key, site in sites.items() if name in site.roles]
        chosen = chosen or _by_path(name, sites, num_layers)
        if not chosen:
            nearest = difflib.get_close_matches(name, sites, n=1, cutoff=0.0)[0]
            valid = ", ".join(sites)
            raise ValueError(f"lora.targets must be among {valid}, got {name!r} (did you mean {nearest!r}?)")
        found |= {site: sites[site] for site in chosen}
    return found


def _by_path(name: str, sites: Mapping[str, Site], num_layers: int) -> list[str]:
    """Sites by a name as PEFT takes it."""
    if name.lower() == "all-linear":
        return list(sites)
    sources = {key: site.source for key, site in sites.items() if site.source}
    paths = {key: [source.format(layer=layer) for layer in range(num_layers)] for key, source in sources.items()}
    ends = {key: [f".{path}".endswith(f".{name}") for path in of_site] for key, of_site in paths.items()}
    if any(map(any, ends.values())):
        return _in_all_layers(name, ends)
    try:
        pattern = re.compile(name)
    except re.error:
        return []
    return _in_all_layers(name, {key: [bool(pattern.fullmatch(path)) for path in of] for key, of in paths.items()})


def _in_all_layers(name: str, matches: Mapping[str, Sequence[bool]]) -> list[str]:
    """Sites that match in every layer.

    Raises:
      ValueError: for one that matches in some of them.
    """
    for site, in_layer in matches.items():
        if any(in_layer) and not all(in_layer):
            raise ValueError(
                f"lora.targets must name a module of all layers, got {name!r}, which matches {site!r} in "
                f"{sum(in_layer)} of {len(in_layer)}"
            )
    return [site for site, in_layer in matches.items() if all(in_layer)]
