"""``intscale.skip`` by whole names, and a warning where Dynamo has only a part of the name."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from intscale_compile import reasons


class Layer(nn.Module):
    def __init__(self, breaks: bool):
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)
        self.breaks = breaks

    def forward(self, x):
        x = self.up(x)
        if self.breaks:
            torch._dynamo.graph_break()
        return self.down(x.relu())


class Model(nn.Module):
    def __init__(self, breaks: bool):
        super().__init__()
        self.layers = nn.ModuleList(Layer(breaks) for _ in range(2))
        self.requires_grad_(False)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.fixture(autouse=True)
def fresh():
    reasons.log_once.cache_clear()
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def warnings_of(call, caplog) -> list[str]:
    with caplog.at_level(logging.WARNING, "intscale_compile"), torch.no_grad():
        call(torch.randn(2, 32))
    return [record.getMessage() for record in caplog.records if "intscale.skip" in record.getMessage()]


def test_whole_names_of_a_whole_graph(caplog):
    options = {"intscale.skip": r"layers\.1\.down\.weight"}
    assert not warnings_of(torch.compile(Model(False), backend="intscale", options=options), caplog)


def test_a_pattern_that_a_graph_break_hides_is_told(caplog):
    options = {"intscale.skip": r"layers\.1\.down\.weight"}
    (text,) = warnings_of(torch.compile(Model(True), backend="intscale", options=options), caplog)
    assert "'layers\\\\.1\\\\.down\\\\.weight' matches 'layers.1.down.weight'" in text and "only 'down.weight'" in text


def test_names_that_begin_at_the_layer_are_followed(caplog):
    """As ``explain`` of a layer compiled by itself shows them."""
    model = Model(False)
    for layer in model.layers:
        layer.compile(backend="intscale", options={"intscale.skip": (r"down\.weight", r"layers\.0\.up\.weight")})
    (text,) = warnings_of(model, caplog)
    assert "'layers.0.up.weight'" in text and "down" not in text
