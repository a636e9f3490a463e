"""Tests that compile for TPUs without having one, by the compiler in `libtpu`; they are skipped without it."""

import importlib.util
import os

import pytest

TARGETS = ("v5e:2x2", "v6e:2x2")
"""Four chips each."""

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # no one is asked which machine this is
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # several processes may compile at once


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip with a reason where there is no compiler; every test is slow."""
    absent = importlib.util.find_spec("libtpu") is None
    for item in items:
        if "tpu" in item.path.parts:
            item.add_marker(pytest.mark.slow)
            if absent:
                item.add_marker(pytest.mark.skip(reason="libtpu is not installed: make test-tpu installs it"))


@pytest.fixture(scope="session", params=TARGETS)
def devices(request):
    """The chips of a topology that is not at hand."""
    from jax.experimental import topologies

    return topologies.get_topology_desc(request.param, platform="tpu").devices
