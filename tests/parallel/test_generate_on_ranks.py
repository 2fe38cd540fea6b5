"""``generate`` of a model that is divided among ranks, with the option for its collectives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from intscale_compile import prepare_for_generation
from intscale_compile.errors import ConfigError
from tests.support.ranks import run_ranks

SCRIPT = Path(__file__).with_name("_generate_main.py")


@pytest.mark.slow
def test_generate_on_two_ranks(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setenv("INTSCALE_LINKS", str(tmp_path / "links"))
    monkeypatch.setenv("TORCHINDUCTOR_FX_GRAPH_CACHE", "0")
    first, second = run_ranks(SCRIPT, 2, tmp_path, "auto", fork=False)  # the environment is read at imports
    assert torch.equal(first["auto"], second["auto"]) and first["auto"].shape == (1, 14)
    assert torch.equal(first["auto"], first["whole"]), "plain sums over gloo, as there is no symmetric memory"
    decisions = first["auto decisions"]
    assert decisions.count("COLLECTIVE_PLAIN") == 2, decisions


def test_communication_of_another_backend_or_of_no_kind_is_refused():
    for arguments in ({"backend": "inductor", "communication": "auto"}, {"communication": "int3"}):
        with pytest.raises(ConfigError, match="communication"):
            prepare_for_generation(torch.nn.Linear(4, 4), **arguments)
