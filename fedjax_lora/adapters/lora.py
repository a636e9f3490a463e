"""Factors of low-rank adapters: start, rank mask, scale, and merging into the frozen weights.

A module's weight is `w: [n_in, n_out]` and it computes `x @ w + s * (x @ a) @ b` with `s = alpha / r`
(Hu et al., "LoRA", arXiv 2106.09685). Factors always hold `R = max_rank` components; a smaller structural rank
is a mask over them, so that one compiled program serves every rank.
"""

import dataclasses
import zlib
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from fedjax_lora.adapters.patterns import is_expression
from fedjax_lora.core.learning import Adapter, Site
from fedjax_lora.core.mapping import Mapped
from fedjax_lora.core.methods import Context, Method
from fedjax_lora.core.numbers import Options, traced
from fedjax_lora.core.types import Adapters, Base, Factors
from fedjax_lora.ops import primitives
from fedjax_lora.ops.factorise import orthonormal, qr


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters.

    max_rank: components that the factors hold, R; a shape, as are the targets. The other numbers are traced.
    rank: structural rank r, 1 <= r <= R.
    alpha: products are scaled by alpha / r.
    targets: names of the modules that carry an adapter: the model's own, or as PEFT's `target_modules` has them.
    init_scale: length of the columns of `a` at the start.
    rank_pattern: ranks of single modules, at most R, as PEFT has them: a module's name in the bare model, its end from
      a dot on, or a regular expression of either -> its rank. Of several that match one, the first counts.
    alpha_pattern: alphas of single modules, in the same way.
    client_ranks: structural ranks that the clients are dealt in turn; () gives `rank` to all. None is above
      `rank`, by which products are scaled for all. A layer of fewer components has these.
    initial: a folder of adapters to start from, which PEFT wrote or `fedjax-lora export`; their rank is at most `rank`.
      Their task head is taken too, where it fits.
    """

    max_rank: int = 8
    rank: int = traced(8)
    alpha: float = traced(16.0)
    targets: tuple[str, ...] = ("query", "value")
    rank_pattern: Mapped = dataclasses.field(default_factory=Mapped)
    alpha_pattern: Mapped = dataclasses.field(default_factory=Mapped)
    init_scale: float = traced(1.0)
    client_ranks: tuple[int, ...] = traced(())
    initial: str | None = None

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
        self._check_patterns()
        if not 0 < self.init_scale < float("inf"):
            raise ValueError(f"init_scale must be positive and finite, got {self.init_scale}")
        if self.initial == "":
            raise ValueError("initial must be a folder, got ''")

    def _check_patterns(self) -> None:
        for field in ("rank_pattern", "alpha_pattern"):
            if bad := next((name for name in getattr(self, field) if not is_expression(name)), None):
                raise ValueError(f"{field} must have names or regular expressions as its keys, got {bad!r}")
        for name, rank in self.rank_pattern.items():
            if type(rank) is not int or not 1 <= rank <= self.max_rank:
                allowed = f"ranks from 1 to max_rank = {self.max_rank}"
                raise ValueError(f"rank_pattern must have {allowed}, got {rank!r} for {name!r}")
        for name, alpha in self.alpha_pattern.items():
            if type(alpha) not in (int, float) or not 0 < alpha < float("inf"):
                raise ValueError(f"alpha_pattern must have positive and finite numbers, got {alpha!r} for {name!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraAdapterOptions(Options):
    """Low-rank factors; their numbers are those of `LoraConfig`."""

    name: Literal["lora"] = "lora"


def make(options: LoraAdapterOptions, context: Context) -> Adapter:
    """LoRA as what is trained beside the frozen matrices; the leaves of a module are its Factors."""
    del options, context
    return Adapter(init=init, effective=fold, project=project, merge=products)


METHOD = Method("adapter", "lora", LoraAdapterOptions, make)


def init(
    key: Array, sites: Mapping[str, Site], num_layers: int, max_rank: int, init_scale: ArrayLike = 1.0
) -> dict[str, Factors]:
    """Factors at the start: `a` with orthogonal columns of length `init_scale`, `b` zero.

    A module's factors depend on its name and on no other module, and differ from layer to layer.

    Args:
      key: consumed.
      sites: module name -> where it sits.
      num_layers: L.
      max_rank: R, at most the smallest n_in.
      init_scale: length of each column of `a`.

    Returns:
      module name -> Factors, `a: [L, n_in, R]`, `b: [L, R, n_out]`, float32.
    """
    narrowest = min(site.n_in for site in sites.values())
    if max_rank > narrowest:
        raise ValueError(f"lora.max_rank must be at most {narrowest}, the narrowest module's input, got {max_rank}")

    def factors(name: str, site: Site) -> Factors:
        module_key = jax.random.fold_in(key, zlib.crc32(name.encode()))
        a = orthonormal(module_key, (num_layers, site.n_in, max_rank))
        return Factors(a=jnp.asarray(init_scale) * a, b=jnp.zeros((num_layers, max_rank, site.n_out)))

    return {name: factors(name, site) for name, site in sites.items()}


def start_from(
    fresh: Mapping[str, Factors], given: Mapping[str, Factors], ranks: Mapping[str, ArrayLike], scale: ArrayLike
) -> dict[str, Factors]:
    """Factors that compute what given ones do, with what is left of the R components as new ones, which add nothing.

    The new columns of `a` are orthogonal to the given ones and to one another, as long as those of `fresh`, and their
    `b` is zero.

    Args:
      fresh: of `init`.
      given: module name -> `a: [L, n_in, r]` and `b: [L, r, n_out]` of scale 1, r <= R.
      ranks: module name -> `[L]`: how many of the r components each layer has.
      scale: s = alpha / r, by which products will be scaled.
    """

    def filled(new: Factors, own: Factors, rank: Array) -> Factors:
        most, used = new.a.shape[-1], own.a.shape[-1]
        is_own = (jnp.arange(most) < rank[:, None])[:, None]
        a = jnp.where(is_own, jnp.pad(own.a, ((0, 0), (0, 0), (0, most - used))), new.a)
        others = jnp.linalg.norm(new.a, axis=1, keepdims=True) * qr(a)[0]
        return Factors(
            a=jnp.where(is_own, a, others), b=jnp.pad(own.b, ((0, 0), (0, most - used), (0, 0))) / jnp.asarray(scale)
        )

    return {name: filled(fresh[name], own, jnp.asarray(ranks[name])) for name, own in given.items()}


def max_rank(adapters: Adapters) -> int:
    """R, the static rank that the factors are stored at."""
    return next(iter(adapters.modules.values())).a.shape[-1]


def rank_mask(rank: Array | float, max_rank: int) -> Array:
    """`[R]` float32: 1 for the first `rank` components, 0 for the others; `rank` may be traced."""
    return (jnp.arange(max_rank) < rank).astype(jnp.float32)


def effective(adapters: Adapters, rank_mask: Array, scale: ArrayLike) -> Adapters:
    """Adapters as a model takes them: masked components are zero, and `b` carries the scale.

    A masked component has no effect, and the gradient to its two factors is zero.

    Args:
      adapters: what is trained.
      rank_mask: `[R]`.
      scale: s = alpha / r.
    """
    return Adapters(modules=fold(adapters.modules, rank_mask, scale), head=adapters.head)


def fold(modules: Mapping[str, Factors], rank_mask: Array, scale: ArrayLike) -> dict[str, Factors]:
    """The factors of `effective`, by module."""
    return {
        name: Factors(a=factors.a * rank_mask, b=factors.b * (scale * rank_mask[:, None]))
        for name, factors in modules.items()
    }


def project(x: Array, w: Array, adapters: Mapping[str, tuple[int, Factors]]) -> Array:
    """`x @ w` with `(x @ a) @ b` added in the columns of each module.

    The factors of all modules are laid side by side, so that each product is taken once, and go through one backward
    rule, see `ops.primitives.project`.

    Args:
      x: `[..., n_in]`.
      w: `[n_in, columns]` of one layer, as it is or packed.
      adapters: module name -> the first of its columns, and its effective factors of this layer.
    """
    return primitives.project(x, w, _side_by_side(adapters, w.shape[-1]))


def _side_by_side(adapters: Mapping[str, tuple[int, Factors]], columns: int) -> Factors | None:
    """One pair of factors for all the modules: each b is padded to the columns of its own; None for no module."""
    if not adapters:
        return None
    parts = []
    for first, factors in adapters.values():
        after = columns - first - factors.b.shape[-1]
        parts.append(Factors(a=factors.a, b=jnp.pad(factors.b, ((0, 0), (first, after)))))
    return Factors(a=jnp.concatenate([p.a for p in parts], 1), b=jnp.concatenate([p.b for p in parts], 0))


def products(modules: Mapping[str, Factors]) -> dict[str, Array]:
    """Module name -> `a @ b`, `[L, n_in, n_out]`, of effective factors."""
    return {name: jnp.einsum("lir,lro->lio", f.a, f.b) for name, f in modules.items()}


def merge(base: Base, adapters: Adapters, sites: Mapping[str, Site]) -> Base:
    """Frozen weights with the products `a @ b` of effective adapters added, see `add_to_base`."""
    return add_to_base(base, products(adapters.modules), sites)


def add_to_base(base: Base, changes: Mapping[str, Array], sites: Mapping[str, Site]) -> Base:
    """Frozen weights with the changes of their modules added, in the dtype of the weights.

    Args:
      base: of the model whose `sites` are given.
      changes: module name -> `[L, n_in, n_out]`.
      sites: `Model.sites`.

    Raises:
      ValueError: a module has no site, or a change is not of its site's shape.
    """
    layers = dict(base["layers"])
    for name, change in changes.items():
        if name not in sites:
            raise ValueError(f"changes must be of the model's sites, {', '.join(sites)}, got {name!r}")
        site = sites[name]
        group = layers[site.group]
        w, stop = group["w"], site.first + site.n_out
        place = w[:, :, site.first : stop].shape
        if not change.shape == place == (w.shape[0], site.n_in, site.n_out):
            raise ValueError(
                f"the change of {name} must be of its site's shape, {(w.shape[0], site.n_in, site.n_out)}, got "
                f"{change.shape} for {place} of {site.group}"
            )
        columns = site.first, w.shape[-1] - stop
        # Not an update of a slice, for which a compiler gathers a matrix whose columns are split over devices.
        merged = (w.astype(jnp.float32) + jnp.pad(change, ((0, 0), (0, 0), columns))).astype(w.dtype)
        layers[site.group] = {**group, "w": merged}
    return {**base, "layers": layers}
