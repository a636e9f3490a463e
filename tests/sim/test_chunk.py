import pytest

from fedjax_lora.sim import chunk


class FakeDevice:
    def __init__(self, platform, bytes_limit=None):
        self.platform = platform
        self._stats = None if bytes_limit is None else {"bytes_limit": bytes_limit}

    def memory_stats(self):
        return self._stats


@pytest.mark.parametrize(
    ("cohort", "megabytes", "device", "expected"),
    [
        (32, 80, FakeDevice("cpu"), 1),
        (32, 8, FakeDevice("cpu"), 4),
        (10, 4, FakeDevice("cpu"), 5),
        (64, 100, FakeDevice("gpu", 2**34), 64),
        (64, 400, FakeDevice("gpu", 2**34), 16),
    ],
)
def test_chunk_is_the_largest_divisor_within_the_budget_by_hand(cohort, megabytes, device, expected):
    assert chunk.choose_chunk(cohort, megabytes * 2**20, device) == expected
