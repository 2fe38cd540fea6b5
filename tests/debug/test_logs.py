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
# A fork of a process that has imported torch and Inductor and nothing of ours. TORCH_LOGS goes before set_logs.
SET_LOGS = """
import os, sys, torch._inductor.config
torch._inductor.config.fallback_by_default = True  # no C++ to compile
torch.compile(lambda x: x + 1)(torch.ones(2))  # what a first compilation looks up
assert not any(name.startswith("intscale") for name in sys.modules), "imported with torch"
if child := os.fork():
    assert os.waitpid(child, 0)[1] == 0
else:
    import logging, traceback
    try:
        for name in ("TORCH_LOGS", "TORCH_TRACE"):
            del os.environ[name]
        torch._logging._internal.LOG_TRACE_HANDLER = None  # the parent's file
        def level(): return logging.getLogger("intscale_compile.passes").getEffectiveLevel()
        torch._logging.set_logs(modules={"intscale": logging.DEBUG})
        import intscale_compile
        assert level() == logging.DEBUG, level()
        torch._logging.set_logs(modules={"intscale": logging.INFO})
        assert level() == logging.INFO, level()
        torch._logging.set_logs()
        assert level() == logging.WARNING, level()
        model = torch.nn.Linear(64, 32).requires_grad_(False)
        for level in (logging.DEBUG, logging.INFO):
            torch._logging.set_logs(modules={"intscale": level})
            print("---", file=sys.stderr)
            torch._dynamo.reset()
            with torch.no_grad():
                torch.compile(model, backend="intscale")(torch.randn(2, 64))
        print("---", file=sys.stderr, flush=True)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)
"""
# What torch runs of ours for our names: nothing is imported, and reading them takes no part of the import worth naming.
IMPORT = """
import os, sys, time
taken = time.process_time()
import torch
taken, names, setting = time.process_time() - taken, os.environ["TORCH_LOGS"], time.process_time()
os.environ["TORCH_LOGS"] = "+intscale,intscale_graphs"
torch._logging._internal._init_logs()
setting = time.process_time() - setting
assert not any(n.startswith("intscale") for n in sys.modules)
assert setting < 0.1 * taken, (setting, taken)
os.environ["TORCH_LOGS"] = names
torch._logging._internal._init_logs()
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


def test_names_work_without_an_import_of_ours(tmp_path):
    """In one process: what the names take of ``import torch``, levels by ``set_logs`` before and after our import and what
    two of them show, and then what the variable asks for, with the artifacts for tlparse."""
    trace = tmp_path / "trace"
    text = run(IMPORT + SET_LOGS + MODEL, tmp_path, TORCH_LOGS="intscale_graphs", TORCH_TRACE=str(trace))
    _, debug, info, graphs = text.split("---\n")
    check_shown("+intscale", debug)
    check_shown("intscale", info)
    check_shown("intscale_graphs", graphs)
    check_trace(trace)


@pytest.mark.slow
@pytest.mark.parametrize("value", ["intscale", "+intscale"])
def test_other_names(value, tmp_path):
    check_shown(value, run(MODEL, tmp_path, TORCH_LOGS=value, TORCH_TRACE=str(tmp_path / "trace")))
    check_trace(tmp_path / "trace")


def test_the_package_itself_is_a_name_too(tmp_path):
    """torch imports it then, in the middle of its own import."""
    code = "import logging, torch\nassert logging.getLogger('intscale_compile').isEnabledFor(logging.DEBUG)"
    run(code + "\nimport intscale_compile; intscale_compile.compare", tmp_path, TORCH_LOGS="+intscale_compile")


def test_the_names_are_single_files_that_torch_does_not_import():
    for name in ("intscale", "intscale_graphs"):
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.submodule_search_locations is None
    assert intscale.compare is intscale_compile.compare
