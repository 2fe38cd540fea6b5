"""``lora.initialize``: adapters that begin with what quantization lost (ApiQ, arXiv 2402.05147; LoftQ, arXiv 2310.08659)."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional, Union

import torch
from torch import Tensor, nn

from ..calibration.capture import Data, batches_of
from ..calibration.layers import blocks
from ..errors import ConfigError
from ..progress import block_bar
from .blocks import BlockPair, block_pairs, load_original
from .layers import Adapted, adapted_layers, base_model_of
from .layerwise import from_singular_vectors, solve_block
from .learning import learn_block
from .resuming import FinishedBlocks

METHODS = ("apiq", "apiq-lw", "svd")
PASSES = 3  # over the data, where steps is None


@dataclass
class InitializationReport:
    """What ``lora.initialize`` did.

    Attributes:
        method: how.
        before, after: mean relative squared error of a token behind each block, by name, without the adapter and with it;
            the errors of the blocks before it are in it. Empty for ``"svd"``, which looks at no data.
        layers: names of the layers whose adapter was set.
    """

    method: str
    before: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)
    layers: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        rows = [f"  {name}: {self.before[name]:.3e} -> {after:.3e}" for name, after in self.after.items()]
        return "\n".join([f"{self.method}: {len(self.layers)} adapters; relative error of each block:", *rows])


@dataclass(frozen=True)
class Options:
    """Arguments of ``lora.initialize`` that decide what comes out."""

    method: str
    steps: Optional[int]
    lr: float
    aug_loss: bool
    seed: int
    adapter: Optional[str]

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return dict(vars(self))


def initialize(
    peft_model: Any,
    original: Union[nn.Module, str, Path],
    token_ids: Optional[Data] = None,
    method: str = "apiq",
    *,
    steps: Optional[int] = None,
    lr: float = 1e-3,
    aug_loss: bool = False,
    seed: int = 0,
    adapter: Optional[str] = None,
    overwrite: bool = False,
    checkpoint_dir: Union[str, Path, None] = None,
    progress: bool = True,
) -> InitializationReport:
    """Set LoRA adapters over quantized weights so that the model comes as close to the original as they allow, in place.

    The base stays as it is. Block by block: what a block reads comes from the blocks before it as they are now, quantized
    activations and adapters included.

    Args:
        peft_model: ``get_peft_model(quantized, LoraConfig(...))``, the model quantized by any recipe. The adapter must be new,
            its ``B`` zero.
        original: the model before it was quantized, or the folder that it is read from.
        token_ids: as the data of ``calibrate``; not for ``"svd"``.
        method: ``"apiq"``: gradient descent on the output of each block; ``"apiq-lw"``: layer by layer, each the best of its rank
            for the inputs that it gets, in closed form; ``"svd"``: of the weights' differences, without data.
        steps: of gradient descent for each block, one sequence each; None: three passes over the data.
        lr: where the learning rate begins; it falls to 0 along a cosine.
        aug_loss: count also the difference to what the original block makes of the quantized model's input.
        seed: of the order of the sequences, and of ``A`` with ``overwrite``.
        adapter: name of the adapter; None: the active one.
        overwrite: begin anew where the adapter has been trained.
        checkpoint_dir: finished blocks are stored there; the same call goes on where an interrupted one stopped.
        progress: show a bar.

    Raises:
        ConfigError: an argument that is not supported; no peft model, no LoRA layer over a quantized weight, adapters that were
            trained or are of a kind that is not supported; ``original`` of other shapes.
        CalibrationError: as for ``calibrate``.
    """
    options = Options(method, steps, lr, aug_loss, seed, adapter)
    _check(options, token_ids)
    layers = adapted_layers(peft_model, adapter)
    source = load_original(original)
    _check_original(layers, source)
    _check_fresh(layers, overwrite)
    report = InitializationReport(method, layers=[one.name for one in layers])
    with _adapters_only(peft_model, layers):
        if overwrite:
            _start_anew(layers, seed)
        if method == "svd":
            for one in layers:
                from_singular_vectors(one, source.get_submodule(one.name).weight.detach())  # type: ignore[union-attr, operator]
        else:
            batches = batches_of(token_ids, 1)  # type: ignore[arg-type]
            base = base_model_of(peft_model)
            store = FinishedBlocks.open(checkpoint_dir, options, batches, base)
            _all_blocks(base, source, batches, layers, options, store, report, progress)
    return report


def _all_blocks(
    base: nn.Module,
    source: nn.Module,
    batches: list,
    layers: list[Adapted],
    options: Options,
    store: FinishedBlocks,
    report: InitializationReport,
    progress: bool,
) -> None:
    with block_bar("initialize", len(blocks(base)), progress) as bar:
        for pair in block_pairs(base, source, batches, options.method != "apiq"):
            _one_block(pair, layers, options, store, report)
            bar.update(1)


def _one_block(
    pair: BlockPair, layers: list[Adapted], options: Options, store: FinishedBlocks, report: InitializationReport
) -> None:
    inside = [one for one in layers if one.name.startswith(f"{pair.name}.")]
    before = pair.error()
    parameters = {f"{one.name}.{part}": p for one in inside for part, p in (("A", one.down), ("B", one.up))}
    if inside and not store.load(pair.name, parameters):
        kept = {name: p.detach().clone() for name, p in parameters.items()}
        if options.method == "apiq":
            steps = PASSES * len(pair) if options.steps is None else options.steps
            learn_block(pair, list(parameters.values()), steps, options.lr, options.aug_loss, options.seed)
        else:
            solve_block(pair, inside)
        if not pair.error() < before:
            with torch.no_grad():
                for name, p in parameters.items():
                    p.copy_(kept[name])
        store.save(pair.name, parameters)
    report.before[pair.name], report.after[pair.name] = before, pair.error()
    pair.move_on()


def _check(options: Options, token_ids: Optional[Data]) -> None:
    def need(name: str, ok: bool, allowed: str) -> None:
        if not ok:
            raise ConfigError(f"lora.initialize: {name}={getattr(options, name)!r} is not supported: use {allowed}.")

    need("method", options.method in METHODS, f"one of {METHODS}")
    need(
        "steps",
        options.steps is None or (type(options.steps) is int and options.steps > 0),
        "a positive integer or None",
    )
    positive = isinstance(options.lr, (int, float)) and math.isfinite(options.lr) and options.lr > 0
    need("lr", positive, "a positive number")
    need("seed", type(options.seed) is int and options.seed >= 0, "an integer, 0 or more")
    if options.method != "svd" and token_ids is None:
        raise ConfigError(
            f"lora.initialize: method={options.method!r} needs token_ids: pass some, or use method='svd'."
        )


def _check_original(layers: list[Adapted], original: nn.Module) -> None:
    for one in layers:
        try:
            weight: Any = original.get_submodule(one.name).weight
        except AttributeError:
            raise ConfigError(f"original has no layer {one.name}: pass the model that was quantized.") from None
        if tuple(weight.shape) != tuple(one.weight.shape):
            found, wanted = tuple(weight.shape), tuple(one.weight.shape)
            raise ConfigError(f"original: {one.name}.weight has shape {found}, the quantized one {wanted}.")
        if hasattr(type(weight), "__tensor_flatten__"):
            raise ConfigError(
                f"original: {one.name}.weight is a {type(weight).__name__}: pass the model before it was quantized."
            )


def _check_fresh(layers: list[Adapted], overwrite: bool) -> None:
    trained = next((one.name for one in layers if bool((one.up != 0).any())), None)
    if trained is not None and not overwrite:
        raise ConfigError(
            f"the adapter of {trained} has been trained (its B is not zero): pass overwrite=True to begin anew."
        )


def _start_anew(layers: list[Adapted], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for one in layers:
            down = torch.rand(one.down.shape, generator=generator).mul_(2).sub_(1) / math.sqrt(one.down.shape[1])
            one.down.copy_(down)
            one.up.zero_()


@contextlib.contextmanager
def _adapters_only(peft_model: Any, layers: list[Adapted]) -> Iterator[None]:
    """Only the parameters of the adapter take gradients, in eval mode; what was there before is put back, and after a failure
    the adapter's values too."""
    modes = [(module, module.training) for module in peft_model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in peft_model.parameters()]
    parameters: list[Tensor] = [p for one in layers for p in (one.down, one.up)]
    kept = [p.detach().clone() for p in parameters]
    try:
        peft_model.eval()
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        for parameter in parameters:
            parameter.requires_grad_(True)
        yield
    except BaseException:
        with torch.no_grad():
            for parameter, value in zip(parameters, kept):
                parameter.copy_(value)
        raise
    finally:
        for module, training in modes:
            module.training = training
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
            parameter.grad = (
                None if parameter.grad is not None and any(parameter is p for p in parameters) else parameter.grad
            )
