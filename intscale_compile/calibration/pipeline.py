"""``calibrate``: quantize the weights of a transformers model layer by layer, with regard to what the layers see."""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Optional, Union

import torch
from torch import Tensor, nn

from ..errors import CalibrationError
from ..progress import block_bar
from ..quantization import quantize_output_embedding
from ..reasons import log_once
from ..tensors.expert_layers import expert_stacks
from ..tensors.selection import linears_and_experts, mark_decided, model_weights
from ..tensors.weight_checks import check_module
from .block_clipping import learn_block_steps
from .capture import Data, StackInputs, Statistics, batches_of, capture, digest_of, relative_error, statistics
from .changes import announce, changes_of, check_model
from .clipping import on_integer_grid
from .config import CalibrationConfig, as_calibration_config
from .distilling_plan import DistillingPlan
from .dividing import divided
from .layers import Inputs, LinearWeight, eager_experts, run_block, stacks, stages, weights_of
from .replay import Replay, replayed
from .report import CalibrationReport
from .restoring import restored_on_failure
from .resume import Checkpoint
from .rotated_inputs import rotate_inputs
from .rotation import NotRotatableError, rotate
from .smoothing import EQUALIZATIONS, ActivationPolicy, smooth_awq, smooth_fptq
from .solve import Codes, FloatScaleWeight, frozen, set_integer, solve
from .tuning import tune_block

CONFIG_ATTRIBUTE = "intscale_calibration_config"


def calibrate(
    model: nn.Module,
    data: Data,
    config: Union[str, CalibrationConfig] = "best",
    *,
    checkpoint_dir: Union[str, Path, None] = None,
    progress: bool = True,
    restore: bool = True,
) -> CalibrationReport:
    """Quantize a transformers decoder or encoder in place, layer by layer.

    The blocks are taken one after the other. What a block reads comes from the blocks before it as they are quantized,
    8-bit activations included; inside of a block later weights see what the quantized earlier ones make of it. Weights
    outside of the blocks (embeddings, ``lm_head``) and what ``quantize`` leaves alone (routers, tiny layers, weights that the
    model reads itself) stay as they are; ``base_config.output_embedding`` quantizes ``lm_head`` too, in the end, without data.

    Args:
        model: any transformers model whose layers are in an ``nn.ModuleList``, in eval mode, not quantized.
        data: token ids ``[S, T]``, a list of token ids, or a list of dictionaries of model inputs; tokens that an
            ``attention_mask [B, T]`` in these leaves out count nowhere (experts, the encoder and decoder of one model, static
            scales of activations and tuning look at them all the same).
        config: the name of a preset or a ``CalibrationConfig``; it is kept in
            ``model.config.intscale_calibration_config``.
        checkpoint_dir: finished blocks are stored there; the same call goes on where an interrupted one stopped, and one with
            more data behind ``statistics_tokens`` takes them too.
        progress: show a bar, with the loss of each block.
        restore: a call that fails or is interrupted leaves the model as it was. That takes a copy of the model in host
            memory until the end; False: none is kept, and the model of a failed call must be loaded anew.

    Returns:
        The losses of the blocks and the names of the weights.

    Raises:
        CalibrationError: no data, data or activations that are not finite, an unknown kind of model, or a
            ``checkpoint_dir`` of another configuration, model or data.
        ConfigError: an unknown preset, or something else than a configuration.
        WeightError: a weight that cannot be quantized, such as one with NaN entries.
    """
    chosen = as_calibration_config(config)
    first, rest = divided(data, chosen.statistics_tokens)
    batches = batches_of(first)
    check_model(model)
    report = CalibrationReport(chosen)
    store = Checkpoint.open(checkpoint_dir, chosen, digest_of(batches), model) if checkpoint_dir is not None else None
    before = announce(model, chosen)
    plan, original = DistillingPlan.of(first, rest, chosen).prepared(model)
    with restored_on_failure(model, restore):
        _calibrate_blocks(model, batches, chosen, report, store, progress)
        if chosen.base_config.output_embedding is not None:
            report.weights += quantize_output_embedding(model, chosen.base_config)
        report.distillation, report.how_distilled = plan.run(model, original, progress)
        _finish(model, chosen)
    report.changes = changes_of(model, before)
    return report


def _calibrate_blocks(
    model: nn.Module,
    batches: list,
    chosen: CalibrationConfig,
    report: CalibrationReport,
    store: Optional[Checkpoint],
    progress: bool,
) -> None:
    """Every block of every stack, one after the other; in place."""
    order = stacks(model)
    left = _left_alone(model, [block for stack in order for _, block in stack])
    with torch.no_grad(), block_bar("calibrate", sum(map(len, order)), progress) as bar, eager_experts(model):
        sizes = _rotated(model, chosen, batches[0], left)
        for stack in order:
            _calibrate_stack(model, stack, batches, chosen, report, store, sizes, left, bar)
        if chosen.scales == "integer":
            make_integer(model)


def _calibrate_stack(
    model: nn.Module,
    stack: list[tuple[str, nn.Module]],
    batches: list,
    chosen: CalibrationConfig,
    report: CalibrationReport,
    store: Optional[Checkpoint],
    sizes: dict[str, int],
    left: set[tuple[int, str]],
    bar: Any,
) -> None:
    """The blocks of one stack: what each reads is what the one before it makes of the data."""
    inputs = capture(model, stack, batches)
    streams = _Streams(inputs, list(inputs.hidden), list(inputs.hidden))
    for place, (name, block) in enumerate(stack):
        bar.set_postfix_str(name)
        _Block(name, block, place, streams, chosen, report, store, sizes, left).process()
        bar.set_postfix_str(f"{name}: {report.losses[name]:.2e}")
        bar.update(1)


def quantize_blocks(
    model: nn.Module,
    batches: list,
    chosen: CalibrationConfig,
    report: CalibrationReport,
    weights: set[tuple[int, str]],
    rotations: dict[str, int],
    progress: bool,
) -> None:
    """Quantize some weights of a model, whose others may be quantized already, as ``calibrate`` does; in place.

    Args:
        model: as for ``calibrate``, but for quantized weights.
        batches: of ``batches_of``.
        chosen: without smoothing, rotation and tuning, which would change the other weights.
        report: the losses and names of what is quantized are added.
        weights: which ones, by the id of their module and the name of the parameter.
        rotations: sizes of the online transform of those that have one, by layer.
        progress: show a bar.

    Raises:
        CalibrationError, WeightError: as for ``calibrate``. The model is then half done.
    """
    order = stacks(model)
    inside = [module for stack in order for _, block in stack for module in block.modules()]
    others = {(id(module), leaf) for module in inside for leaf, _ in module.named_parameters(recurse=False)}
    with torch.no_grad(), block_bar("calibrate", sum(map(len, order)), progress) as bar, eager_experts(model):
        for stack in order:
            _calibrate_stack(model, stack, batches, chosen, report, None, rotations, others - weights, bar)
        make_integer(model)


def _left_alone(model: nn.Module, layers: list[nn.Module]) -> set[tuple[int, str]]:
    """Weights (module and name) that stay in high precision, as ``quantize`` decides.

    Raises:
        WeightError: one of the others cannot be quantized; nothing has been changed yet.
        CalibrationError: layers share one of the others.
    """
    weights = list(model_weights(model).values())
    owners = [(owner, weight.reason) for weight in weights for owner in weight.owners]
    left = {(id(module), leaf) for (_, module, leaf), reason in owners if reason is not None}
    inside = {id(module) for layer in layers for module in layer.modules()}
    for weight in weights:
        names = [f"{name}.{leaf}" for name, module, leaf in weight.owners if id(module) in inside]
        if weight.reason is None and names and len({id(module) for _, module, _ in weight.owners}) > 1:
            raise CalibrationError(
                f"{names[-1]} is one parameter with {len(weight.owners) - 1} other(s), but a weight is calibrated for the inputs "
                "of one layer: give each layer its own (layer.weight = nn.Parameter(layer.weight.clone())), or call quantize, "
                "which keeps them shared."
            )
    for name, module in model.named_modules():
        if id(module) in inside and linears_and_experts(module):
            for leaf in expert_stacks(module) or ("weight",):
                if (id(module), leaf) not in left:
                    check_module(module, leaf, f"{name}.{leaf}")
    return left


def _rotated(model: nn.Module, chosen: CalibrationConfig, batch: dict, left: set[tuple[int, str]]) -> dict[str, int]:
    """Rotate the model if the configuration wants it; sizes of the online transforms by layer."""
    if chosen.rotation == "none":
        return {}
    try:
        return rotate_inputs(model, batch, left) if chosen.rotation == "inputs" else rotate(model, seed=chosen.seed)
    except NotRotatableError as error:
        if chosen.rotation == "hadamard":
            raise
        log_once(logging.WARNING, f"calibrated without a rotation: {error}")
        return {}


@dataclass
class _Streams:
    """Hidden states of every batch before the current block: of the original model, and of the quantized one."""

    inputs: StackInputs
    original: list[Tensor]
    quantized: list[Tensor]

    def runs(self, hidden: list[Tensor], place: int, device: torch.device) -> list[Callable]:
        return [partial(self.inputs.inputs, batch, place, states, device) for batch, states in enumerate(hidden)]


@dataclass
class _Block:
    """One block on its way from original to quantized."""

    name: str
    block: nn.Module
    place: int
    streams: _Streams
    options: CalibrationConfig
    report: CalibrationReport
    store: Optional[Checkpoint]
    rotations: dict[str, int]
    left_alone: set[tuple[int, str]]
    original: Optional[nn.Module] = None
    replay: Optional[Replay] = None
    original_replay: Optional[Replay] = None
    policies: dict[str, ActivationPolicy] = field(default_factory=dict)
    learned: dict[str, Tensor] = field(default_factory=dict)

    def process(self) -> None:
        """Quantize the block and move both streams of hidden states behind it."""
        self.device = next(self.block.parameters()).device
        target = self._outputs(self.streams.original)
        stored = self.store.load(self.name) if self.store is not None else None
        if stored is not None:
            stored.apply(self.block)
            names = list(stored.weights)
        else:
            names = self._quantize(target)
            if self.options.tuning_steps:
                self.replay = None  # what it knows changes
                self._tune(target)
            if self.store is not None:
                self.store.save(self.name, self.block)
        self.report.weights += [f"{self.name}.{n}" for n in names]
        output = self._outputs(self.streams.quantized, self.replay)
        self.report.losses[self.name] = relative_error(output, target, self.name, self.streams.inputs.masks)
        self.streams.original, self.streams.quantized = target, output

    def _runs(self, hidden: list[Tensor]) -> list[Callable[[], Inputs]]:
        return self.streams.runs(hidden, self.place, self.device)

    def _smooth(self) -> None:
        batches = _Lazy(self._runs(self.streams.quantized))
        if self.options.smoothing in EQUALIZATIONS:
            how = EQUALIZATIONS[self.options.smoothing], self.options.activation == "fptq-paper"
            self.policies = smooth_fptq(self.block, batches, *how)
        elif self.options.smoothing == "awq":
            smooth_awq(self.block, batches, self.options.base_config)

    def _outputs(self, hidden: list[Tensor], replay: Optional[Replay] = None) -> list[Tensor]:
        outputs = []
        for batch, inputs in enumerate(self._runs(hidden)):
            with replayed(replay, batch):
                outputs.append(run_block(self.block, inputs()).cpu())
        return outputs

    def _quantize(self, target: list[Tensor]) -> list[str]:
        self._smooth()
        names = []
        first = self._runs(self.streams.quantized)[0]()
        if self.options.clipping == "block":
            self._learn(first, target)
        self.replay = Replay(self.block)
        if self.options.match_original:
            self.original = copy.deepcopy(self.block)
            self.original_replay = Replay(self.original)
        for stage in stages(self.block, first):
            known: dict[int, Statistics] = {}  # weights with the same number of dimensions share what they read
            for weight in stage:
                if weight.router or (id(weight.module), weight.parameter) in self.left_alone:
                    continue
                dims = weight.weight.dim()
                if dims not in known and self.options.needs_statistics:
                    known[dims] = self._statistics(weight)
                self._quantize_weight(weight, known.get(dims))
                names.append(weight.qualified)
        return names

    def _learn(self, first: Inputs, target: list[Tensor]) -> None:
        found = [w for stage in stages(self.block, first) for w in stage if not w.router]
        chosen = [w for w in found if (id(w.module), w.parameter) not in self.left_alone]
        weights = {w: self.options.config_of(f"{self.name}.{w.name}") for w in chosen}
        runs, seed = self._runs(self.streams.quantized), self.options.seed
        self.learned = learn_block_steps(self.block, weights, runs, target, seed)

    def _statistics(self, weight: LinearWeight) -> Statistics:
        runs, original, replays = self._runs(self.streams.quantized), None, (self.replay, self.original_replay)
        if self.original is not None and weight.weight.dim() == 2:
            original = self.original, weights_of(self.original)[weight.name], self._runs(self.streams.original)
        return statistics(self.block, weight, runs, original, replays, self.streams.inputs.masks)

    def _quantize_weight(self, weight: LinearWeight, seen: Optional[Statistics]) -> None:
        name = f"{self.name}.{weight.qualified}"
        config = self.options.config_of(f"{self.name}.{weight.name}")
        hessian, lost = (None, None) if seen is None else (seen.hessian, seen.lost)
        solved = solve(weight.weight, config, self.options, hessian, name, lost, self.learned.get(weight.name))
        policy = self.policies.get(weight.name)
        if self.options.activation != "dynamic" and policy is not None and policy.static:
            solved.activation_scale = max(policy.limit, 1e-12) / 127
        solved.rotation = self.rotations.get(f"{self.name}.{weight.name}", 0)
        put(weight, solved, name, float_scales=self.options.scales == "float" or not on_integer_grid(config))

    def _tune(self, target: list[Tensor]) -> None:
        tune_block(self.block, self._runs(self.streams.quantized), target, self.options)


class _Lazy(Sequence):
    """Inputs of every batch, each made when it is asked for."""

    def __init__(self, runs: list[Callable[[], Inputs]]):
        self.runs = runs

    def __len__(self) -> int:
        return len(self.runs)

    def __getitem__(self, batch):
        return self.runs[batch]()


def put(weight: LinearWeight, solved: Codes, name: str, *, float_scales: bool) -> None:
    """Give a module its quantized weight."""
    if float_scales:
        setattr(weight.module, weight.parameter, frozen(FloatScaleWeight.of(solved, weight.transposed)))
        return
    tensor = solved.tensor(name)
    set_integer(weight.module, weight.parameter, tensor.transpose(-2, -1) if weight.transposed else tensor)


def make_integer(model: nn.Module, **changes: Any) -> nn.Module:
    """Round the float scales of a calibrated model to integers, codes as they are, in place.

    Args:
        model: calibrated with ``scales="float"``.
        changes: fields of ``IntScaleConfig``, such as ``scale_bits=8`` or ``amplifier=1024``; 8-bit weights stay as they are.

    Raises:
        OverflowProofError: the accumulator of a row cannot be proved free of overflow.
    """
    for name, module in model.named_modules():
        for parameter, value in list(module.named_parameters(recurse=False)):
            if isinstance(value, FloatScaleWeight):
                config = value.source.config
                config = config if config.weight_bits == 8 else dataclasses.replace(config, **changes)
                tensor = value.source.tensor(f"{name}.{parameter}", config)
                set_integer(module, parameter, tensor.transpose(-2, -1) if value.kept_transposed else tensor)
    return model


def _finish(model: nn.Module, chosen: CalibrationConfig) -> None:
    """Keep the configuration with the model, and mark the model, so that the backend leaves alone what was left out."""
    config = getattr(model, "config", None)
    if config is not None:
        setattr(config, CONFIG_ATTRIBUTE, chosen.to_dict())
    mark_decided(model)
