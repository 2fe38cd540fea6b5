"""What was left out of a model stays out: in every copy of it, block by block, and in functions that close over it."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from intscale_compile import quantize
from intscale_compile.compile.binding import copied
from intscale_compile.passes import GraphRewrite
from intscale_compile.passes.match import match
from intscale_compile.passes.settings import Settings
from intscale_compile.reasons import Reason
from intscale_compile.tensors.selection import is_decided
from tests.support.doors import CONFIG, compiler_choices, quantized


def saved_whole(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 64)

    def forward(self, x):
        return self.layer(x)


def blocks():
    return nn.Sequential(Block(), Block()).requires_grad_(False)


def from_state_dict(model):
    fresh = blocks()
    fresh.load_state_dict(model.state_dict(), assign=True)
    return fresh


COPIES = {"itself": lambda m: m, "deepcopy": copy.deepcopy, "torch.save": saved_whole, "state_dict": from_state_dict}


@pytest.mark.parametrize("name", COPIES)
def test_left_out_layer_stays_out(name):
    model = blocks()
    quantize(model, CONFIG, lambda module, name: name == "0.layer")
    twin, x = COPIES[name](model), torch.randn(3, 64)
    wanted = {"0.layer.weight": None, "1.layer.weight": Reason.NOT_SELECTED}
    assert is_decided(twin) and compiler_choices(twin, x) == wanted
    assert compiler_choices(twin, x, compile_parts=list(twin)) == wanted, "block by block"
    if name != "state_dict":  # nothing there says where the layer comes from
        assert compiler_choices(twin[1], x) == {"layer.weight": Reason.NOT_SELECTED}, "by itself"


def test_plain_and_quantized_blocks_of_one_class_do_not_share_a_graph():
    """Their weights look alike to Dynamo; which model they belong to is guarded."""
    plain, half, x = blocks(), blocks(), torch.randn(3, 64)
    quantize(half, CONFIG, lambda module, name: name == "0.layer")
    found = []

    def backend(gm, example_inputs):
        rewrite = GraphRewrite(copied(gm), example_inputs, Settings(config=CONFIG))
        match(rewrite)
        found.extend(candidate.reason for candidate in rewrite.candidates)
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        for block in (plain[0], half[1], plain[1], half[1]):
            block.compile(backend=backend)
            block(x)
    assert found == [None, Reason.NOT_SELECTED]
    torch._dynamo.reset()


def test_function_that_closes_over_a_model():
    """No module's call is under way where the graph is compiled; where its inputs come from says which model it is."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).requires_grad_(False)
    model.lm_head = model[1]  # a second name
    reasons = []

    def backend(gm, example_inputs):
        rewrite = GraphRewrite(copied(gm), example_inputs, Settings(config=CONFIG))
        match(rewrite)
        reasons.extend(candidate.reason for candidate in rewrite.candidates)
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(lambda x: F.linear(x, model[1].weight), backend=backend)(torch.randn(2, 64))
    torch._dynamo.reset()
    assert reasons == [Reason.OUTPUT_EMBEDDING]


def test_parametrized_weight_does_not_stop_the_other_door():
    model = nn.Sequential(nn.Linear(64, 64), nn.utils.parametrizations.weight_norm(nn.Linear(64, 64))).requires_grad_(
        False
    )
    assert parametrize.is_parametrized(model[1]) and "0.weight" in quantized(
        compiler_choices(model, torch.randn(2, 64))
    )
