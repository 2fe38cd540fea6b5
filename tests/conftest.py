"""Fixtures that several test files share."""

from __future__ import annotations

import gc
import logging
import os
import random
import sys
from pathlib import Path

# Many images set it; then every process that a test starts compiles the package's sources again, and every process of
# pytest-xdist rewrites the assertions of all test files.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# Each of pytest-xdist's processes, and what it starts, gets its share of the processors: OpenMP's threads spin while they
# wait for each other. Before torch is imported.
_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if _WORKERS > 1:
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // _WORKERS)))

# Inductor compiles and loads a program, in a Python of its own, to see whether the C++ compiler knows this processor's vector
# instructions: seconds in every process and for every empty cache, that is in hundreds of places here.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")

# Line numbers for debuggers in what Inductor has compiled are a fifth to a third of g++'s time.
os.environ.setdefault("AOT_INDUCTOR_ENABLE_LINE_TABLES", "0")

# What is imported stays: to search it for cycles again and again is a fifth of the time until the first test.
gc.disable()

import pytest  # noqa: E402

from tests.support.bytecode import compile_share  # noqa: E402

SCALAR, VECTORIZED = 1, None


def pytest_configure(config):
    """How torch is set up in processes that run tests; the one that only starts them and collects reports needs no torch."""
    starts_others = bool(config.getoption("numprocesses", None)) and not hasattr(config, "workerinput")
    if starts_others:
        gc.enable()  # it collects no tests
    else:
        if hasattr(config, "workerinput"):
            compile_share(config)
        _set_up_torch()


def _set_up_torch() -> None:
    # Slow to import.
    import torch._dynamo.guards
    import torch._inductor.config

    from tests.support.tracing import quicker_dynamo, same_flags

    # pytest 9 listens to every logger that does not propagate, also to the one for which torch makes a JSON record of each step
    # of a compilation if somebody listens: no test reads it in this process.
    logging.root.manager.loggerDict.pop("torch.__trace", None)
    # Dynamo empties the processor's caches after each compilation to time the guards once, for its own statistics: 20 to 40 ms.
    torch._dynamo.guards.profile_guard_manager = lambda *_: 0.0  # type: ignore[attr-defined]
    quicker_dynamo()
    # g++ takes twice as long for C++ with vector instructions, which is Inductor's work: what our graphs compute is tested
    # without. Files that compare what users run, and what tests start as commands, have them; `--vectorized` gives them to every
    # test.
    torch._inductor.config.cpp.simdlen = SCALAR
    same_flags()
    # Writing and compiling C++ takes longer than everything before it, which is what most tests are about: Dynamo's graph, our
    # passes, AOTAutograd, Inductor's passes and its calls of operators. There Inductor calls the operators of eager mode
    # instead; tests marked `generated`, `vectorized` or `slow`, and what tests start as commands, have C++.
    torch._inductor.config.fallback_by_default = True
    # A package is two C++ files with flags of their own: their headers, compiled ahead, would each be used once.
    torch._inductor.config.aot_inductor.precompile_headers = False
    # What calls operators and hands over addresses is not made faster by optimizing it.
    torch._inductor.config.aot_inductor.compile_wrapper_opt_level = "O0"


# Files of 4 s and more, the longest first: or the last of them would run alone at the end. Those named trained need models.
LONGEST = [
    "parallel/test_trained_shards",
    "kernels/test_gluon_assembly",
    "test_backend",
    "compile/test_export_programs",
    "kernels/test_assembly",
    "test_generation",
    "communication/test_fused_kernel",
    "test_model_families",
    "passes/test_experts_pass",
    "cli/test_commands",
    "test_examples",
    "tensors/test_joined_rows",
    "communication/test_pass",
    "communication/test_message_kernels",
    "importing/test_import_trained",
    "passes/test_causal_attention",
    "debug/test_logs",
    "kernels/test_gluon_grouped_assembly",
    "tensors/test_zero_point",
    "test_docs",
    "kernels/test_gated_assembly",
    "kernels/test_attention_assembly",
    "kernels/test_hadamard",
    "communication/test_collectives",
    "integer/test_families",
    "parallel/test_engine",
    "compile/test_compile_ahead",
    "calibration/test_calibrate",
    "kernels/test_grouped_assembly",
    "debug/test_bisect",
    "explanation/test_explain_report",
    "explanation/test_explain_mends",
    "test_api",
    "passes/test_gated_activation",
    "kernels/test_inductor_codegen",
    "tensors/test_static_activation",
    "integer/test_proof",
    "parallel/test_four_ranks",
    "adapters/test_merging",
    "test_two_doors",
    "kernels/test_triton_interpreter",
    "saving/test_fuzzed_files",
    "adapters/test_training",
    "debug/test_stages",
    "test_generate",
    "importing/test_export",
    "passes/test_other_products",
    "test_output_probe",
    "test_output_embedding",
    "tensors/test_experts",
    "compile/test_weight_guards",
    "importing/test_activation_order",
    "kernels/test_grouped_interpreter",
    "importing/test_refused",
    "passes/test_layout",
    "adapters/test_initialize",
    "passes/test_passes",
    "kernels/test_gptq_block",
    "integrations/test_registry",
    "debug/test_compare",
    "tensors/test_input_order",
    "compile/test_kept_weights",
    "passes/test_weight_rows",
    "test_two_doors_forms",
    "debug/test_knobs",
    "importing/test_import_models",
    "calibration/test_trained_transforms",
]

CHECKOUT = Path(__file__).resolve().parent.parent
_frozen_modules = 0


_graphs_of: str | None = None  # the file whose tests share the graphs that Dynamo has now


@pytest.fixture(autouse=True)
def _fresh(request):
    """Every test starts from the same state, whatever ran before it, so a failure repeats when the test is run alone.

    The random state, the graphs that Dynamo has of a function (with too many it gives up), what was logged once, and
    which private names of other packages were missing. Tests marked ``same_graphs`` that follow each other keep the graphs.
    """
    import torch  # not in a process that only starts others

    from intscale_compile.integrations import registry
    from intscale_compile.reasons import log_once  # not for a test run that only collects

    global _graphs_of
    keeps = str(request.path) if request.node.get_closest_marker("same_graphs") else None
    torch.manual_seed(0)
    if keeps is None or keeps != _graphs_of:
        torch._dynamo.reset()
    _graphs_of = keeps
    log_once.cache_clear()
    registry._said.clear()


def pytest_runtest_setup(item):
    """How Inductor compiles for a test, and for the fixtures of its file that are set up with it."""
    import torch._inductor.config  # not in a process that only starts others

    vectorized = item.config.getoption("--vectorized") or item.get_closest_marker("vectorized")
    asked = item.config.getoption("--generated") or item.get_closest_marker("generated")
    generated = vectorized or asked or item.get_closest_marker("slow") or item.get_closest_marker("gpu")
    torch._inductor.config.cpp.simdlen = VECTORIZED if vectorized else SCALAR
    torch._inductor.config.fallback_by_default = not generated
    if len(sys.modules) > _frozen_modules + 100:
        _freeze()


@pytest.fixture(scope="module")
def _codes() -> dict:
    return {}


@pytest.fixture
def code(request, _codes):
    """Machine code of what the test's mark ``assembles``."""
    pytest.importorskip("triton")
    from tests.support.sass import code_of

    return code_of(request.node, _codes, request.config.getoption("--together"))


@pytest.fixture(scope="session")
def models_dir() -> Path:
    """Folder of the small trained models; they are never part of the checkout."""
    folder = Path(os.environ.get("INTSCALE_MODELS") or CHECKOUT.parent / "shared" / "models")
    if not (folder / "tiny-llama" / "config.json").is_file():
        pytest.skip(f"no trained models in {folder}: set INTSCALE_MODELS to the folder that holds tiny-llama")
    return folder


def pytest_xdist_auto_num_workers(config) -> int:
    """One process a processor: one more, which would work while others wait, loses more by its imports and collection.

    On two processors two took 493 s, three 534 (whole runs in random orders; 2026-11-28).
    """
    return max(2, os.cpu_count() or 1)


def pytest_addoption(parser):
    """``--shuffle 7``: tests in a random order, to find those that depend on what ran before them; ``--vectorized``."""
    parser.addoption(
        "--shuffle", type=int, metavar="SEED", help="files, and the tests in each, in the random order of a seed"
    )
    parser.addoption("--vectorized", action="store_true", help="vector instructions in all C++ that Inductor compiles")
    parser.addoption("--share", metavar="I/N", help="every N-th test, from number I on: see .ci/gpu")
    parser.addoption(
        "--generated", action="store_true", help="C++ of Inductor in all tests, not only in those marked so"
    )
    parser.addoption(
        "--together",
        type=int,
        default=16,
        metavar="TESTS",
        help="tests of a file whose kernels are disassembled at once",
    )


def pytest_collection_finish(session):
    """Keep what was imported out of garbage collection, and search the oldest objects for cycles less often.

    Modules and their docstrings are a million objects: each full collection, of Python or of a test, takes 0.3 s to pass them.
    """
    _freeze()
    gc.set_threshold(700, 10, 100)
    gc.enable()


def _freeze() -> None:
    """What is there now is out of garbage collection: at the start, and again before a test when more was imported."""
    global _frozen_modules
    gc.collect()
    gc.freeze()
    _frozen_modules = len(sys.modules)


def pytest_collection_modifyitems(config, items):
    """Shuffle, or put long files first, and skip tests marked ``gpu`` that were asked for where there is no GPU.

    Files stay whole: their module fixtures are set up once, whatever the order.
    """
    files: dict[str, list] = {}
    for item in items:
        files.setdefault(item.nodeid.partition("::")[0], []).append(item)
    names = sorted(files)
    seed = config.getoption("--shuffle")
    if seed is not None:
        order = random.Random(seed)
        order.shuffle(names)
        for name in names:
            order.shuffle(files[name])
    else:
        places = {f"tests/{name}.py": place for place, name in enumerate(LONGEST)}
        names.sort(key=lambda name: (places.get(name, len(LONGEST)), -len(files[name])))
    first, _, step = (config.getoption("--share") or "0/1").partition("/")
    items[:] = [item for name in names for item in files[name]][int(first) :: int(step)]
    _skip_without_gpus(items)


def _skip_without_gpus(items) -> None:
    import torch  # not in a process that only starts others

    gpus = torch.cuda.device_count()
    for item in items:
        if item.get_closest_marker("gpu") and gpus == 0:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if item.get_closest_marker("two_gpus") and gpus < 2:
            item.add_marker(pytest.mark.skip(reason="needs two GPUs"))
