"""Both doors choose the same weights, however the graph is cut. What was left out stays out: ``test_marked_models``."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchao.quantization import quantize_

from intscale_compile import linears_and_experts, quantize
from intscale_compile.reasons import Reason
from intscale_compile.tensors.selection import left_alone_by_default, model_weights
from intscale_compile.tensors.weight_reads import stacks_in_a_loop, weight_reads
from tests.support.doors import CONFIG, chosen_by_quantize, compiler_choices, quantized

# --- the rule, in models of plain torch ---------------------------------------------------------------------------------


class Broken(nn.Module):
    """A model with every kind of weight, cut in two before the last ones."""

    def __init__(self, tied=False):
        super().__init__()
        self.embed = nn.Embedding(64, 64)
        self.layer, self.small, self.head = nn.Linear(64, 64), nn.Linear(64, 8), nn.Linear(64, 64, bias=False)
        self.proj = nn.Parameter(torch.randn(64, 64) / 8)
        self.register_buffer("filters", torch.randn(64, 64) / 8)
        self.requires_grad_(False)
        if tied:
            self.head.weight = self.embed.weight

    def get_output_embeddings(self):
        return self.head

    def forward(self, ids):
        x = torch.tanh(self.layer(self.embed(ids)))
        torch._dynamo.graph_break()
        return self.head(x @ self.proj @ self.filters), self.small(x)


IDS = torch.arange(12).view(2, 6)


@pytest.mark.parametrize("tied", [False, True])
def test_kinds_behind_a_graph_break(tied):
    model = Broken(tied)
    head = ("embed.weight", Reason.TIED_EMBEDDING) if tied else ("head.weight", Reason.OUTPUT_EMBEDDING)
    found = compiler_choices(model, IDS)
    assert found.pop("layer.weight") is None
    raw = dict.fromkeys(("proj", "filters"), Reason.RAW_PARAMETER)
    assert found == {**raw, "small.weight": Reason.TOO_SMALL, head[0]: head[1]}
    assert chosen_by_quantize(model) == {"layer.weight"}


def test_model_without_layers():
    """Only the parameters of its products can be meant; quantize finds nothing, so both doors are the compiler's."""

    class Hand(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(64, 64), requires_grad=False)

        def forward(self, x):
            return x @ self.w

    model = Hand()
    quantize_(model, CONFIG, filter_fn=linears_and_experts)
    assert compiler_choices(model, torch.randn(2, 64)) == {"w": None}


class Mixer(nn.Module):
    """Reads weights itself in every form that a quantized weight does not serve."""

    def __init__(this):
        super().__init__()
        for name in ("left", "matmul", "method", "called", "right", "joined", "q", "k", "v", "o"):
            setattr(this, name, nn.Linear(64, 64, bias=False))
        this.inner = nn.ModuleDict({"deep": nn.Linear(64, 64)})
        this.requires_grad_(False)

    def forward(this, x):
        y = (this.left.weight @ x.mT).mT.to(this.called.weight.dtype)
        y = torch.matmul(this.matmul.weight, y.mT).mT + this.method.weight.to(y.dtype).matmul(y.mT).mT
        return this.attend(y @ this.right.weight.t() + this.called(y) + F.linear(y, this.right.weight))

    def attend(this, x):
        x = x @ torch.cat([this.joined.weight.t(), x.new_zeros(64, 64)], dim=1)[:, :64]
        return F.multi_head_attention_forward(
            x, x, x, 64, 2, None, None, None, None, False, 0.0, this.o.weight, None, training=False, need_weights=False,
            use_separate_proj_weight=True, q_proj_weight=this.q.weight, k_proj_weight=this.k.weight, v_proj_weight=this.v.weight,
        )[0]  # fmt: skip


def test_weights_that_the_code_around_a_layer_reads():
    assert weight_reads(Mixer) == {
        "left": Reason.LEFT_OPERAND,
        "matmul": Reason.LEFT_OPERAND,
        "method": Reason.LEFT_OPERAND,
        "joined": Reason.NOT_CONSTANT,
        **dict.fromkeys(("q", "k", "v", "o"), Reason.ONE_OPERATOR),
    }
    assert weight_reads(nn.Linear) == {} and weight_reads(int) == {}
    model, x = Mixer(), torch.randn(3, 64)
    found = compiler_choices(model, x)
    assert quantized(found) == chosen_by_quantize(model) - {"inner.deep.weight"} == {"called.weight", "right.weight"}
    twin = copy.deepcopy(model)
    quantize(twin, CONFIG)
    assert torch.isfinite(twin(x)).all()


class Tied(nn.Module):
    """An encoder whose weight the decoder uses in the other direction, and weights in products that are no linear layer."""

    def __init__(self):
        super().__init__()
        for name in (
            "encode",
            "wide",
            "normed",
            "scaled",
            "cut",
            "row",
            "vector",
            "batched",
            "parted",
            "spelled",
            "free",
            "called",
        ):
            setattr(self, name, nn.Linear(64, 64, bias=False))
        self.gpt = Conv1D(64, 64)
        self.requires_grad_(False)

    def forward(self, x):
        normed = self.normed.weight
        spelled = self.spelled.weight.t()
        y = F.linear(torch.tanh(self.encode(x)), self.encode.weight.t()) + torch.einsum(
            "bk,kn->bn", x, self.wide.weight
        )
        y = y + F.linear(y, F.normalize(normed, dim=1)) + F.linear(y, self.scaled.weight * 0.5)
        y = y + F.linear(y[:, :20], self.cut.weight[:, :20]) + self.row.weight[0] + torch.mv(self.vector.weight, y[0])
        y = y + torch.bmm(y[None], self.batched.weight.t()[None])[0] + y @ self.gpt.weight
        y = y + torch.cat([F.linear(y, part) for part in (self.parted.weight[:32], self.parted.weight[32:])], dim=-1)
        y = self.called(y) if y.dim() == 2 else F.linear(y[..., :32], self.called.weight[:, :32])
        return self.free(torch.einsum("bk,kn->bn", y, spelled))


def test_weights_in_other_products_and_in_the_other_direction():
    model, x = Tied(), torch.randn(3, 64)
    reads = {name: reason.name for name, reason in weight_reads(Tied).items()}
    computed = dict.fromkeys(("normed", "scaled", "cut", "row"), "NOT_CONSTANT")
    other = dict.fromkeys(("encode", "wide", "batched", "gpt"), "UNKNOWN_FORM")
    assert reads == {**computed, **other, "vector": "LEFT_OPERAND"}
    served = {f"{name}.weight" for name in ("parted", "spelled", "free", "called", "gpt")}
    assert quantized(compiler_choices(model, x)) == chosen_by_quantize(model) == served
    quantize(model, CONFIG)
    assert torch.isfinite(model(x)).all()


class Absorbed(nn.Module):
    """Weights that are taken apart or computed with: DeepSeek's latent attention reads ``up`` head by head."""

    def __init__(self):
        super().__init__()
        for name in (
            "up",
            "groups",
            "upcast",
            "scaled",
            "aten",
            "turned",
            "stacked",
            "picked",
            "moved",
            "parts",
            "free",
        ):
            setattr(self, name, nn.Linear(64, 64, bias=False))
        self.requires_grad_(False)

    def forward(self, x):
        up = self.up.weight if self.up.bias is None else x.new_zeros(64, 64)
        up = up.view(4, -1, 64)
        y = torch.einsum("bhd,hdk->bk", x.view(-1, 4, 16), up)
        y = y + torch.bmm(y.view(-1, 2, 32).transpose(0, 1), self.groups.weight.reshape(2, 32, 64)).sum(0)
        y = y + F.linear(y.double(), self.upcast.weight.double()).float()
        y = y + torch.addmm(y, y, self.scaled.weight.t(), beta=0.5)
        y = y + y @ torch.ops.aten.index_select.default(self.aten.weight, 0, torch.arange(64)).t()
        y = y + y @ torch.rot90(self.turned.weight) + (y @ self.stacked.weight.t()[None])[0]
        y = y + F.linear(y, torch.ops.aten.index.Tensor(self.picked.weight, [torch.arange(64)]))
        y = y + y @ self.moved.weight.movedim(0, 1) + y @ self.moved.weight.adjoint()
        return self.free(y + torch.cat([F.linear(y, part) for part in self.parts.weight.unsafe_chunk(2)], dim=-1))


def test_weights_that_are_taken_apart_are_left_alone_by_both_doors():
    """quantize took them, and the first call failed."""
    model, x = Absorbed(), torch.randn(3, 64)
    assert {name: reason.name for name, reason in weight_reads(Absorbed).items()} == {
        "up": "UNKNOWN_VIEW",
        "groups": "UNKNOWN_VIEW",
        "stacked": "UNKNOWN_VIEW",
        "scaled": "SCALED_ADDMM",
        **dict.fromkeys(("upcast", "aten", "turned", "picked"), "NOT_CONSTANT"),
    }
    served = {f"{name}.weight" for name in ("moved", "parts", "free")}
    assert quantized(compiler_choices(model, x)) == chosen_by_quantize(model) == served
    quantize(model, CONFIG)
    assert torch.isfinite(model(x)).all() and quantized(compiler_choices(model, x)) == served


class Masked(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight * 0.5, self.bias)


class Cast(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype), self.bias) + torch.tanh(self.bias)


def test_linear_layers_that_compute_with_their_own_weight():
    model = nn.Sequential(Masked(64, 64), Cast(64, 64)).requires_grad_(False)
    assert quantized(compiler_choices(model, torch.randn(3, 64))) == chosen_by_quantize(model) == {"1.weight"}


class Conv1D(nn.Module):
    """GPT-2's, which keeps its weight so that ``x @ weight`` is right."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.weight = nf, nn.Parameter(torch.randn(nx, nf) / 8)


class LoopExperts(nn.Module):
    def __init__(self):
        super().__init__()
        self.num_experts, self.weight = 2, nn.Parameter(torch.randn(2, 64, 64) / 8, requires_grad=False)

    def forward(self, x):
        return sum(F.linear(x, self.weight[i]) for i in range(self.num_experts))


def test_experts_in_a_loop_are_left_alone_by_both():
    model = nn.Sequential(nn.Linear(64, 64), LoopExperts()).requires_grad_(False)
    assert stacks_in_a_loop(LoopExperts) == {"weight"}
    assert model_weights(model)[id(model[1].weight)].reason is Reason.EXPERTS
    assert chosen_by_quantize(model) == quantized(compiler_choices(model, torch.randn(3, 64))) == {"0.weight"}


@pytest.mark.parametrize("fast", [True, False])
def test_encoder_layer_with_and_without_its_fast_path(fast):
    """The compiler cannot look into torch's one operator for a whole layer; without it both take the two linears."""
    model = nn.Sequential(nn.TransformerEncoderLayer(64, 2, 96, batch_first=True)).eval().requires_grad_(False)
    torch.backends.mha.set_fastpath_enabled(fast)
    try:
        found = compiler_choices(model, torch.randn(2, 5, 64))
        assert quantized(found) == chosen_by_quantize(model)
        assert quantized(found) == (set() if fast else {"0.linear1.weight", "0.linear2.weight"})
        quantize(model, CONFIG, lambda module, name: name.endswith(("linear1", "linear2", "out_proj")))  # named
        assert torch.isfinite(model(torch.randn(2, 5, 64))).all()
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


# --- families of transformers -------------------------------------------------------------------------------------------


def test_choices_over_all_families():
    """One description, no compilation: what quantize takes, and the reasons of the rest, are those that are known of each
    family; ``test_model_families`` compares the graphs with the same table."""
    pytest.importorskip("transformers")
    from tests.support.model_families import FAMILIES, linear_modules

    for name, family in FAMILIES.items():
        model = family.model(family.layers)
        weights = {weight.name: weight.reason for weight in model_weights(model).values()}
        linears = {f"{n}.weight" for n, m in linear_modules(model).items()} & set(weights)
        rest = {n for n in family.rest if family.rest[n] not in ("CONVOLUTION", "TIED_EMBEDDING")}
        assert {n for n in linears if weights[n] is None} == linears - rest, name
        for weight in (rest & set(weights)) - {"head.probe"}:
            assert weights[weight].name == family.rest[weight], name
        # A learned query: that the attention operator reads it is known of a graph only.
        assert "head.probe" not in weights or weights["head.probe"] is Reason.RAW_PARAMETER
        assert len([n for n in weights if weights[n] is None]) == family.linears(family.layers), name
        alone = left_alone_by_default(model)
        layers = {n: model.get_submodule(n.removesuffix(".weight")) for n in rest & linears}
        assert all(id(layer) in alone for layer in layers.values() if linears_and_experts(layer)), name


TOKENS = {"vocab_size": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


SMALL = {"num_hidden_layers": 1, "hidden_size": 64, "use_cache": False, **TOKENS}


def mamba(hf):
    return hf.MambaForCausalLM(hf.MambaConfig(state_size=8, time_step_rank=16, **SMALL)), {
        "backbone.layers.0.mixer.dt_proj.weight": Reason.LEFT_OPERAND,
        "backbone.embeddings.weight": Reason.TIED_EMBEDDING,
    }


def reformer(hf):
    config = hf.ReformerConfig(
        feed_forward_size=96, num_attention_heads=2, attention_head_size=32, attn_layers=["local"], is_decoder=True,
        axial_pos_embds=False, local_attn_chunk_length=4, max_position_embeddings=64, tie_word_embeddings=False, **SMALL,
    )  # fmt: skip
    return hf.ReformerModelWithLMHead(config), {"lm_head.decoder.weight": Reason.OUTPUT_EMBEDDING}


def jetmoe(hf):
    config = hf.JetMoeConfig(num_key_value_heads=2, kv_channels=16, intermediate_size=96, num_local_experts=4, **SMALL)
    return hf.JetMoeForCausalLM(config), {
        "model.layers.0.mlp.input_linear.weight": Reason.EXPERTS,
        "model.layers.0.mlp.router.layer.weight": Reason.ROUTER,
        "model.embed_tokens.weight": Reason.TIED_EMBEDDING,
    }


def rwkv(hf):
    model = hf.RwkvForCausalLM(
        hf.RwkvConfig(attention_hidden_size=64, context_length=32, **{**SMALL, "num_hidden_layers": 2})
    )
    return model, {"head.weight": Reason.OUTPUT_EMBEDDING}


SPECIAL = {"mamba": mamba, "reformer": reformer, "jetmoe": jetmoe, "rwkv": rwkv}


@pytest.mark.parametrize("name", SPECIAL)
def test_special_models(name):
    model, left = SPECIAL[name](pytest.importorskip("transformers"))
    described = {weight.name: weight.reason for weight in model_weights(model).values()}
    assert {name: described[name] for name in left} == left


@pytest.mark.parametrize("name", ["reformer", *(pytest.param(n, marks=pytest.mark.slow) for n in ("mamba", "jetmoe"))])
def test_doors_of_special_models(name):
    """Traced by Dynamo, not compiled."""
    model, _ = SPECIAL[name](pytest.importorskip("transformers"))
    model = model.eval().requires_grad_(False)
    found = compiler_choices(model, input_ids=torch.arange(8).view(1, 8) + 3)
    assert quantized(found) == chosen_by_quantize(model) and quantized(found)
