"""``intscale doctor``: what it finds here, and what it says where something is missing or broken."""

from __future__ import annotations

import importlib.metadata
import json

import pytest
import torch

pytest.importorskip("typer", reason="typer is not installed: pip install 'intscale-compile[cli]'")

from intscale_cli import doctor  # noqa: E402
from intscale_cli.doctor import BROKEN, NOTE, OK, fits, folder, package  # noqa: E402
from intscale_compile.commands import check_linear, self_check  # noqa: E402
from intscale_compile.errors import CompileError  # noqa: E402
from tests.support.cli import in_process  # noqa: E402


def diagnosis(**options) -> dict[str, doctor.Check]:
    return {check.name: check for check in doctor.diagnose(**options)}


@pytest.mark.parametrize(
    "version, wanted, answer",
    [
        ("2.13.0+cpu", ">=2.11,<2.14", True),
        ("2.14.0.dev20270101", ">=2.11,<2.14", False),
        ("2.9.1", ">=2.11,<2.14", False),
        ("2.11", ">=2.11.0", True),
        ("0.4.13", ">=0.4.13", True),
        ("0.4.9", ">=0.4.13", False),
        ("3.6.0", "", True),
    ],
)
def test_version_bounds(version, wanted, answer):
    assert fits(version, wanted) is answer


def test_packages():
    assert package("torch", ">=2.11", None).status == OK
    old = package("torch", ">=99", None)
    assert old.status == BROKEN and old.mend == "pip install 'torch>=99'"
    assert old.found == f"{importlib.metadata.version('torch')}, needed >=99"
    assert package("no-such-package", "", None).status == BROKEN
    missing = package("no-such-package", ">=1", "eval")
    assert missing.status == NOTE and missing.mend == "pip install 'intscale-compile[eval]'"


def test_this_machine(capsys):
    code, stdout, _ = in_process(capsys, "doctor", "--quick", "--json")
    report = json.loads(stdout)
    checks = {check["name"]: check for check in report["checks"]}
    assert code == 0 and report["ok"], [check for check in report["checks"] if check["status"] == BROKEN]
    assert checks["W4A8 linear, cpu"]["found"] == "integers equal to the bit"
    assert checks["backend"]["found"].endswith("intscale_compile.backend:intscale")
    if not torch.cuda.is_available():
        assert checks["GPU"]["status"] == NOTE


def test_the_layer_is_compiled_too():
    check_linear("cpu", compiled=True)


def test_wrong_integers_are_found(capsys, monkeypatch):
    def wrong(*operands):
        return torch.ops.intscale.w4a8_accumulate.default(*operands) + 1

    monkeypatch.setattr(self_check, "ACCUMULATE_OP", wrong)
    with pytest.raises(CompileError, match="960 of 960 integer sums are wrong on cpu"):
        check_linear("cpu", compiled=False)
    code, stdout, stderr = in_process(capsys, "doctor", "--quick")
    assert code == 1 and stderr == "" and "BROKEN W4A8 linear, cpu: 960 of 960" in stdout


def test_a_library_that_cannot_be_imported(capsys, monkeypatch):
    """What comes after it is left out, and the mend is said."""
    real = doctor.importlib.import_module

    def refuse(name):
        if name == "intscale_compile":
            raise OSError("libcudart.so.13: cannot open shared object file")
        return real(name)

    monkeypatch.setattr(doctor.importlib, "import_module", refuse)
    code, stdout, _ = in_process(capsys, "doctor")
    assert code == 1 and "BROKEN import: import intscale_compile: libcudart.so.13" in stdout and "mend:" in stdout
    assert "W4A8 linear" not in stdout


def test_not_installed(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.importlib.metadata, "requires", missing)
    monkeypatch.setattr(doctor.importlib.metadata, "entry_points", lambda **_: ())
    checks = [*doctor.packages(), doctor.backend()]
    assert [check.status for check in checks] == [BROKEN, BROKEN] and all("pip install" in c.mend for c in checks)


def test_folders(tmp_path):
    assert folder("cache", tmp_path / "new" / "deep", "X").status == OK and not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("")
    broken = folder("cache", tmp_path / "file" / "deep", "TRITON_CACHE_DIR")
    assert broken.status == BROKEN and "set TRITON_CACHE_DIR" in broken.mend


def test_a_damaged_table_of_tiles(tmp_path, monkeypatch):
    from intscale_compile.kernels import tile_tables

    path = tmp_path / "table.json"
    path.write_text("[]")
    monkeypatch.setenv(tile_tables.VARIABLE, str(path))
    check = {check.name: check for check in doctor.folders()}["table table.json"]
    assert check.status == BROKEN and "Mend or delete the file" in check.found


@pytest.mark.parametrize(
    "capability, obstacle, status, said",
    [
        (90, None, OK, "Gluon kernels"),
        (90, "the Gluon kernels were checked with others", NOTE, "plain Triton, since the Gluon kernels were checked"),
        (80, "the GPU has capability 80, the Gluon kernels are for 90 (Hopper)", OK, "plain Triton, since the GPU"),
        (75, "older", NOTE, "tested from 80 on"),
    ],
)
def test_what_runs_on_a_gpu(monkeypatch, capability, obstacle, status, said):
    from intscale_compile.kernels import gluon_launch, triton_gemm

    memory = type("Properties", (), {"total_memory": 80e9})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Fake GPU")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: memory)
    monkeypatch.setattr(triton_gemm, "capability", lambda device: capability)
    monkeypatch.setattr(gluon_launch, "missing_feature", lambda number: obstacle)
    check = doctor.gpu(0)
    assert check.status == status and said in check.found and "Fake GPU" in check.found


def test_a_cpu_that_saturates(monkeypatch):
    from intscale_compile.kernels import cpu_gemm

    monkeypatch.setattr(cpu_gemm, "int8_product_is_exact", lambda: False)
    assert doctor.processor().status == NOTE and "exact but slow" in doctor.processor().found
