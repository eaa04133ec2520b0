"""A worker of the small model."""

from __future__ import annotations

import pytest

from trim_plugin.batching.worker import Worker
from trim_plugin.embedded import load_small_model


@pytest.fixture(scope="session")
def small():
    return load_small_model()


@pytest.fixture
def worker(small, tmp_path):
    made = Worker(*small, {"top_k_ratio": 0.1}, max_running=8, max_new_tokens=24, folder=tmp_path)
    yield made
    made.close()


def without_seconds(results):
    return [{name: value for name, value in result.items() if name != "seconds"} for result in results]
