"""Closed forms of the radio, compiled and not, on arrays of the host and of the device. Oracle: NumPy in float64."""

import chex
import jax.numpy as jnp
import numpy as np

from fedjax_lora.wireless.latency import transfer_time_s
from fedjax_lora.wireless.rate import rayleigh_outage, required_bandwidth, uplink_rate
from oracles import wireless_oracle

BAND_HZ = np.float32([1e3, 1e6, 2e7])
SNR_HZ = np.float32([1e4, 1e8, 1e10])


class InEveryVariant(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True, with_device=True, without_device=True)
    def test_rate_and_its_inverse(self):
        rate_bps = self.variant(uplink_rate)(BAND_HZ, SNR_HZ)
        np.testing.assert_allclose(rate_bps, wireless_oracle.rate(np.float64(BAND_HZ), np.float64(SNR_HZ)), rtol=1e-6)
        np.testing.assert_allclose(self.variant(required_bandwidth)(rate_bps, SNR_HZ), BAND_HZ, rtol=1e-4)

    @chex.variants(with_jit=True, without_jit=True, with_device=True, without_device=True)
    def test_time_of_a_transfer(self):
        bits, rate_bps = np.float32([0.0, 6.0, 6.0]), np.float32([0.0, 2.0, 0.0])
        np.testing.assert_array_equal(self.variant(transfer_time_s)(bits, rate_bps), [0.0, 3.0, np.inf])

    @chex.variants(with_jit=True, without_jit=True)
    def test_outage(self):
        outage = self.variant(rayleigh_outage)(1e6, 1e6, jnp.float32([1e6, 1e9]))
        np.testing.assert_allclose(outage, 1 - np.exp(-1 / np.array([1.0, 1e3])), rtol=1e-5)
