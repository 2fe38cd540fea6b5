"""What a test declares missing is not repeated by ``explain`` in others."""

import pytest

from intscale_compile.integrations import registry


@pytest.fixture(autouse=True)
def nothing_missing(monkeypatch):
    monkeypatch.setattr(registry, "_said", {})
