"""Cuts and the server's frequency by device, against a grid; and the round that comes of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_lora.config.experiment import ConfigError
from fedjax_lora.core.count import Count
from fedjax_lora.core.learning import Exchange
from fedjax_lora.core.network import Radio
from fedjax_lora.training.card import CardOptions, best_way
from toy import config, simulation

LAYERS, DEVICES, CYCLES, KAPPA = 5, 8, 1e7, 2e-28


def random_ways(seed):
    """What passes at each cut, over decades, and the radio of its work."""
    rng = np.random.default_rng(seed)
    up, down = (rng.integers(1e4, 3e7, (DEVICES, LAYERS)) for _ in range(2))
    share = np.broadcast_to(np.arange(LAYERS) / LAYERS, (DEVICES, LAYERS)).astype(np.float32)
    samples = rng.integers(8, 80, DEVICES).astype(np.float32)
    cpu_hz, snr_hz = 10 ** rng.uniform(8, 9.5, DEVICES), 10 ** rng.uniform(6, 9, DEVICES)

    def radio_of(work):
        server_hz, down_bps = work.server_hz, 1e7 * jnp.log2(1 + 10 * snr_hz / 1e7)
        return Radio(
            snr_hz=jnp.asarray(snr_hz, jnp.float32),
            start_s=work.samples * CYCLES / cpu_hz,
            band_hz=jnp.float32(1e7),
            power_w=jnp.float32(0.01),
            shared_s=work.server_samples * CYCLES / server_hz + work.down_bits / down_bps,
            server_j=work.server_samples * CYCLES * KAPPA * server_hz**2,
        )

    share = jnp.asarray(share)
    return radio_of, samples, Exchange(Count.of(up), Count.of(down), share, 1 - share), (up, down, cpu_hz, snr_hz)


@pytest.mark.parametrize("weight", [0.05, 0.5, 0.95, 1.0])
def test_cut_and_frequency_are_the_best_of_a_grid(weight):
    """Oracle: all cuts by 4000 frequencies in float64, of the objective as it is written."""
    options = CardOptions(weight=weight, delay_scale_s=3.0, energy_scale_j=50.0, server_hz_min=3e8, server_hz_max=2e10)
    for seed in range(5):
        radio_of, samples, ways, (up, down, cpu_hz, snr_hz) = random_ways(seed)
        work, chosen = best_way(options, radio_of, samples, ways)
        grid_hz = np.geomspace(options.server_hz_min, options.server_hz_max, 4000)
        at_device = np.arange(LAYERS) / LAYERS
        delay_s = (samples[:, None] * at_device * CYCLES / cpu_hz[:, None])[..., None]
        delay_s = delay_s + (up / (1e7 * np.log2(1 + snr_hz / 1e7))[:, None])[..., None]
        delay_s = delay_s + (down / (1e7 * np.log2(1 + 10 * snr_hz / 1e7))[:, None])[..., None]
        cycles = (samples[:, None] * (1 - at_device) * CYCLES)[..., None]
        delay_s, energy_j = delay_s + cycles / grid_hz, KAPPA * cycles * grid_hz**2
        cost = weight * delay_s / 3.0 + (1 - weight) * energy_j / 50.0
        place = np.argmin(np.abs(grid_hz - float(work.server_hz[0])))
        cut = np.round(np.asarray(chosen.device_share) * LAYERS).astype(int)
        own = cost[np.arange(DEVICES), cut, place]
        np.testing.assert_allclose(own, cost.min((1, 2)), rtol=2e-5)
        np.testing.assert_array_equal(chosen.up.exact(), up[np.arange(DEVICES), cut])
        np.testing.assert_allclose(work.samples, samples * cut / LAYERS, rtol=1e-6)


CARD = ("training={name: card, energy_scale_j: 0.01}", "sparsifier=dense", "wireless={bandwidth_hz: 1e6}")


def test_a_round_is_that_of_ordinary_training_one_device_after_another():
    """Oracles: local training; and bits by hand, of the cut that each device's share of the FLOP names."""
    own = ("control={name: uniform, keep_ratio: 1}", "rounds=2", "engine.eval_every=2")
    whole, cut = simulation(*own, "sparsifier=dense"), simulation(*own, *CARD)
    (one, _), (other, found) = (sim.run(sim.init(jax.random.key(3)), 2) for sim in (whole, cut))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-5), one.adapters, other.adapters)
    tensor, labels, layer = 2 * 4 * 4 * 64 * 32, 2 * 4 * 32, 3 * 32 * (64 + 64 + 64 + 256)
    bits = found.client_uplink_bits[0]
    cuts = (bits - tensor - labels) / layer
    np.testing.assert_array_equal(cuts, np.round(cuts))
    assert set(cuts.tolist()) <= {0, 1, 2, 3}
    np.testing.assert_allclose(found.methods["training/device_share"][0], cuts.mean() / 4, rtol=1e-6)
    assert (found.methods["training/server_energy_j"] > 0).all()


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["training={name: card, weight: 1.5}"], "weight must be between 0 and 1, got 1.5"),
        (
            ["training={name: card, server_hz_min: 1e12}"],
            "server_hz_max must be at least server_hz_min =",
        ),
        (
            ["training={name: card}", "sparsifier=dense", "wire.bits=8"],
            "wire.bits must be 32 where training.name is",
        ),
        (["training={name: card}", "sparsifier=soft"], "sparsifier.name must be dense where training.name is card"),
    ],
)
def test_what_card_does_not_go_with_is_one_line(overrides, expected):
    with pytest.raises(ConfigError) as caught:
        config(*overrides)
    assert expected in str(caught.value) and "\n" not in str(caught.value)
