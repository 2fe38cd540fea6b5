"""The model ``intscale`` of lm-eval (EleutherAI's lm-evaluation-harness): any transformers model, quantized by us.

lm-eval has no entry point for models, so something must import this module first:

    python -m intscale_compile.integrations.lm_eval run --model intscale --tasks lambada_openai \\
        --model_args pretrained=FOLDER_OR_HUB_NAME,scale_bits=8,compile=True

runs lm-eval's own command line after that; in Python, ``import intscale_compile.integrations.lm_eval`` and
``lm_eval.simple_evaluate(model="intscale", model_args=...)``. Needs the extra ``eval``.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any, Optional, Union

import torch
from torchao.quantization import quantize_

from ..calibration.config import CalibrationConfig
from ..calibration.pipeline import calibrate
from ..config import IntScaleConfig
from ..errors import ConfigError, VersionError
from ..importing.checkpoint_files import FORMATS
from ..importing.model import from_quantized
from ..tensors.intscale_tensor import IntScaleTensor
from ..tensors.selection import linears_and_experts
from .registry import PrivateName

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    raise VersionError(
        "intscale_compile.integrations.lm_eval needs lm-eval: pip install 'intscale-compile[eval]'."
    ) from error

log = logging.getLogger("intscale_compile")
PrivateName(
    "lm_eval.models.huggingface:HFLM._create_model",
    "loading checkpoints of other quantizers",
    "they are loaded by transformers and run as it runs them",
    parameters=("pretrained", "revision", "dtype"),
)
PrivateName("lm_eval.__main__:cli_evaluate", "lm-eval's command line")
ONLY_PLAIN = (
    "parallelize",
    "tp_plan",
    "autogptq",
    "gptqmodel",
    "gguf_file",
    "subfolder",
)  # not for imported checkpoints
CONFIG_FIELDS = {field.name for field in dataclasses.fields(IntScaleConfig)}


class IntScaleLM(HFLM):
    """lm-eval's Hugging Face model with weights and activations quantized by intscale.

    A model that holds ``IntScaleTensor`` weights already runs as it is; a GPTQ, AWQ or compressed-tensors checkpoint is
    taken over with its codes; every other model is quantized: with ``IntScaleConfig``, or calibrated.

    Args:
        pretrained: folder or hub name, or a loaded model.
        preset: name of one of ``calibration.PRESETS``; None: ``quantize_`` without calibration.
        calibration_text: file of text for the calibration.
        calibration_sequences: sequences that are cut from it.
        calibration_tokens: tokens in each of them.
        compile: run the model through ``torch.compile(backend="intscale")``.
        kwargs: fields of ``IntScaleConfig`` (``group_size``, ``scale_bits``, ...); everything else goes to lm-eval's
            Hugging Face model.

    Raises:
        ConfigError: a preset without text, or with a model that is quantized already; too little text.
    """

    def __init__(
        self,
        pretrained: Any,
        *,
        preset: Optional[str] = None,
        calibration_text: Union[str, Path, None] = None,
        calibration_sequences: int = 64,
        calibration_tokens: int = 512,
        compile: bool = False,
        **kwargs: Any,
    ):
        self._fields = {name: kwargs.pop(name) for name in CONFIG_FIELDS & set(kwargs)}
        super().__init__(pretrained, **kwargs)
        quantized = any(isinstance(parameter, IntScaleTensor) for parameter in self.model.parameters())
        if quantized and preset is not None:
            raise ConfigError(
                f"preset={preset!r}: the weights of {pretrained} are quantized already; leave preset out."
            )
        if preset is not None:
            data = self._calibration_data(calibration_text, calibration_sequences, calibration_tokens)
            calibrate(self.model, data.to(self.device), CalibrationConfig.from_preset(preset, **self._fields))
        elif not quantized:
            quantize_(self.model, IntScaleConfig(**self._fields), filter_fn=linears_and_experts)
        if compile:
            self.model.compile(backend="intscale")

    def _create_model(
        self, pretrained: str, revision: Optional[str] = "main", dtype: Any = "auto", **kwargs: Any
    ) -> None:
        """Load the model; checkpoints of other quantizers through our importer."""
        if _method(pretrained, revision) not in FORMATS:
            super()._create_model(pretrained, revision=revision, dtype=dtype, **kwargs)
            return
        if refused := [name for name in ONLY_PLAIN if kwargs.get(name)]:
            raise ConfigError(f"{refused} cannot be used with {pretrained}, which is imported: leave them out.")
        options = {name: value for name, value in self._fields.items() if name in ("scale_bits", "amplifier")}
        wanted = getattr(torch, dtype) if isinstance(dtype, str) and dtype != "auto" else dtype
        self._model, report = from_quantized(
            pretrained, dtype=None if wanted == "auto" else wanted, device=self.device, revision=revision, **options
        )
        log.info("%s", report)

    def _calibration_data(self, text: Union[str, Path, None], sequences: int, tokens: int) -> torch.Tensor:
        if text is None:
            raise ConfigError("calibration needs text: pass calibration_text=FILE.")
        ids = self.tokenizer(Path(text).read_text(), add_special_tokens=False, verbose=False).input_ids
        whole = min(sequences, len(ids) // tokens)
        if whole == 0:
            raise ConfigError(
                f"{text} has {len(ids)} tokens, fewer than calibration_tokens={tokens}: use a longer text."
            )
        return torch.tensor(ids[: whole * tokens]).view(whole, tokens)


def _method(pretrained: str, revision: Optional[str]) -> Optional[str]:
    """How a checkpoint says that it was quantized, from its ``config.json`` alone."""
    # Slow to import.
    from transformers.utils import cached_file

    path = cached_file(pretrained, "config.json", revision=revision)
    config = json.loads(Path(str(path)).read_text())
    return (config.get("quantization_config") or {}).get("quant_method")


def main() -> None:
    """lm-eval's command line, with the model ``intscale``."""
    # Optional.
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    from intscale_compile.integrations import (
        lm_eval as registered,  # once more, under the name that lm-eval knows it by
    )

    registered.main()
else:
    register_model("intscale")(IntScaleLM)
