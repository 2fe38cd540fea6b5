"""The command line as a shell starts it: a fresh process each."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from pathlib import Path

import pytest

from tests.support import forks
from tests.support.cli import CHECKOUT, in_shell

pytest.importorskip("typer", reason="typer is not installed: pip install 'intscale-compile[cli]'")

WITHOUT = "import sys; sys.modules['{name}'] = None"
NO_TORCH = "import atexit, sys; atexit.register(lambda: print('torch' in sys.modules))"


def test_help_imports_no_torch():
    """That would take seconds."""
    done = in_shell("--help", code=NO_TORCH)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "False"
    for command in ("quantize", "inspect", "eval", "bench", "tune", "doctor"):
        assert command in done.stdout
    done = in_shell("quantize", "--help", code=NO_TORCH)
    assert "intscale quantize meta-llama" in done.stdout and done.stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize("name", ["typer", "rich"])
def test_a_missing_library_is_one_line(name):
    done = in_shell("--help", code=WITHOUT.format(name=name))
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == f"intscale: {name} is not installed: pip install 'intscale-compile[cli]'\n"


def test_wrong_path_and_missing_gpu(tmp_path):
    """A Python just started says the first, too: tests/test_api.py."""
    paths = [str(tmp_path / name) for name in ("nothing", "out")]
    done = forks.run("plain", "intscale_cli", "quantize", *paths, timeout=300, HF_HUB_OFFLINE="1")
    assert done.returncode == 2 and done.stdout == ""
    mend = "give the folder of a transformers model, or its hub name."
    assert done.stderr == f"intscale: {tmp_path}/nothing: there is no such folder: {mend}\n"
    done = forks.run("plain", "intscale_cli", "tune", timeout=300, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.splitlines()) == 1
    assert "needs a GPU" in done.stderr and "run it on the machine to tune for" in done.stderr


def test_wrong_option():
    done = in_shell("quantize", "a", "b", "--confg", "group_size=64", code=NO_TORCH)
    assert done.returncode == 2 and done.stdout == "False\n" and len(done.stderr.splitlines()) == 1
    assert "No such option: --confg" in done.stderr and "See 'intscale quantize --help'." in done.stderr


def test_doctor_where_torch_is_broken():
    """intscale_compile cannot be imported there; the doctor can."""
    done = in_shell("doctor", "--json", code=WITHOUT.format(name="torch"))
    report = json.loads(done.stdout)
    assert done.returncode == 1 and not report["ok"] and done.stderr == ""
    assert report["checks"][-1]["name"] == "import" and report["checks"][-1]["status"] == "broken"


def test_trained_model_there_and_back(models_dir, tmp_path):
    """What a new user types: quantize, then measure what was saved against the original."""
    done = in_shell("quantize", models_dir / "tiny-llama", tmp_path / "w4a8")
    assert (done.returncode, done.stderr) == (0, "") and "80.0% quantized" in done.stdout
    options = ["--stdlib", "--sequences", 1, "--tokens", 128, "--against", models_dir / "tiny-llama", "--json"]
    done = in_shell("eval", tmp_path / "w4a8", *options)
    result = json.loads(done.stdout)
    assert (done.returncode, done.stderr) == (0, "")
    assert 1 < result["perplexity"] / result["original_perplexity"] < 1.25 and result["snr_db"] > 10


def test_data_files_are_packaged():
    """What is no Python file has to be named in pyproject.toml, or an installed copy lacks it."""
    tomllib = pytest.importorskip("tomllib")
    tools = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["tool"]["setuptools"]
    for package in ("intscale_compile", "intscale_cli"):
        root = CHECKOUT / package
        named = {path for pattern in tools["package-data"].get(package, ()) for path in root.glob(pattern)}
        data = {path for path in root.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
        assert data == named and f"{package}*" in tools["packages"]["find"]["include"]


def test_console_script():
    scripts = [e for e in importlib.metadata.entry_points(group="console_scripts") if e.name == "intscale"]
    if not scripts:
        pytest.skip("the installed metadata is older than the console script: pip install -e .")
    assert scripts[0].value == "intscale_cli:main" and (Path(sys.executable).parent / "intscale").is_file()
