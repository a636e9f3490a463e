"""Ranks and scales that differ from layer to layer, by patterns of the modules' names.

Factors hold R components in every layer; of those that a layer does not have, both factors are zero from the start.
There the gradients of both are zero too, so that they are never trained, and every average of them is zero;
`Scope.layer_ranks` keeps them from being counted. A layer's scale is alpha_l / r_l, as in PEFT: a share of
s = alpha / r, which b is multiplied by where a model takes the adapters.
"""

import difflib
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from fedjax_lora.adapters.lora import LoraConfig
from fedjax_lora.adapters.patterns import matching_key
from fedjax_lora.core.learning import Adapter, Site
from fedjax_lora.core.mapping import Mapped
from fedjax_lora.core.types import Factors


class LayerRanks(NamedTuple):
    """Module name -> `[L]`, of every module that carries an adapter.

    ranks: components that a layer has; `{}` where all have the structural rank.
    shares: of a layer's scale alpha_l / r_l in s = alpha / r.
    """

    ranks: Mapping[str, Any]
    shares: Mapping[str, Any]

    def scaled(self, modules: Mapping[str, Any]) -> dict[str, Any]:
        """b times the share of its layer: with the scale s these are the layers' products."""
        return {name: Factors(a=f.a, b=f.b * self._share(name)) for name, f in modules.items()}

    def unscaled(self, modules: Mapping[str, Factors]) -> dict[str, Factors]:
        """What `scaled` has made these of."""
        return {name: Factors(a=f.a, b=f.b / self._share(name)) for name, f in modules.items()}

    def _share(self, name: str) -> Array:
        return jnp.asarray(self.shares[name], jnp.float32)[:, None, None]

    def masked(self, modules: Mapping[str, Any]) -> dict[str, Any]:
        """Zero in the components that a layer does not have.

        Raises:
          ValueError: what is trained has no components.
        """
        if not self.ranks:
            return dict(modules)
        masked = {}
        for name, factors in modules.items():
            if not isinstance(factors, Factors):
                raise ValueError(f"lora.rank_pattern must be absent where adapters are no factors, got {type(factors)}")
            mask = jnp.arange(factors.a.shape[-1]) < jnp.asarray(self.ranks[name])[:, None]
            masked[name] = Factors(a=factors.a * mask[:, None, :], b=factors.b * mask[:, :, None])
        return masked

    def adapter(self, whole: Adapter) -> Adapter:
        """The adapter whose layers have these ranks and scales."""

        def init(*given: Any) -> dict[str, Any]:
            return self.masked(whole.init(*given))

        def effective(modules: Mapping[str, Any], rank_mask: Array, scale: ArrayLike) -> dict[str, Any]:
            return whole.effective(self.scaled(self.masked(modules)), rank_mask, scale)

        return whole._replace(init=init, effective=effective)


def resolve(lora: LoraConfig, sites: Mapping[str, Site], num_layers: int) -> LayerRanks | None:
    """What the patterns say of each layer; None where there are none.

    A module's name is that of the bare model in its checkpoint or, where the site names none, `layers.N.NAME`.

    Args:
      lora: with concrete or traced numbers: of concrete ones the arrays are NumPy's, float64.
      sites: of the modules that carry an adapter.
      num_layers: L.

    Raises:
      ValueError: a pattern names none of these modules.
    """
    if not lora.rank_pattern and not lora.alpha_pattern:
        return None
    sources = tuple((name, site.source or f"layers.{{layer}}.{name}") for name, site in sites.items())
    given_ranks = _given("rank_pattern", lora.rank_pattern, sources, num_layers)
    given_alphas = _given("alpha_pattern", lora.alpha_pattern, sources, num_layers)
    ranks = {name: _filled(given, lora.rank) for name, given in given_ranks.items()}
    alphas = {name: _filled(given, lora.alpha) for name, given in given_alphas.items()}
    shares = {name: (alphas[name] / ranks[name]) / (lora.alpha / lora.rank) for name in sites}
    return LayerRanks(ranks if lora.rank_pattern else {}, shares)


def structural_rank(layers: LayerRanks | None, rank: Any) -> Any:
    """The largest rank of a layer, where `rank` is that of all without a pattern."""
    if layers is None or not layers.ranks:
        return rank
    most = [jnp.max(ranks) if isinstance(ranks, Array) else np.max(ranks) for ranks in layers.ranks.values()]
    return functools.reduce(jnp.maximum if isinstance(most[0], Array) else np.maximum, most)


def _filled(given: np.ndarray, default: Any) -> Any:
    """`[L]`, the default where nothing is given."""
    if isinstance(default, int | float):
        return np.where(given > 0, given, default)
    return jnp.where(given > 0, jnp.asarray(given, jnp.float32), default)


@functools.lru_cache(maxsize=32)
def _given(field: str, pattern: Mapped, sources: tuple[tuple[str, str], ...], num_layers: int) -> dict[str, np.ndarray]:
    """Module name -> `[L]`, what a pattern says of each layer; 0 for nothing."""
    paths = {name: [source.format(layer=layer) for layer in range(num_layers)] for name, source in sources}
    every = [path for of_module in paths.values() for path in of_module]
    for key in pattern:
        if not any(matching_key({key: 0}, path) for path in every):
            near = difflib.get_close_matches(key, every, n=1, cutoff=0.0)[0]
            raise ValueError(f"lora.{field} must name modules of lora.targets, such as {near}, got {key!r}")
    found = {name: [matching_key(pattern, path) for path in of_module] for name, of_module in paths.items()}
    return {
        name: np.array([0.0 if key is None else pattern[key] for key in keys], np.float64)
        for name, keys in found.items()
    }
