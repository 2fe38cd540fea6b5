"""Fixtures that several test files share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

CHECKOUT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _seed():
    """Every test starts from the same random state, so a failure repeats when the test is run alone."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def models_dir() -> Path:
    """Folder of the small trained models; they are never part of the checkout."""
    folder = Path(os.environ.get("INTSCALE_MODELS") or CHECKOUT.parent / "shared" / "models")
    if not (folder / "tiny-llama" / "config.json").is_file():
        pytest.skip(f"no trained models in {folder}: set INTSCALE_MODELS to the folder that holds tiny-llama")
    return folder


def pytest_collection_modifyitems(items):
    """Tests marked ``gpu`` are skipped where there is no GPU."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)
