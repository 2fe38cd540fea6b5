"""``TORCH_LOGS`` names in fresh processes that import nothing of ours, tlparse artifacts, and what ``import torch`` costs."""

import importlib.util
import os
import subprocess
import sys

import pytest

import intscale
import intscale_compile

MODEL = """
import sys, torch
assert not any(name.startswith("intscale") for name in sys.modules), "imported with torch"
import torch._inductor.config
torch._inductor.config.fallback_by_default = True  # no C++ to compile
model = torch.nn.Linear(64, 32).requires_grad_(False)
with torch.no_grad():
    torch.compile(model, backend="intscale")(torch.randn(2, 64))
"""
SET_LOGS = """
import logging, torch
def level(): return logging.getLogger("intscale_compile.passes").getEffectiveLevel()
torch._logging.set_logs(modules={"intscale": logging.DEBUG})
import intscale_compile
assert level() == logging.DEBUG, level()
torch._logging.set_logs(modules={"intscale": logging.INFO})
assert level() == logging.INFO, level()
torch._logging.set_logs()
assert level() == logging.WARNING, level()
"""


def run(code, tmp_path, **environment):
    """stderr of a fresh interpreter, started where nothing of ours can be imported by accident."""
    names = ("TORCH_LOGS", "TORCH_TRACE", "PYTHONPATH", "INTSCALE_DEBUG")
    clean = {k: v for k, v in os.environ.items() if k not in names}
    script = tmp_path / "script.py"
    script.write_text(code)
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, env={**clean, **environment}
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


SHOWN = {  # by name: what is logged, and what is not
    "intscale": (["graph with 1 linear products: 1 quantized"], ["pass fuse", "def forward("]),
    "+intscale": (["graph with 1 linear products", "graph 1: pass fuse: 1 in", "weight: quantized"], ["def forward("]),
    "intscale_graphs": (
        ["graph 1 after fuse", "torch.ops.intscale.w4a8_linear"],
        ["linear products", "after experts"],
    ),
}
COMPILE = """
import sys
import torch._inductor.config
torch._inductor.config.fallback_by_default = True
model = torch.nn.Linear(64, 32).requires_grad_(False)
for level in (logging.DEBUG, logging.INFO):
    torch._logging.set_logs(modules={"intscale": level})
    print("---", file=sys.stderr)
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend="intscale")(torch.randn(2, 64))
"""


def check_shown(value, text):
    shown, hidden = SHOWN[value]
    text = text.replace("graph 2:", "graph 1:")
    assert [s for s in shown if s not in text] == [] and [s for s in hidden if s in text] == [], value
    assert text.count("graph with 1 linear products") <= 1  # by one handler


def check_trace(folder):
    (log,) = folder.glob("*.log")
    text = log.read_text()
    for stage in ("dynamo", "insert_qdq", "fuse", "final"):
        assert f'"name": "intscale_1_{stage}"' in text
    assert "intscale_1_experts" not in text  # changed nothing
    assert "torch.ops.intscale.w4a8_linear" in text


@pytest.mark.parametrize(
    "value", ["intscale_graphs", *(pytest.param(name, marks=pytest.mark.slow) for name in ("intscale", "+intscale"))]
)
def test_names_work_without_an_import_of_ours(value, tmp_path):
    """With the artifacts for tlparse in the same process."""
    check_shown(value, run(MODEL, tmp_path, TORCH_LOGS=value, TORCH_TRACE=str(tmp_path / "trace")))
    check_trace(tmp_path / "trace")


def test_set_logs_works_before_and_after_our_import(tmp_path):
    """Levels, and then what two of them show."""
    _, debug, info = run(SET_LOGS + COMPILE, tmp_path).split("---\n")
    check_shown("+intscale", debug)
    check_shown("intscale", info)


def test_the_package_itself_is_a_name_too(tmp_path):
    """torch imports it then, in the middle of its own import."""
    code = "import logging, torch\nassert logging.getLogger('intscale_compile').isEnabledFor(logging.DEBUG)"
    run(code + "\nimport intscale_compile; intscale_compile.compare", tmp_path, TORCH_LOGS="+intscale_compile")


def test_import_torch_is_as_fast_as_before(tmp_path):
    """What torch runs of ours for our names: nothing is imported, and reading them takes no part of the import worth naming."""
    code = """
import sys, time
taken = time.process_time()
import torch
taken, setting = time.process_time() - taken, time.process_time()
torch._logging._internal._init_logs()
setting = time.process_time() - setting
assert not any(n.startswith("intscale") for n in sys.modules)
assert setting < 0.1 * taken, (setting, taken)
"""
    run(code, tmp_path, TORCH_LOGS="+intscale,intscale_graphs")


def test_the_names_are_single_files_that_torch_does_not_import():
    for name in ("intscale", "intscale_graphs"):
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.submodule_search_locations is None
    assert intscale.compare is intscale_compile.compare
