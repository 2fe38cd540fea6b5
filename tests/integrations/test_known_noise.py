"""Just the known lines of other libraries are held back, and only while the package is imported."""

from __future__ import annotations

import logging

import pytest

from intscale_compile.integrations import known_noise

NOISE = "Failed to load /x/torchao/_C_mxfp8.cpython-310-x86_64-linux-gnu.so: Could not load this library"


@pytest.fixture
def said(monkeypatch, caplog):
    def say(text, version="0.18.0", gpu=False):
        monkeypatch.setattr(known_noise.importlib.metadata, "version", lambda package: version)
        monkeypatch.setattr(known_noise, "_has_gpu", lambda: gpu)
        known_noise.hold_back()
        caplog.clear()
        logging.getLogger("torchao").warning(text)
        known_noise.let_through()
        return caplog.messages

    return say


def test_what_is_held_back(said, caplog):
    assert said(NOISE) == []
    assert said(NOISE, version="0.19.0") == [NOISE], "another version may mean another thing"
    assert said(NOISE, gpu=True) == [NOISE]
    assert said(NOISE.replace("mxfp8", "other")) == [NOISE.replace("mxfp8", "other")]
    assert said("something else") == ["something else"]
    logging.getLogger("torchao").warning(NOISE)
    assert caplog.messages[-1] == NOISE, "after the import"
