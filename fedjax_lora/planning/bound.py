"""The convergence bound that a structural rank is chosen by: its terms from measured numbers. Derived in docs/bound.md.

Ours, after the three effects that B. Kim and W. Choi (arXiv 2505.00333v2, known by its abstract) name: structural rank,
sparsification, and the covariance that averaging the two factors apart leaves out. With `d_t` the average movement of
the weights without compression, `e_t` what sparsification and averaging apart change of it, phi_t the learning rate's
factor in round t, and F the sum of phi_t,

    sum phi_t ||grad f_t||^2 / F <= 2 gap / (h kappa F) + 2 L M / (h kappa) sum phi_t^2 / F
                                    + 2 / F sum (theta_s / (phi_t (h kappa)^2) + 2 L / (h kappa)) ||s E_s,t||^2
                                    + 2 / F sum (theta_c / (phi_t (h kappa)^2) + 2 L / (h kappa)) ||s Cov_t||^2.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.lax import Precision
from jax.typing import ArrayLike

from fedjax_lora.core.types import Factors
from fedjax_lora.ops.products import gram

_RANK_TOLERANCE = 1e-6  # of a Gram matrix's largest eigenvalue: directions below it are none


class Measured(NamedTuple):
    """What a pilot measures at one structural rank; any leading axes. Step and movement are those at the peak rate.

    gap: the loss at the start, an upper bound of what there is to gain, nats.
    smoothness: L, the least for which the descent lemma holds, summed over the rounds of the pilot.
    share: kappa, the share of the gradient's energy that the adapters and the head can follow, in (0, 1].
    step: h, how far a round moves along what can be followed: `-<grad f, d> / ||followed part||^2` over its factor.
    movement: M, `||d||^2` over the factor's square: signal and noise of a round's average movement, uncompressed.
    against_sparsification, against_covariance: theta, the share of an error's energy that lies against the descent,
      in [0, 1]; 1 is the worst case.
    """

    gap: Array
    smoothness: Array
    share: Array
    step: Array
    movement: Array
    against_sparsification: Array
    against_covariance: Array


class BoundTerms(NamedTuple):
    """The terms of the bound, any leading axes."""

    descent: Array
    noise: Array
    sparsification: Array
    covariance: Array

    @property
    def total(self) -> Array:
        """The bound itself: what the mean `||grad f||^2`, weighted by the factors, cannot exceed."""
        return self.descent + self.noise + self.sparsification + self.covariance


class Effects(NamedTuple):
    """The bound by cause, any leading axes: three effects, and what training itself would leave without them."""

    training: Array
    rank: Array
    sparsification: Array
    covariance: Array


def terms(measured: Measured, sparsification: ArrayLike, covariance: ArrayLike, factors: ArrayLike) -> BoundTerms:
    """The terms where the two error energies are known; infinite where training makes no progress.

    Args:
      measured: of the pilot.
      sparsification: `[T]` `||s E_s||_F^2` of each round, or one number for all; NaN is left out.
      covariance: `||s Cov||_F^2` likewise.
      factors: `[T]` phi_t, the learning rate of each round over its peak.
    """
    factors = jnp.asarray(factors, jnp.float32)
    progress, total = measured.step * measured.share, jnp.sum(factors)
    moves = progress > 0
    inverse = 1.0 / jnp.where(moves, progress, 1.0)

    def errors(against: Array, energy: ArrayLike) -> Array:
        known = ~jnp.isnan(energy) & (factors > 0)
        energy, phi = jnp.where(known, energy, 0.0), jnp.where(known, factors, 1.0)
        weight = against * inverse**2 / phi + 2.0 * measured.smoothness * inverse
        return 2.0 * jnp.sum(weight * energy) / jnp.maximum(jnp.sum(phi, where=known), 1e-30)

    found = BoundTerms(
        descent=2.0 * measured.gap * inverse / total,
        noise=2.0 * measured.smoothness * measured.movement * inverse * jnp.sum(factors**2) / total,
        sparsification=errors(measured.against_sparsification, sparsification),
        covariance=errors(measured.against_covariance, covariance),
    )
    return BoundTerms(*(jnp.where(moves, term, jnp.inf) for term in found))


def of_log(
    measured: Measured, sparsification_error: ArrayLike, covariance_error: ArrayLike, factors: ArrayLike
) -> BoundTerms:
    """The terms of a run that was logged: errors `[T]` are norms, as in `Metrics`; NaN is left out."""
    return terms(measured, jnp.square(sparsification_error), jnp.square(covariance_error), factors)


def effects(measured: Measured, found: BoundTerms) -> Effects:
    """The terms by cause. Rank costs what `descent + noise` are above their value at `kappa = 1`, all else the same."""
    whole = found.descent + found.noise
    rank = jnp.where(measured.share < 1.0, (1.0 - measured.share) * whole, 0.0)
    return Effects(measured.share * whole, rank, found.sparsification, found.covariance)


def followed_energy(left: ArrayLike, right: ArrayLike, gradient: ArrayLike) -> Array:
    """Energy `[...]` of the part of a gradient that factors can follow: its projection on their tangent space.

    To first order a product `a b` moves by `da b + a db`: by what has its columns in the range of a, or its rows in
    that of b. Non-decreasing in the set of components, and all of the gradient's energy where a or b is of full rank.

    Args:
      left: `[..., n_in, R]`, a where b is trained, else 0; components out of use are 0.
      right: `[..., R, n_out]`, b where a is trained, else 0.
      gradient: `[..., n_in, n_out]` by the module's weights.
    """
    left, right, gradient = map(jnp.asarray, (left, right, gradient))
    u, v = _orthonormal_range(left), _orthonormal_range(jnp.swapaxes(right, -1, -2))
    by_u = jnp.einsum("...nr,...np->...rp", u, gradient, precision=Precision.HIGHEST)
    rest = gradient - jnp.einsum("...nr,...rp->...np", u, by_u, precision=Precision.HIGHEST)
    by_v = jnp.einsum("...np,...pr->...nr", rest, v, precision=Precision.HIGHEST)
    return jnp.sum(by_u**2, (-2, -1)) + jnp.sum(by_v**2, (-2, -1))


def smoothness(loss: Array, slope: Array, distance_sq: Array) -> Array:
    """The least L >= 0 for which `f(x + d) <= f(x) + <grad f(x), d> + L/2 ||d||^2`, summed over steps.

    Args:
      loss: `[T + 1]` f before each step and at the end.
      slope: `[T]` `<grad f(x), d>`.
      distance_sq: `[T]` `||d||^2`.
    """
    total = jnp.sum(distance_sq)
    excess = 2.0 * (loss[-1] - loss[0] - jnp.sum(slope))
    return jnp.where(total > 0, jnp.maximum(excess, 0.0) / jnp.where(total > 0, total, 1.0), 0.0)


def share_against(slope: Array, gradient_sq: Array, energy: Array) -> Array:
    """Share of the energy of errors that lies along the gradient, where it undoes descent; sums over all axes.

    Args:
      slope: `<grad f, error>`, any shape; negative where the error helps, which counts as 0.
      gradient_sq: `||grad f||^2`, to broadcast.
      energy: `||error||^2`.
    """
    along = jnp.sum(jnp.square(jnp.maximum(slope, 0.0)) / jnp.where(gradient_sq > 0, gradient_sq, 1.0))
    total = jnp.sum(energy)
    return jnp.minimum(jnp.where(total > 0, along / jnp.where(total > 0, total, 1.0), 0.0), 1.0)


def product_change(old: Factors, new: Factors) -> Array:
    """`a' b' - a b`, `[L, n_in, n_out]`, without the difference of two large products."""
    by_a = jnp.einsum("lir,lro->lio", new.a - old.a, new.b, precision=Precision.HIGHEST)
    return by_a + jnp.einsum("lir,lro->lio", old.a, new.b - old.b, precision=Precision.HIGHEST)


def _orthonormal_range(x: Array) -> Array:
    """`[..., n, R]` orthonormal columns that span those of x; 0 where x has fewer directions than columns."""
    norm = jnp.sqrt(jnp.sum(x * x, axis=-2, keepdims=True))
    x = x / jnp.where(norm > 0, norm, 1.0)
    values, vectors = jnp.linalg.eigh(gram(x))
    present = values > _RANK_TOLERANCE * jnp.maximum(values[..., -1:], _RANK_TOLERANCE)
    scale = jnp.where(present, 1.0 / jnp.sqrt(jnp.where(present, values, 1.0)), 0.0)
    return jnp.matmul(x, vectors * scale[..., None, :], precision=Precision.HIGHEST)
