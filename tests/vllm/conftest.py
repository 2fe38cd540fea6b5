"""Tests of the plugin under vLLM itself, on a CPU: ``tests/vllm/run`` makes their environment. Skipped where vLLM is missing."""

from __future__ import annotations

import importlib.util
import os

import pytest

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the model is in this process
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # apply_model takes a function
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

FOUND = importlib.util.find_spec("vllm")
THERE = FOUND is not None and FOUND.origin is not None  # this folder alone would be found as a package without a file
collect_ignore_glob = [] if THERE else ["test_*.py"]


@pytest.fixture(scope="session")
def llama(models_dir):
    """Folder of the small Llama."""
    return models_dir / "tiny-llama"


@pytest.fixture(scope="session")
def mixtral(models_dir):
    """Folder of the small Mixtral."""
    return models_dir / "tiny-mixtral"


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Where checkpoints are written."""
    return tmp_path_factory.mktemp("checkpoints")
