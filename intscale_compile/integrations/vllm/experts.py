"""Mixtures of experts of vLLM whose weights are quantized by us: two grouped products."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Optional

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase

from ...errors import CheckpointError, ConfigError
from ...tensors.experts import sort_by_expert
from ...tensors.intscale_tensor import IntScaleTensor
from .linear import _device
from .weights import cut, grouped_product, hold

if TYPE_CHECKING:  # it imports this module
    from .config import IntScaleVllmConfig

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": nn.functional.silu,
    "gelu": nn.functional.gelu,
    "gelu_tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
}


class IntScaleExpertsMethod(FusedMoEMethodBase):
    """Loads the experts of a layer and runs them as grouped W4A8 products.

    Args:
        config: of the model.
        layer: vLLM's ``RoutedExperts``.
        prefix: its name.

    Raises:
        ConfigError: experts of a kind that is not served.
    """

    def __init__(self, config: IntScaleVllmConfig, layer: Any, prefix: str):
        super().__init__(layer.moe_config)
        self.config, self.prefix = config, prefix
        self.loaded: dict[tuple[int, str], Tensor] = {}
        self.up: Any = None
        self.down: Any = None
        activation = getattr(layer.moe_config.activation, "value", str(layer.moe_config.activation))
        refused = {
            f"the activation {activation!r}": activation not in ACTIVATIONS,
            "biases": layer.moe_config.has_bias,
            "router weights on the input": layer.apply_router_weight_on_input,
            "a limit on the gate (swiglu_limit)": layer.swiglu_limit is not None,
            "redundant experts (EPLB)": layer.moe_config.moe_parallel_config.enable_eplb,
            "LoRA adapters (--enable-lora)": layer.moe_config.is_lora_enabled,
        }
        for what, is_there in refused.items():
            if is_there:
                raise ConfigError(
                    f"{prefix}: experts with {what} are not served quantized: serve this model without intscale."
                )
        self.activation = ACTIVATIONS[activation]

    def create_weights(
        self, layer: nn.Module, num_experts: int, hidden_size: int, intermediate_size_per_partition: int,
        params_dtype: torch.dtype, **extra: Any,
    ) -> None:  # fmt: skip
        """Give the layer parameters ``w13_weight`` and ``w2_weight``, which have shapes and no data."""
        self.experts, self.hidden, self.inner = num_experts, hidden_size, intermediate_size_per_partition
        shapes = {"w13_weight": (2 * self.inner, hidden_size), "w2_weight": (hidden_size, self.inner)}
        for name, shape in shapes.items():
            data = torch.empty((num_experts, *shape), dtype=params_dtype, device="meta")
            parameter = nn.Parameter(data, requires_grad=False)
            layer.register_parameter(name, parameter)
            parameter.weight_loader = self._loader(layer)  # type: ignore[attr-defined]

    def _loader(self, layer: Any) -> Any:
        def load(
            param: Tensor,
            loaded_weight: Tensor,
            weight_name: str,
            shard_id: str,
            expert_id: int,
            return_success: bool = False,
        ) -> Optional[bool]:
            local = layer.expert_map_manager.map_global_to_local(expert_id)
            if local != -1:
                name = f"{self.prefix}.{expert_id}.{shard_id}"
                weight = self.config.quantize(loaded_weight, name)
                if not isinstance(weight, IntScaleTensor):
                    raise ConfigError(
                        f"{name} is plain where other experts are quantized: quantize all experts or none."
                    )
                self._keep(local, shard_id, weight, layer.moe_config, name)
            return (local != -1) if return_success else None

        return load

    def _keep(self, expert: int, shard: str, weight: Tensor, moe: Any, name: str) -> None:
        """This rank's part of one projection of one expert."""
        dim = 1 if shard == "w2" else 0
        wanted = [self.hidden, self.hidden]
        wanted[dim] = self.inner * moe.tp_size
        if tuple(weight.shape) != tuple(wanted):
            raise CheckpointError(
                f"{name}: the checkpoint has {tuple(weight.shape)} where vLLM has {tuple(wanted)}: its "
                "config.json is another model's."
            )
        if (expert, shard) in self.loaded:
            raise CheckpointError(f"{name}: it is stored twice: save the checkpoint again.")
        self.loaded[expert, shard] = cut(weight, dim, self.inner * moe.tp_rank, self.inner, name, moe.tp_size)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Stack what was loaded and pack it for the device."""
        if self.up is not None:
            return  # processed before
        ids = range(self.experts)
        missing = [f"{e}.{shard}" for e in ids for shard in ("w1", "w2", "w3") if (e, shard) not in self.loaded]
        if missing:
            raise CheckpointError(
                f"{self.prefix}.{missing[0]}: it was not loaded ({len(missing)} such weights): the checkpoint is incomplete, or "
                "was not read by vLLM's default loader (leave --load-format out)."
            )
        up = torch.stack([torch.cat([self.loaded.pop((e, "w1")), self.loaded.pop((e, "w3"))]) for e in ids])
        down = torch.stack([self.loaded.pop((e, "w2")) for e in ids])
        del layer.w13_weight, layer.w2_weight
        device = _device()
        (self.up,) = hold(layer, [up], device, "intscale_up")
        (self.down,) = hold(layer, [down], device, "intscale_down")

    def get_fused_moe_quant_config(self, layer: nn.Module) -> None:
        """None: vLLM's own kernels are not used."""
        return

    def apply(
        self, layer: Any, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, shared_experts: Any = None,
        shared_experts_input: Optional[Tensor] = None,
    ) -> Tensor:  # fmt: skip
        """The weighted sum of the chosen experts, ``[tokens, hidden]``.

        Args:
            layer: that holds the weights.
            x: ``[tokens, hidden]``.
            topk_weights, topk_ids: ``[tokens, k]``; experts of other ranks count for nothing.
            shared_experts, shared_experts_input: run by vLLM.
        """
        tokens, chosen = topk_ids.shape
        ids = topk_ids.long()
        if layer.expert_map is not None:
            local = layer.expert_map.to(ids.device).long()[ids]
            ids = torch.where(local < 0, self.experts, local)  # behind all experts: zeros
        order, offsets = sort_by_expert(ids.reshape(-1), self.experts)
        y = grouped_product(layer, self.up, x, offsets, row_index=order // chosen)
        gate, up = y.chunk(2, dim=-1)
        y = grouped_product(layer, self.down, self.activation(gate) * up, offsets, out_index=order)
        weighted = y * topk_weights.reshape(-1, 1)
        return weighted.view(tokens, chosen, -1).sum(dim=1).to(x.dtype)
