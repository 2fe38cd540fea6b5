"""What the plugin's layers need of vLLM, for machines without it: base classes, a parameter, the platform, two layers."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

PLUGIN = "intscale_compile.integrations.vllm"


class ModelWeightParameter(nn.Parameter):
    """As vLLM's, of a single rank."""

    def __new__(cls, data: Tensor, **_: Any):
        return super().__new__(cls, data, requires_grad=False)

    def __init__(self, data: Tensor, output_dim: int, input_dim: int, weight_loader: Any):
        self.output_dim, self.input_dim, self.weight_loader = output_dim, input_dim, weight_loader
        self.tp_rank, self.tp_size = 0, 1


class MethodBase:
    """Base class of vLLM's methods; those of experts are given the layer's ``moe_config``."""

    def __init__(self, *_: Any):
        pass


def install(monkeypatch: Any, device: str) -> None:
    """Let this process import the plugin's layers as if vLLM were there, on a platform of that type, until the test ends."""
    names: dict[str, dict[str, Any]] = {
        "vllm": {},
        "vllm.platforms": dict(current_platform=SimpleNamespace(device_type=device)),
        "vllm.model_executor": {},
        "vllm.model_executor.parameter": dict(ModelWeightParameter=ModelWeightParameter),
        "vllm.model_executor.layers": {},
        "vllm.model_executor.layers.linear": dict(
            LinearMethodBase=MethodBase, UnquantizedLinearMethod=MethodBase, WEIGHT_LOADER_V2_SUPPORTED=[],
            register_weight_loader_v2_supported_method=lambda method: method,
        ),
        "vllm.model_executor.layers.fused_moe": {},
        "vllm.model_executor.layers.fused_moe.fused_moe_method_base": dict(FusedMoEMethodBase=MethodBase),
    }  # fmt: skip
    for name, values in names.items():
        module = ModuleType(name)
        module.__path__ = []  # type: ignore[attr-defined]
        module.__dict__.update(values)
        monkeypatch.setitem(sys.modules, name, module)
    for name in (
        f"{PLUGIN}.linear",
        f"{PLUGIN}.experts",
    ):  # they name vLLM's classes; imported anew, and forgotten afterwards
        monkeypatch.delitem(sys.modules, name, raising=False)
        monkeypatch.setitem(sys.modules, name, None)
        del sys.modules[name]


def config() -> Any:
    """A configuration that takes weights as the checkpoint has them."""
    return SimpleNamespace(quantize=lambda weight, name: weight)


def weight_loader_v2(param: Any, loaded_weight: Tensor, **shard: int) -> None:
    """vLLM's loader of merged layers."""
    param.load_merged_column_weight(loaded_weight, **shard)


def merged_linear(weights: list[Tensor], dtype: torch.dtype, name: str = "layers.0.qkv_proj") -> tuple[nn.Module, Any]:
    """A merged layer of ``weights`` ``[N, K]``, loaded and processed as vLLM does, and its method."""
    from intscale_compile.integrations.vllm.linear import IntScaleLinearMethod

    layer, method, sizes, k = nn.Module(), IntScaleLinearMethod(config(), name), [], weights[0].shape[1]
    sizes = [weight.shape[0] for weight in weights]
    layer.output_size = sum(sizes)  # type: ignore[assignment]
    method.create_weights(layer, k, sizes, k, sum(sizes), dtype, weight_loader=weight_loader_v2)
    for number, weight in enumerate(weights):
        layer.weight.weight_loader(layer.weight, weight, shard_offset=sum(sizes[:number]), shard_size=sizes[number])  # type: ignore[operator]
    method.process_weights_after_loading(layer)
    return layer, method


def routed_experts(experts: list[dict[str, Tensor]], is_lora_enabled: bool = False) -> tuple[nn.Module, Any]:
    """A layer of experts, each with weights ``w1`` (gate), ``w3`` (up) ``[I, H]`` and ``w2`` ``[H, I]``, and its method."""
    from intscale_compile.integrations.vllm.experts import IntScaleExpertsMethod

    layer = nn.Module()
    parallel = SimpleNamespace(enable_eplb=False)
    moe = SimpleNamespace(
        activation="silu", has_bias=False, moe_parallel_config=parallel, tp_size=1, tp_rank=0, is_lora_enabled=is_lora_enabled
    )  # fmt: skip
    every = SimpleNamespace(map_global_to_local=lambda expert: expert)
    settings = dict(apply_router_weight_on_input=False, swiglu_limit=None, expert_map=None, expert_map_manager=every)
    for name, value in (settings | dict(moe_config=moe)).items():
        setattr(layer, name, value)
    method = IntScaleExpertsMethod(config(), layer, "layers.0.mlp.experts")
    inner, hidden = experts[0]["w1"].shape
    method.create_weights(layer, len(experts), hidden, inner, experts[0]["w1"].dtype)
    for number, weights in enumerate(experts):
        for shard, weight in weights.items():
            param: Any = layer.w2_weight if shard == "w2" else layer.w13_weight
            param.weight_loader(param, weight, f"experts.{number}.{shard}", shard, number)
    method.process_weights_after_loading(layer)
    return layer, method
