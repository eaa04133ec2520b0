import pytest
import torch

from benchmarks.common.models import load_shape


@pytest.fixture
def small():
    return load_shape("small", torch.float32)
