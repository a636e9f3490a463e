import jax
import pytest

from fedjax_lora.sim import chunk


@pytest.mark.parametrize(
    ("cohort", "megabytes", "budget", "expected"),
    [
        (32, 80, 32, 1),
        (32, 8, 32, 4),
        (10, 4, 32, 5),
        (64, 100, 8192, 64),
        (64, 400, 8192, 16),
        (7, 10, 32, 1),
        (61, 1, 60, 32),
    ],
)
def test_chunk_is_the_largest_that_fits_and_hardly_pads_by_hand(cohort, megabytes, budget, expected):
    assert chunk.choose_chunk(cohort, megabytes * 2**20, budget * 2**20) == expected


class Accelerator:
    platform = "gpu"

    def memory_stats(self):
        return {"bytes_limit": 2**34}


def test_the_budget_is_a_share_of_an_accelerators_memory_by_hand(monkeypatch):
    assert chunk.activation_budget_bytes() == chunk.CPU_CACHE_BYTES
    monkeypatch.setattr(jax, "devices", lambda: [Accelerator()])
    assert chunk.activation_budget_bytes() == 2**33
