"""LoRA-A2's scores and choice, against explicit components and NumPy's sort."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_lora.sparsifiers import lora_a2
from oracles.contexts import context, upload
from oracles.sparsifier_oracle import (
    LAYERS,
    MAX_RANK,
    RANK,
    WIDTHS,
    components,
    random_adapters,
    scope,
    trained_from,
)

START = random_adapters(0)
METHOD = lora_a2.make(lora_a2.LoraA2Config(), context(START))
UPLOAD = jax.jit(upload(METHOD))


def norms_of_change(trained, name, layer):
    pairs = zip(components(trained.modules[name], layer), components(START.modules[name], layer), strict=True)
    return [np.linalg.norm(c - c0) for c, c0 in pairs]


@pytest.mark.parametrize("factor", ["a", "b"])
def test_score_equals_norm_of_change_where_one_factor_was_trained(factor):
    """The explicit change of every component."""
    trained = scope(factors=factor).select(trained_from(START, 1), START)
    for name, f in trained.modules.items():
        found = lora_a2.score(f, START.modules[name])
        for layer in range(LAYERS):
            np.testing.assert_allclose(found[layer], norms_of_change(trained, name, layer), rtol=1e-5, atol=1e-6)


def test_score_bounds_norm_of_change_where_both_were():
    """The triangle inequality; and the sum of the two norms, term by term."""
    trained = trained_from(START, 1)
    for name, f in trained.modules.items():
        f0 = START.modules[name]
        found = lora_a2.score(f, f0)
        for layer in range(LAYERS):
            assert np.all(found[layer] >= np.array(norms_of_change(trained, name, layer)) * (1 - 1e-5))
            for i in range(RANK):
                a0, b0, a, b = (np.float64(x[layer]) for x in (f0.a, f0.b, f.a, f.b))
                terms = np.outer(a0[:, i], b[i] - b0[i]), np.outer(a[:, i] - a0[:, i], b[i])
                np.testing.assert_allclose(found[layer, i], sum(map(np.linalg.norm, terms)), rtol=1e-5)


@pytest.mark.parametrize(("kept", "factors"), [(1, "a"), (2, "b"), (2, "ab")])
def test_the_largest_scores_of_the_whole_adapter_are_sent(kept, factors):
    """NumPy's sort of all scores; changes arrive, and a component not sent is unchanged."""
    used = scope(factors=factors)
    trained = used.select(trained_from(START, 1), START)
    sent = UPLOAD(START, trained, (), jnp.float32(kept), used, jax.random.key(0))
    scores = {name: np.asarray(lora_a2.score(f, START.modules[name])) for name, f in trained.modules.items()}
    everything = sorted(
        ((scores[name][layer, i], name, layer, i) for name in WIDTHS for layer, i in np.ndindex(LAYERS, RANK)),
        reverse=True,
    )
    chosen = {entry[1:] for entry in everything[: kept * LAYERS * len(WIDTHS)]}
    for name, f in sent.adapters.modules.items():
        for layer, i in np.ndindex(LAYERS, MAX_RANK):
            source = trained if (name, layer, i) in chosen else START
            error = 0.0 if source is START else 1e-6
            np.testing.assert_allclose(f.a[layer, :, i], source.modules[name].a[layer, :, i], rtol=0, atol=error)
            np.testing.assert_allclose(f.b[layer, i], source.modules[name].b[layer, i], rtol=0, atol=error)
    assert sent.kept_ranks == kept
    tails = METHOD.offer(START, trained, used).tail_energy
    left_out = sum(score**2 for score, *_ in everything[kept * LAYERS * len(WIDTHS) :])
    np.testing.assert_allclose(tails[kept], left_out, rtol=1e-5)


def test_the_missing_half_is_named():
    """The message itself; not where an aggregation takes turns with the factors."""
    assert lora_a2.LoraA2Config().note({"factors_together"}) is None
    assert lora_a2.LoraA2Config().note({"full_participation"}) == (
        "sparsifier: lora_a2 is LoRA-A2's choice of ranks alone; a round in which both factors are sent is our "
        "extension; an aggregation that takes turns with the factors is the other half"
    )


def test_config_names_field_and_value():
    """The message itself."""
    with pytest.raises(ValueError, match="name must be 'lora_a2', got 'a2'"):
        lora_a2.LoraA2Config(name="a2")  # pyright: ignore[reportArgumentType]
