"""A small model and its calibration data."""

import pytest
import torch
from torch import nn

from tests.support.calibration import tiny_llama


@pytest.fixture
def model() -> nn.Module:
    return tiny_llama()


@pytest.fixture
def data() -> torch.Tensor:
    return torch.randint(0, 128, (8, 64))
