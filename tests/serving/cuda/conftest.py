"""Where the kernels for GPUs are tested: there, or by Triton's interpreter (see tests/conftest.py)."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def chance() -> torch.Generator:
    return torch.Generator().manual_seed(17)
