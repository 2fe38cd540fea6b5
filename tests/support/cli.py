"""The command line in this process and in one of its own, and a small model to use it on."""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch

CHECKOUT = Path(__file__).resolve().parents[2]


@contextlib.contextmanager
def restored() -> Iterator[None]:
    """Levels of loggers, variables, filters of warnings and progress bars as they were: the command line quietens libraries."""
    from intscale_cli.output import NOISY

    levels = {name: logging.getLogger(name).level for name in NOISY}
    bars = "transformers" in sys.modules and sys.modules["transformers"].utils.logging.is_progress_bar_enabled()
    try:
        with mock.patch.dict(os.environ), warnings.catch_warnings():
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        if bars:
            sys.modules["transformers"].utils.logging.enable_progress_bar()


def in_process(capsys, *arguments) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command that runs here."""
    from intscale_cli import main

    capsys.readouterr()
    with restored(), pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return stop.value.code or 0, out, err


def in_shell(*arguments, code: str = "", **environment: str) -> subprocess.CompletedProcess:
    """A command in a fresh Python, as a shell starts it; ``code`` runs before it."""
    start = ["-c", f"{code}\nimport intscale_cli; intscale_cli.main()"] if code else ["-m", "intscale_cli"]
    paths = os.pathsep.join(filter(None, [str(CHECKOUT), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, *start, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)


def save_small_llama(folder: Path, text: str, **changes) -> Path:
    """A random Llama of two layers and a tokenizer trained on ``text``, as a transformers folder."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([text], vocab_size=320, special_tokens=["<s>"], show_progress=False)
    PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token="<s>").save_pretrained(folder)
    settings = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}
    settings |= {"num_key_value_heads": 1, "vocab_size": 320, "max_position_embeddings": 128, "bos_token_id": 0}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**settings | changes))
    model.save_pretrained(folder)
    return folder
