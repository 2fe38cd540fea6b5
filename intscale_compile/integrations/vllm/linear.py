"""Linear layers of vLLM whose weights are quantized by us."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Optional

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import (
    WEIGHT_LOADER_V2_SUPPORTED,
    LinearMethodBase,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.parameter import ModelWeightParameter

from ...errors import CheckpointError, ConfigError
from ...tensors.intscale_tensor import IntScaleTensor
from .weights import Rows, WeightForm, cut, hold, joined, product

if TYPE_CHECKING:  # it imports this module
    from .config import IntScaleVllmConfig


class LoadedWeight(ModelWeightParameter):
    """What vLLM's loaders load into: it has the shape of the weight and no data, and keeps the rows that they bring.

    vLLM's layers say which rows and features of a stored tensor a rank holds, and where they belong in a merged layer.

    Attributes:
        rows: what was loaded.
        layer_name: in vLLM.
    """

    def __init__(self, layer_name: str, **kwargs: Any):
        super().__init__(output_dim=0, input_dim=1, **kwargs)
        self.rows: list[Rows] = []
        self.layer_name = layer_name

    def keep(self, start: int, weight: Tensor) -> None:
        """Rows from ``start`` on, of all input features of this rank."""
        self._check(weight, 1, self.shape[1])
        self.rows.append(Rows(start, weight))

    def _part(self, weight: Tensor, dim: int, rank: int, size: int, parts: int) -> Tensor:
        """The part of number ``rank`` of a weight that is whole, which has ``parts`` of them."""
        self._check(weight, dim, size * parts)
        return cut(weight, dim, rank * size, size, self.layer_name, self.tp_size)

    def _check(self, weight: Tensor, dim: int, size: int) -> None:
        """vLLM's loaders would take the first rows of a weight that is too large."""
        if weight.dim() != 2 or weight.shape[dim] != size:
            what = "input features" if dim else "output rows"
            raise CheckpointError(
                f"{self.layer_name}: the checkpoint has a weight {tuple(weight.shape)} where vLLM has {size} {what}: its "
                "config.json is another model's, or it is damaged."
            )

    def load_column_parallel_weight(self, loaded_weight: Tensor) -> None:
        """This rank's rows of a whole weight."""
        self.keep(0, self._part(loaded_weight, 0, self.tp_rank, self.shape[0], self.tp_size))

    def load_row_parallel_weight(self, loaded_weight: Tensor) -> None:
        """This rank's input features of a whole weight."""
        self.keep(0, self._part(loaded_weight, 1, self.tp_rank, self.shape[1], self.tp_size))

    def load_merged_column_weight(self, loaded_weight: Tensor, **where: Any) -> None:
        """This rank's rows of one of several merged weights."""
        self.keep(where["shard_offset"], self._part(loaded_weight, 0, self.tp_rank, where["shard_size"], self.tp_size))

    def load_qkv_weight(self, loaded_weight: Tensor, **where: Any) -> None:
        """This rank's heads of a query, key or value weight; keys and values may be replicated."""
        copies = 1 if where["shard_id"] == "q" else where["num_heads"]
        part = self._part(loaded_weight, 0, self.tp_rank // copies, where["shard_size"], self.tp_size // copies)
        self.keep(where["shard_offset"], part)


class IntScaleLinearMethod(LinearMethodBase):
    """Loads a linear layer and runs it as W4A8, or plain where the checkpoint holds it plain.

    Args:
        config: of the model.
        prefix: name of the layer in vLLM.
    """

    def __init__(self, config: IntScaleVllmConfig, prefix: str):
        self.config, self.prefix = config, prefix
        self.forms: tuple[WeightForm, ...] = ()
        self.dtype = torch.float32

    def create_weights(
        self, layer: nn.Module, input_size_per_partition: int, output_partition_sizes: list[int], input_size: int,
        output_size: int, params_dtype: torch.dtype, **extra: Any,
    ) -> None:  # fmt: skip
        """Give the layer a parameter ``weight`` that keeps what is loaded."""
        shape = (sum(output_partition_sizes), input_size_per_partition)
        weight = LoadedWeight(
            layer_name=self.prefix,
            data=torch.empty(shape, dtype=params_dtype, device="meta"),
            weight_loader=self._loader(layer, extra["weight_loader"]),
        )
        layer.register_parameter("weight", weight)
        self.dtype = params_dtype

    def _loader(self, layer: Any, loader: Callable) -> Callable:
        """vLLM's own loader of the layer, handed weights that are quantized, whole, before it cuts them."""
        cuts = getattr(loader, "__name__", "") == "weight_loader_v2"

        def load(param: LoadedWeight, loaded_weight: Tensor, *shard: Any, **named: Any) -> None:
            weight = self.config.quantize(loaded_weight, self.prefix)
            if cuts and not shard and not named and weight.shape[0] > layer.output_size:
                raise CheckpointError(
                    f"{self.prefix}: the checkpoint has {weight.shape[0]} output rows where vLLM has {layer.output_size}: its "
                    "config.json is another model's."
                )
            if cuts:
                loader(param, weight, *shard, **named)
            elif shard or named or weight.shape != param.shape:
                raise ConfigError(
                    f"{self.prefix}: vLLM loads this kind of layer in a way that is not known here: leave it out with "
                    '--hf-overrides \'{"quantization_config_dict_json": "{\\"ignore\\": [...]}"}\'.'
                )
            else:
                param.keep(0, weight)

        return load

    def process_weights_after_loading(self, layer: Any) -> None:
        """Join what was loaded and pack it for the device."""
        loaded = layer.weight
        if not isinstance(loaded, LoadedWeight):
            return  # processed before
        weights = joined(loaded.rows, loaded.shape[0], self.prefix)
        device, dtype = _device(), self.dtype
        del layer.weight
        if not any(isinstance(weight, IntScaleTensor) for weight in weights):
            layer.weight = nn.Parameter(torch.cat(weights).to(device, dtype), requires_grad=False)
            layer.quant_method = UnquantizedLinearMethod()
            layer.quant_method.process_weights_after_loading(layer)
            return
        if self.prefix.endswith("kv_b_proj") and any(getattr(w, "activation_scale", None) is not None for w in weights):
            raise ConfigError(
                f"{self.prefix} has a static activation scale, and vLLM's latent attention reads the weight by products with "
                "unit vectors, which such a scale clips: quantize this layer without one."
            )
        plain = [w if isinstance(w, IntScaleTensor) else w.to(dtype) for w in weights]
        self.forms = hold(layer, plain, device)
        # vLLM's name for packed weights: adapters and latent attention ask such a layer for its device. No parameter of its own.
        layer.__dict__["weight_packed"] = self.forms[0].codes(layer)

    def apply(self, layer: nn.Module, x: Tensor, bias: Optional[Tensor] = None) -> Tensor:
        """``x @ W.T + bias``, activations quantized per token, or with the weight's static scale."""
        return product(layer, self.forms, x, bias)


def _device() -> torch.device:
    from vllm.platforms import current_platform  # it looks for devices

    kind = current_platform.device_type
    return torch.device(kind, torch.accelerator.current_device_index()) if kind != "cpu" else torch.device(kind)


if IntScaleLinearMethod.__name__ not in WEIGHT_LOADER_V2_SUPPORTED:
    register_weight_loader_v2_supported_method(IntScaleLinearMethod)
