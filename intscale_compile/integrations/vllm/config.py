"""What vLLM asks about a checkpoint: ``QuantizationConfig`` of the quantization ``intscale``."""

from __future__ import annotations

import json
from typing import Any, Optional

import torch
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from ...config import IntScaleConfig
from ...errors import ConfigError
from ...importing.checkpoint_files import checkpoint_folder
from ...tensors.intscale_tensor import IntScaleTensor
from . import NAME
from .checkpoints import PLAIN, compiled_for, is_ours, kind_of, quantized_names
from .experts import IntScaleExpertsMethod
from .linear import IntScaleLinearMethod
from .selection import left_alone


class IntScaleVllmConfig(QuantizationConfig):
    """How the weights of a model are stored, and how plain ones are quantized.

    Args:
        stored: ``quantization_config`` of the checkpoint; None or empty: it is plain.
        online: how plain weights are quantized.
        ignore: names of modules, or parts of them, that stay plain where a plain checkpoint is quantized.

    Raises:
        ConfigError: the checkpoint cannot be served.
    """

    def __init__(
        self,
        stored: Optional[dict[str, Any]] = None,
        online: Optional[IntScaleConfig] = None,
        ignore: tuple[str, ...] = (),
    ):
        super().__init__()
        self.stored = stored
        self.kind = kind_of(stored)
        self.online = online or IntScaleConfig()
        self.ignore = ignore
        self.quantized: list[str] = []

    def get_name(self) -> str:
        """``"intscale"``."""
        return NAME

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """fp16, bf16 and fp32."""
        return [torch.float16, torch.bfloat16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Compute capability 8.0."""
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: ``config.json`` says all."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> IntScaleVllmConfig:
        """For the ``quantization_config`` of a checkpoint."""
        return cls(stored=config)

    @classmethod
    def from_config_dict_json(cls, text: str) -> IntScaleVllmConfig:
        """For ``--hf-overrides '{"quantization_config_dict_json": "{...}"}'``: fields of ``IntScaleConfig``, and ``ignore``.

        Raises:
            ConfigError: no JSON object, or an unknown field.
        """
        mend = 'it is a JSON object of fields of IntScaleConfig and "ignore", a list of names.'
        try:
            fields = json.loads(text)
        except ValueError as error:
            raise ConfigError(f"quantization_config_dict_json: {error}: {mend}") from error
        ignore = fields.pop("ignore", []) if isinstance(fields, dict) else None
        if not isinstance(ignore, list) or not all(isinstance(name, str) for name in ignore):
            raise ConfigError(f"quantization_config_dict_json={text}: {mend}")
        try:
            online = IntScaleConfig(**fields)
        except TypeError as error:
            raise ConfigError(f"quantization_config_dict_json: {error}: {mend}") from error
        if online.output_embedding is not None:
            raise ConfigError("quantization_config_dict_json: output_embedding: vLLM's output embeddings stay plain.")
        return cls(online=online, ignore=tuple(ignore))

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: Optional[str], hf_config: Any = None
    ) -> Optional[str]:
        """Our folders are ours whatever their ``quant_method`` is; others where ``--quantization intscale`` asks for it.

        Raises:
            ConfigError: it asks for a checkpoint that cannot be taken over.
        """
        if user_quant == NAME:
            kind_of(hf_quant_cfg)
            return NAME
        return NAME if is_ours(hf_quant_cfg) and user_quant in (None, "torchao") else None

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: Optional[str] = None) -> None:
        """Find out which modules the checkpoint holds quantized, and let vLLM's cache of compiled models see what it holds.

        Raises:
            ConfigError: fields are given for weights that are quantized already.
        """
        folder = None
        if self.kind != PLAIN and getattr(hf_config, "quantization_config_dict_json", None) is not None:
            raise ConfigError(
                f"{model_name} is quantized already, so quantization_config_dict_json would change nothing: leave it out of "
                "--hf-overrides, or serve the original model."
            )
        if self.kind != PLAIN and self.stored is not None:
            folder = checkpoint_folder(model_name, revision)
            self.quantized = quantized_names(folder, self.stored)
        for config in (hf_config, getattr(hf_config, "text_config", None)):
            if config is not None:
                config.intscale_compiled_for = compiled_for(folder)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """The method of a layer; None: it stays as it is."""
        if isinstance(layer, LinearBase):
            if self.kind == PLAIN and left_alone(prefix, layer.output_size, layer.input_size, self.ignore):
                return UnquantizedLinearMethod()
            return IntScaleLinearMethod(self, prefix)
        if isinstance(layer, RoutedExperts):
            stored = any(".experts" in name for name in self.quantized)
            ignored = self.kind == PLAIN and left_alone(prefix, ignore=self.ignore)
            return (
                IntScaleExpertsMethod(self, layer, prefix) if (stored or self.kind == PLAIN) and not ignored else None
            )
        return None

    def quantize(self, weight: torch.Tensor, name: str) -> torch.Tensor:
        """A weight as it was stored, or, of a plain checkpoint, quantized where vLLM runs the model."""
        return weight if self.kind != PLAIN else _quantized(weight, self.online, name)


def _quantized(weight: torch.Tensor, config: IntScaleConfig, name: str) -> torch.Tensor:
    from vllm.platforms import current_platform  # it looks for devices

    return IntScaleTensor.from_hp(weight.to(current_platform.device_type), config, name=name).to_packing("plain")


def register() -> None:
    """Tell vLLM of the quantization."""
    register_quantization_config(NAME)(IntScaleVllmConfig)
