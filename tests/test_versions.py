"""Unsupported versions of the packages below us are refused with the command that mends it."""

import importlib.metadata

import pytest

from intscale_compile import versions
from intscale_compile.errors import VersionError


@pytest.mark.parametrize(
    "package, found, ok",
    [
        ("torch", "2.10.1", False),
        ("torch", "2.11.0+cu130", True),
        ("torch", "2.13.0a0+git123", True),
        ("torch", "2.15.1", True),
        ("torch", "2.16.0", False),
        ("torchao", "0.17.0", False),
        ("torchao", "0.18.0", True),
        ("torchao", "1.0.0", True),
    ],
)
def test_supported_range(monkeypatch, package, found, ok):
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: found if name == package else real(name))
    if ok:
        versions.check_versions()
        return
    with pytest.raises(VersionError, match=rf"needs {package}>=.*found {found}: pip install '{package}"):
        versions.check_versions()
