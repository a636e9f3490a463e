"""Operations with hand-written gradients, against automatic differentiation of their textbook forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_lora.core.types import Factors
from fedjax_lora.ops import primitives


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def assert_same_value_and_gradients(function, textbook, *arguments, tolerance=2e-5):
    cotangent = normal(99, *jax.eval_shape(textbook, *arguments).shape)

    def value_and_gradients(function):
        value, pullback = jax.vjp(function, *arguments)
        return value, pullback(cotangent)

    got, expected = jax.jit(lambda: (value_and_gradients(function), value_and_gradients(textbook)))()
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), got, expected)


@pytest.mark.parametrize("leading", [(5,), (3, 5)])
def test_project_against_autodiff_of_the_plain_products(leading):
    x, w = normal(0, *leading, 7), normal(1, 7, 11)
    factors = Factors(a=normal(2, 7, 3), b=normal(3, 3, 11))
    assert_same_value_and_gradients(primitives.project, lambda x, w, f: x @ w + (x @ f.a) @ f.b, x, w, factors)
    assert_same_value_and_gradients(primitives.project, jnp.matmul, x, w)


def test_project_of_packed_weights_rounds_operands_and_sums_in_float32_numpy():
    def rounded(x):
        return np.asarray(jnp.asarray(x).astype(jnp.bfloat16), np.float32)

    x, w, g = normal(0, 5, 7), normal(1, 7, 11).astype(jnp.bfloat16), normal(4, 5, 11)
    factors = Factors(a=normal(2, 7, 3), b=normal(3, 3, 11))
    got, backward = jax.vjp(lambda x, f: primitives.project(x, primitives.pack(w), f), x, factors)
    dx, dfactors = backward(g)
    low, low_g, a, b = rounded(x), rounded(g), rounded(factors.a), rounded(factors.b)
    narrow, g_narrow = rounded(low @ a), rounded(low_g @ b.T)
    expected = {
        "y": low @ np.asarray(w, np.float32) + narrow @ b,
        "dx": low_g @ np.asarray(w, np.float32).T + g_narrow @ a.T,
        "da": low.T @ g_narrow,
        "db": narrow.T @ low_g,
    }
    found = {"y": got, "dx": dx, "da": dfactors.a, "db": dfactors.b}
    for name, value in expected.items():
        assert found[name].dtype == jnp.float32
        # A sum that lies between two bfloat16 numbers may be rounded to either.
        np.testing.assert_allclose(found[name], value, rtol=1e-2, atol=2e-2, err_msg=name)


def test_pack_is_a_bitcast_and_unpack_its_inverse():
    x = normal(0, 3, 4).astype(jnp.bfloat16)
    packed = primitives.pack(x)
    assert packed.dtype == jnp.uint16
    np.testing.assert_array_equal(packed, np.asarray(x).view(np.uint16))
    np.testing.assert_array_equal(primitives.unpack(packed), x)
    single = normal(0, 3, 4)
    assert primitives.pack(single) is single and primitives.unpack(single) is single


def test_bfloat16_weights_refuse_to_be_differentiated():
    w = jnp.ones((2, 3), jnp.bfloat16)
    with pytest.raises(ValueError, match="compute_dtype must be float32 where the frozen weights are trained"):
        jax.grad(lambda w: primitives.project(jnp.ones((1, 2)), primitives.pack(w)).sum())(w)


def test_gelu_against_pytorch_with_its_gradient():
    torch = pytest.importorskip("torch")
    x = np.concatenate([np.linspace(-12, 12, 401), [0.0, -40.0, 40.0]]).astype(np.float32)
    reference = torch.tensor(x, requires_grad=True)
    value = torch.nn.functional.gelu(reference)
    value.sum().backward()
    np.testing.assert_allclose(primitives.gelu(x), value.detach().numpy(), rtol=1e-5, atol=1e-6)
    slope = jax.grad(lambda x: primitives.gelu(x).sum())(x)
    assert reference.grad is not None
    np.testing.assert_allclose(slope, reference.grad.numpy(), rtol=1e-5, atol=1e-6)


def test_layer_norm_against_autodiff_of_the_plain_form():
    def plain(x, scale_bias):
        centred = x - x.mean(-1, keepdims=True)
        return centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * scale_bias[0] + scale_bias[1]

    arguments = 3 + 2 * normal(0, 4, 5, 9), (normal(1, 9), normal(2, 9))
    assert_same_value_and_gradients(lambda x, s: primitives.layer_norm(x, s, 1e-6), plain, *arguments)


@pytest.mark.parametrize("scale_shape", [(9,), (5, 9)])
def test_rms_norm_against_autodiff_of_the_plain_form(scale_shape):
    def plain(x, scale):
        return x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale

    arguments = 3 + 2 * normal(0, 4, 5, 9), normal(1, *scale_shape)
    assert_same_value_and_gradients(lambda x, s: primitives.rms_norm(x, s, 1e-6), plain, *arguments)


def test_gated_against_autodiff_of_the_plain_form():
    def plain(x):
        return jax.nn.silu(x[..., :7]) * x[..., 7:]

    assert_same_value_and_gradients(lambda x: primitives.gated(x, jax.nn.silu), plain, 2 * normal(0, 3, 5, 14))
    low = jax.grad(lambda x: primitives.gated(x, jax.nn.silu, "bfloat16").sum())(normal(0, 3, 5, 14))
    full = jax.grad(lambda x: plain(x).sum())(normal(0, 3, 5, 14))
    assert 0 < jnp.abs(low - full).max() < 0.02 * jnp.abs(full).max()


@pytest.mark.parametrize("leading", [(5,), (2, 5)])
def test_rotary_against_complex_numbers(leading):
    """Oracle: the pairs as complex numbers, times those of the angles."""
    x, angle = normal(0, 2, 5, 3, 8), np.asarray(normal(1, *leading, 4))
    pairs = np.asarray(x)[..., :4] + 1j * np.asarray(x)[..., 4:]
    turned = pairs * np.exp(1j * angle)[..., None, :]
    found = primitives.rotary(x, (jnp.cos(angle), jnp.sin(angle)))
    np.testing.assert_allclose(found, np.concatenate([turned.real, turned.imag], -1), rtol=1e-5, atol=1e-5)


def plain_attention(qkv, mask, num_heads, num_kv_heads, causal=False):
    heads = jnp.split(qkv, num_heads + 2 * num_kv_heads, axis=-1)
    per_head = []
    for head in range(num_heads):
        shared = num_heads + head * num_kv_heads // num_heads
        q, k, v = heads[head], heads[shared], heads[shared + num_kv_heads]
        scores = q @ k.swapaxes(1, 2) / np.sqrt(q.shape[-1])
        seen = (mask[:, None, :] > 0) & (np.tri(mask.shape[1]) > 0 if causal else True)
        per_head.append(jax.nn.softmax(jnp.where(seen, scores, -1e9)) @ v)
    return jnp.concatenate(per_head, -1)


@pytest.mark.parametrize(("heads", "causal"), [((3, 3), False), ((3, 1), True), ((6, 2), True)])
def test_attention_against_autodiff_of_a_loop_over_heads(heads, causal):
    qkv = normal(0, 2, 5, (heads[0] + 2 * heads[1]) * 4)
    mask = jnp.array([[1.0, 1, 1, 1, 1], [1, 1, 0, 0, 0]])

    def grouped(x):
        return primitives.attention(x, mask, heads[0], "float32", num_kv_heads=heads[1], causal=causal)

    assert_same_value_and_gradients(grouped, lambda x: plain_attention(x, mask, *heads, causal), qkv)


def test_attention_ignores_padding_invariance():
    qkv, mask = normal(0, 2, 5, 3 * 12), jnp.array([[1.0, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    junk = jnp.where(mask[:, :, None] > 0, qkv, 100 * normal(1, *qkv.shape))
    for values in (qkv, junk):
        real = primitives.attention(values, mask, 3, "float32")[1, :2]
        np.testing.assert_allclose(real, primitives.attention(qkv[1:, :2], mask[1:, :2], 3, "float32")[0], atol=1e-6)


def test_attention_without_a_real_position_is_the_mean_of_the_values_closed_form():
    qkv = normal(0, 1, 5, 3 * 12)

    def run(qkv):
        return primitives.attention(qkv, jnp.zeros((1, 5)), 3, "float32")

    np.testing.assert_allclose(run(qkv)[0], np.tile(np.asarray(qkv)[0, :, 24:].mean(0), (5, 1)), atol=1e-6)
    assert jnp.isfinite(jax.grad(lambda x: run(x).sum())(qkv)).all()


def test_attention_in_bfloat16_is_near_float32():
    qkv, mask = normal(0, 2, 5, 3 * 12), jnp.ones((2, 5))

    def value_and_gradient(dtype):
        value, pullback = jax.vjp(lambda x: primitives.attention(x, mask, 3, dtype), qkv)
        return value, pullback(normal(1, 2, 5, 12))[0]

    for low, full in zip(value_and_gradient("bfloat16"), value_and_gradient("float32"), strict=True):
        assert low.dtype == jnp.float32
        assert 0 < jnp.abs(low - full).max() < 0.03 * jnp.abs(full).max()


BETWEEN = {
    "project": ((6,), lambda x: primitives.project(x, WEIGHTS, Factors(a=normal(2, 6, 3), b=normal(3, 3, 11)))),
    "gelu": ((6,), lambda x: primitives.gelu(x, "bfloat16")),
    "layer_norm": ((6,), lambda x: primitives.layer_norm(x, (normal(2, 6), normal(3, 6)), 1e-6, "bfloat16")),
    "rms_norm": ((6,), lambda x: primitives.rms_norm(x, normal(2, 6), 1e-6, "bfloat16")),
    "gated": ((6,), lambda x: primitives.gated(x, jax.nn.silu, "bfloat16")),
    "rotary": ((3, 4), lambda x: primitives.rotary(x, (normal(2, 5, 2), normal(3, 5, 2)))),
    "attention": ((36,), lambda x: primitives.attention(x, jnp.ones((2, 5)), 3, "bfloat16")),
}
WEIGHTS = normal(1, 6, 11).astype(jnp.bfloat16)


@pytest.mark.parametrize("name", BETWEEN)
def test_bfloat16_in_and_out_is_near_float32(name):
    """Oracle: the same operation between float32 arrays, of the same rounded numbers."""
    last, operation = BETWEEN[name]

    def value_and_gradient(dtype):
        value, pullback = jax.vjp(operation, normal(0, 2, 5, *last).astype(jnp.bfloat16).astype(dtype))
        (gradient,) = pullback(normal(4, *value.shape).astype(jnp.bfloat16).astype(dtype))
        assert value.dtype == gradient.dtype == dtype
        return value, gradient

    for low, full in zip(value_and_gradient(jnp.bfloat16), value_and_gradient(jnp.float32), strict=True):
        assert jnp.linalg.norm(low - full) < 0.02 * jnp.linalg.norm(full)
