"""Perplexity of a model, and how far its logits are from those of the original."""

from __future__ import annotations

import dataclasses
import math
import sysconfig
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional, Union

import torch
from torch import Tensor
from torch.nn import functional as F

from ..debug.noise import jittered
from ..debug.sqnr import sqnr
from ..errors import ConfigError
from ..quantization.output_probe import longest_text
from ..tensors.stored_files import first_line
from .loading import is_quantized

STDLIB = Path(__file__).with_name("stdlib_modules.txt")  # names of modules


@dataclass
class Evaluation:
    """What ``evaluate`` measured.

    Attributes:
        sequences, tokens: how many sequences of how many tokens.
        perplexity: exp of the mean loss of the next token within each sequence.
        original_perplexity: of the original; this and what follows are None where there is none.
        snr_db: power of the original's logits over that of their difference, in decibels; None where there is none or the
            logits are equal.
        kl: mean divergence of the next token's distribution from the original's, in nats.
        same_token: fraction of positions at which both find the same token most likely.
        noise_floor_db: signal to noise between two runs of the model on the first sequence, whose embeddings differ in their
            last bits (:mod:`~.debug.noise`); None without an original, or where the logits are equal.
        seconds: of all forward passes.
    """

    sequences: int
    tokens: int
    perplexity: float
    original_perplexity: Optional[float] = None
    snr_db: Optional[float] = None
    kl: Optional[float] = None
    same_token: Optional[float] = None
    noise_floor_db: Optional[float] = None
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return dataclasses.asdict(self)


def stdlib_texts() -> list[str]:
    """Sources of some modules of the running Python's standard library, those of ``benchmarks/perplexity.py``."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = (root / name for name in STDLIB.read_text().split())  # other Pythons lack some
    return [path.read_text(encoding="utf-8") for path in paths if path.is_file()]


def read_texts(paths: Iterable[Union[str, Path]]) -> list[str]:
    """The text of each file.

    Raises:
        ConfigError: a file does not exist, is empty, or is not text in UTF-8.
    """
    texts = []
    for path in map(Path, paths):
        if not path.is_file():
            raise ConfigError(f"{path}: there is no such file: give a text file.")
        try:
            texts.append(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"{path}: byte {error.start} is not UTF-8, and replaced characters would be measured as text: convert the file, "
                "for example with iconv."
            ) from error
        except OSError as error:
            raise ConfigError(f"{path}: it cannot be read: {first_line(error)}.") from error
        if not texts[-1].strip():
            raise ConfigError(f"{path} is empty: give a file with text.")
    return texts


def token_sequences(tokenizer: Any, texts: Sequence[str], sequences: int, tokens: int) -> Tensor:
    """At most ``sequences`` sequences of ``tokens`` ids ``[S, T]``, cut from the texts one after the other.

    Every text follows the tokenizer's token for the beginning, where it has one.

    Raises:
        ConfigError: the texts are shorter than one sequence, or a number is not positive.
    """
    if sequences < 1 or tokens < 2:
        raise ConfigError(f"sequences={sequences}, tokens={tokens}: use at least 1 sequence of at least 2 tokens.")
    begin = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    ids: list[int] = []
    for text in texts:
        ids += [*begin, *tokenizer(text, add_special_tokens=False, verbose=False).input_ids]
        if len(ids) >= sequences * tokens:
            break
    whole = min(sequences, len(ids) // tokens)
    if whole == 0:
        raise ConfigError(f"the text has {len(ids)} tokens, fewer than --tokens {tokens}: lower it, or give more text.")
    return torch.tensor(ids[: whole * tokens]).view(whole, tokens)


@torch.no_grad()
def evaluate(model: Any, sequences: Tensor, original: Optional[Any] = None, *, progress: bool = False) -> Evaluation:
    """Perplexity of a causal language model and, against an original, what quantization changed.

    Args:
        model: returns ``logits`` of ``[1, T]`` token ids.
        sequences: token ids ``[S, T]``.
        original: a model with the same vocabulary.
        progress: show a bar on a terminal.

    Raises:
        ConfigError: a model is not a causal language model, takes fewer tokens, or the two have different vocabularies.
    """
    # Comes with transformers.
    from tqdm.auto import tqdm

    for one in [model] if original is None else [model, original]:
        _check_causal(one, sequences)
    totals = _Totals()
    start = time.perf_counter()
    for row in tqdm(sequences, desc="evaluate", unit="seq", disable=None if progress else True, leave=False):
        ids = row[None]
        logits = model(ids.to(model.device), use_cache=False).logits[0].float()
        against = None if original is None else original(ids.to(original.device), use_cache=False).logits[0].float()
        totals.add(row, logits, against)
    seconds = time.perf_counter() - start
    result = totals.evaluation(sequences.shape[0], sequences.shape[1], seconds, original is not None)
    if original is not None:
        result.noise_floor_db = _noise_floor(model, sequences[:1].to(model.device))
    return result


def _noise_floor(model: Any, ids: Tensor) -> Optional[float]:
    logits = model(ids, use_cache=False).logits
    with jittered(model):
        floor = sqnr(logits, model(ids, use_cache=False).logits)
    return None if math.isinf(floor) else floor


def _check_causal(model: Any, sequences: Tensor) -> None:
    config = getattr(model, "config", None)
    generates = getattr(model, "can_generate", lambda: True)()
    if not generates or getattr(config, "is_encoder_decoder", False):
        raise ConfigError(f"{type(model).__name__} is no causal language model: perplexity is not defined for it.")
    longest = longest_text(config)
    if longest is not None and sequences.shape[1] > longest:
        raise ConfigError(f"--tokens {sequences.shape[1]} is more than the {longest} that the model takes: lower it.")


class _Totals:
    """Sums over sequences, in float64."""

    def __init__(self) -> None:
        self.loss = self.original_loss = self.power = self.error = self.kl = 0.0
        self.same = self.positions = self.predicted = 0

    def add(self, ids: Tensor, logits: Tensor, original: Optional[Tensor]) -> None:
        """One sequence: ids ``[T]`` and logits ``[T, V]`` of one or both models."""
        self.predicted += len(ids) - 1
        self.positions += len(ids)
        self.loss += _loss(ids, logits)
        if original is None:
            return
        if original.shape != logits.shape:
            raise ConfigError(
                f"the models have vocabularies of {logits.shape[-1]} and {original.shape[-1]}: give the original of this one."
            )
        original = original.to(logits.device)
        self.original_loss += _loss(ids, original)
        self.power += float(original.double().square().sum())
        self.error += float((original.double() - logits.double()).square().sum())
        self.same += int((original.argmax(-1) == logits.argmax(-1)).sum())
        ours, theirs = F.log_softmax(logits, -1), F.log_softmax(original, -1)
        self.kl += float(F.kl_div(ours, theirs, reduction="sum", log_target=True))

    def evaluation(self, sequences: int, tokens: int, seconds: float, compared: bool) -> Evaluation:
        """Means of what was added."""
        result = Evaluation(sequences, tokens, _exp(self.loss / self.predicted), seconds=seconds)
        if compared:
            result.original_perplexity = _exp(self.original_loss / self.predicted)
            result.snr_db = 10 * math.log10(self.power / self.error) if self.error > 0 else None
            result.kl, result.same_token = self.kl / self.positions, self.same / self.positions
        return result


def _loss(ids: Tensor, logits: Tensor) -> float:
    """Sum of the next-token losses of one sequence."""
    return float(F.cross_entropy(logits[:-1], ids[1:].to(logits.device), reduction="sum"))


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def evaluate_tasks(
    model: Any, tokenizer: Any, tasks: Sequence[str], limit: Optional[int] = None, *, task_manager: Optional[Any] = None
) -> dict[str, Any]:
    """Results of lm-eval's tasks, by task; needs the extra ``eval``.

    A model with our weights runs as lm-eval's model ``intscale``, any other as it is.

    Args:
        model: a loaded transformers model.
        tokenizer: its tokenizer.
        tasks: names; patterns with ``*`` too.
        limit: examples of each task.
        task_manager: lm-eval's, for tasks of your own.

    Raises:
        VersionError: lm-eval is not installed.
        ConfigError: lm-eval knows no such task, or cannot load its data.
    """
    # Optional.
    from ..integrations.lm_eval import IntScaleLM

    from lm_eval import simple_evaluate  # isort: skip
    from lm_eval.models.huggingface import HFLM  # isort: skip
    from lm_eval.tasks import TaskManager  # isort: skip

    manager = task_manager or TaskManager()
    if missing := [task for task in tasks if not manager.match_tasks([task])]:
        raise ConfigError(f"lm-eval has no task {missing[0]!r}: python -m lm_eval ls tasks lists them.")
    wrapped = (IntScaleLM if is_quantized(model) else HFLM)(pretrained=model, tokenizer=tokenizer)
    try:
        found = simple_evaluate(
            model=wrapped, tasks=manager.match_tasks(list(tasks)), limit=limit, task_manager=manager, bootstrap_iters=0
        )
    except (OSError, ValueError) as error:
        raise ConfigError(f"lm-eval cannot run {', '.join(tasks)}: {first_line(error)}.") from error
    return found["results"]
