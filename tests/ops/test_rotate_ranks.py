"""Both implementations of rotate_ranks against eigenvalues and eigenvectors in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_lora.ops.rotate_ranks import rotate_ranks
from fedjax_lora_kernels import rotate_ranks as kernel

IMPLEMENTATIONS = ["xla", "pallas"]


def changes(ranks, widths, decay):
    """One stack a width of factors whose columns shrink by `decay`; all but the last rank in use, where there are 3."""
    generator = np.random.default_rng(0)
    mask = np.ones(ranks, np.float32)
    if ranks > 2:
        mask[-1] = 0
    scale = decay ** np.arange(ranks)
    return [
        jnp.float32(generator.standard_normal((layers, width, ranks)) * scale * mask)
        for layers, width in enumerate(widths, 1)
    ], jnp.asarray(mask)


def check(found, stack, mask):
    """Eigenvalues, orthonormality and diagonal form, at the scale of the whole energy."""
    stack = np.float64(stack)
    gram = np.einsum("lnr,lns->lrs", stack, stack)
    whole = np.maximum(np.trace(gram, axis1=1, axis2=2), 1e-30)
    expected = np.linalg.eigvalsh(gram)[:, ::-1]
    np.testing.assert_allclose(found.energies / whole[:, None], expected / whole[:, None], atol=3e-6)
    rotation, ranks = np.float64(found.rotation), gram.shape[-1]
    np.testing.assert_allclose(
        rotation.swapaxes(1, 2) @ rotation, np.broadcast_to(np.eye(ranks), gram.shape), atol=3e-6
    )
    turned = rotation.swapaxes(1, 2) @ gram @ rotation / whole[:, None, None]
    np.testing.assert_allclose(turned, turned * np.eye(ranks), atol=3e-6)
    used = int(mask.sum())
    np.testing.assert_allclose(rotation[:, used:, :used], 0, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("ranks", "decay"), [(1, 1.0), (2, 1.0), (3, 0.1), (8, 1.0), (8, 0.3)])
def test_components_are_eigenvectors_in_float64(ranks, decay, implementation):
    stacks, mask = changes(ranks, [13, 7, 13], decay)
    every = jax.jit(functools.partial(rotate_ranks, implementation=implementation))(stacks, mask)
    for found, stack in zip(every, stacks, strict=True):
        check(found, stack, mask)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("decay", [1.0, 0.8])
def test_sixty_four_ranks_are_rotated(decay, implementation):
    stacks, mask = changes(64, [100], decay)
    check(rotate_ranks(stacks, mask, implementation=implementation)[0], stacks[0], mask)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_change_and_equal_columns_are_no_trouble(implementation):
    """Closed form: zero has no energy, and R equal columns one component of R times the energy of each."""
    column = np.random.default_rng(0).standard_normal((1, 9, 1)).astype(np.float32)
    stack = jnp.concatenate([jnp.zeros((1, 9, 4)), jnp.broadcast_to(jnp.asarray(column), (1, 9, 4))])
    (found,) = jax.jit(functools.partial(rotate_ranks, implementation=implementation))([stack], jnp.ones(4))
    np.testing.assert_array_equal(found.energies[0], 0)
    expected = [4 * float((column**2).sum()), 0, 0, 0]
    np.testing.assert_allclose(found.energies[1], expected, rtol=1e-5, atol=1e-4)
    for rotation in np.float64(found.rotation):
        np.testing.assert_allclose(rotation.T @ rotation, np.eye(4), atol=3e-6)


def test_several_factors_side_by_side_equal_one_at_a_time(monkeypatch):
    """The form for a TPU, by the interpreter: five factors in blocks of two, the last of which hangs over."""
    monkeypatch.setattr(kernel, "TOGETHER", 2)
    monkeypatch.setattr(kernel, "options", lambda target: {"interpret": True})
    x = jnp.float32(np.random.default_rng(0).standard_normal((5, 3, 11)))
    ranks = jnp.ones((5, 3))
    energies, rotations = jax.jit(functools.partial(kernel.rotate_ranks.__wrapped__, target="tpu"))(x, ranks)
    one, turn = kernel.rotate_ranks(x, ranks, target="cpu")
    np.testing.assert_allclose(energies, one, rtol=1e-5)
    np.testing.assert_allclose(np.abs(rotations), np.abs(turn), atol=1e-5)


def test_more_ranks_than_the_kernel_has_are_refused():
    """The message that the docstring promises."""
    with pytest.raises(ValueError, match="the rank must be at most 64, got 65"):
        rotate_ranks([jnp.ones((1, 3, 65))], jnp.ones(65), implementation="pallas")
