"""Factors of low-rank adapters: start, rank mask, scale, and merging into the frozen weights.

A module's weight is `w: [n_in, n_out]` and it computes `x @ w + s * (x @ a) @ b` with `s = alpha / r`
(Hu et al., "LoRA", arXiv 2106.09685). Factors always hold `R = max_rank` components; a smaller structural rank
is a mask over them, so that one compiled program serves every rank.
"""

import dataclasses
import zlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import Array

from fedjax_lora.core.types import Adapters, Base, Factors
from fedjax_lora.ops.factorise import orthonormal


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters.

    max_rank: components that the factors hold, R.
    rank: structural rank r, 1 <= r <= R.
    alpha: products are scaled by alpha / r.
    targets: names of the modules that carry an adapter.
    init_scale: length of the columns of `a` at the start.
    client_ranks: structural ranks that the clients are dealt in turn; () gives `rank` to all. None is above
      `rank`, by which products are scaled for all.
    """

    max_rank: int = 8
    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("query", "value")
    init_scale: float = 1.0
    client_ranks: tuple[int, ...] = ()

    def __post_init__(self):
        if self.max_rank < 1:
            raise ValueError(f"max_rank must be at least 1, got {self.max_rank}")
        if not 1 <= self.rank <= self.max_rank:
            raise ValueError(f"rank must be from 1 to max_rank = {self.max_rank}, got {self.rank}")
        if not all(1 <= rank <= self.rank for rank in self.client_ranks):
            raise ValueError(f"client_ranks must be from 1 to rank = {self.rank}, got {self.client_ranks}")
        if not 0 < self.alpha < float("inf"):
            raise ValueError(f"alpha must be positive and finite, got {self.alpha}")
        if not self.targets:
            raise ValueError("targets must name at least one module, got ()")
        if len(set(self.targets)) < len(self.targets):
            raise ValueError(f"targets must name each module once, got {self.targets}")
        if not 0 < self.init_scale < float("inf"):
            raise ValueError(f"init_scale must be positive and finite, got {self.init_scale}")


def init(
    key: Array, targets: Mapping[str, tuple[int, int]], num_layers: int, max_rank: int, init_scale: float = 1.0
) -> dict[str, Factors]:
    """Factors at the start: `a` with orthogonal columns of length `init_scale`, `b` zero.

    A module's factors depend on its name and on no other module, and differ from layer to layer.

    Args:
      key: consumed.
      targets: module name -> `(n_in, n_out)`.
      num_layers: L.
      max_rank: R, at most the smallest n_in.
      init_scale: length of each column of `a`.

    Returns:
      module name -> Factors, `a: [L, n_in, R]`, `b: [L, R, n_out]`, float32.
    """
    narrowest = min(n_in for n_in, _ in targets.values())
    if max_rank > narrowest:
        raise ValueError(f"lora.max_rank must be at most {narrowest}, the narrowest module's input, got {max_rank}")

    def factors(name: str, n_in: int, n_out: int) -> Factors:
        module_key = jax.random.fold_in(key, zlib.crc32(name.encode()))
        a = orthonormal(module_key, (num_layers, n_in, max_rank))
        return Factors(a=init_scale * a, b=jnp.zeros((num_layers, max_rank, n_out)))

    return {name: factors(name, *shape) for name, shape in targets.items()}


def max_rank(adapters: Adapters) -> int:
    """R, the static rank that the factors are stored at."""
    return next(iter(adapters.modules.values())).a.shape[-1]


def rank_mask(rank: Array | float, max_rank: int) -> Array:
    """`[R]` float32: 1 for the first `rank` components, 0 for the others; `rank` may be traced."""
    return (jnp.arange(max_rank) < rank).astype(jnp.float32)


def effective(adapters: Adapters, rank_mask: Array, scale: Array | float) -> Adapters:
    """Adapters as a model takes them: masked components are zero, and `b` carries the scale.

    A masked component has no effect, and the gradient to its two factors is zero.

    Args:
      adapters: what is trained.
      rank_mask: `[R]`.
      scale: s = alpha / r.
    """

    def fold(factors: Factors) -> Factors:
        return Factors(a=factors.a * rank_mask, b=factors.b * (scale * rank_mask[:, None]))

    modules = {name: fold(factors) for name, factors in adapters.modules.items()}
    return Adapters(modules=modules, head=adapters.head)


def merge(base: Base, adapters: Adapters, targets: Mapping[str, tuple[int, int]]) -> Base:
    """Frozen weights with the products `a @ b` of effective adapters added, see `add_to_base`."""
    products = {name: jnp.einsum("lir,lro->lio", f.a, f.b) for name, f in adapters.modules.items()}
    return add_to_base(base, products, targets)


def add_to_base(base: Base, changes: Mapping[str, Array], targets: Mapping[str, tuple[int, int]]) -> Base:
    """Frozen weights with the changes of their modules added, in the dtype of the weights.

    `base["layers"]` names a stacked matrix `w: [L, n_in, n_out]` after the module it serves; where one matrix
    serves several modules side by side it is named after them all, joined by `_` (`query_key_value`).

    Args:
      base: of the model whose `targets` are given.
      changes: module name -> `[L, n_in, n_out]`.
      targets: `Model.targets`, all of them.
    """
    layers = dict(base["layers"])
    for group in layers:
        start = 0
        for name in (part for part in group.split("_") if part in targets):
            stop = start + targets[name][1]
            if name in changes:
                w = layers[group]["w"]
                merged = w.astype(jnp.float32).at[:, :, start:stop].add(changes[name]).astype(w.dtype)
                layers[group] = {**layers[group], "w": merged}
            start = stop
    return {**base, "layers": layers}
