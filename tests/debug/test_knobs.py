"""``INTSCALE_DEBUG``: what each level writes, and what is wrong with a wrong level or folder."""

import runpy
import subprocess
import sys
import xml.etree.ElementTree

import pytest
import torch
from torch import nn

from intscale_compile.debug import compile_times, knobs, svg
from intscale_compile.errors import ConfigError
from tests.debug.test_stages import Block, recorded
from tests.support import forks


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("INTSCALE_DEBUG_DIR", str(tmp_path / "out"))
    torch._dynamo.reset()
    yield tmp_path / "out"
    torch._dynamo.reset()


def compiled(model=None):
    with torch.no_grad():
        torch.compile(model or Block(), backend="intscale")(torch.randn(3, 64))


def written(folder):
    return sorted(path.relative_to(folder).parts[-1] for path in folder.rglob("*") if path.is_file())


def test_nothing_is_written_without_a_level(folder, monkeypatch, capfd):
    for level in (None, "0", ""):
        monkeypatch.delenv("INTSCALE_DEBUG", raising=False)
        if level is not None:
            monkeypatch.setenv("INTSCALE_DEBUG", level)
        compiled(nn.Linear(64, 64).requires_grad_(False))
        torch._dynamo.reset()
    assert not folder.exists() and "intscale:" not in capfd.readouterr().err


def test_levels_escalate(folder, monkeypatch, capfd):
    monkeypatch.setenv("INTSCALE_DEBUG", "1")
    compiled()
    assert written(folder) == ["summary.txt"]
    assert "3 of 4 products with weights quantized" in capfd.readouterr().err
    torch._dynamo.reset()
    monkeypatch.setenv("INTSCALE_DEBUG", "2")
    compiled()
    assert written(folder) == ["passes.txt", "summary.txt"]
    (passes,) = folder.rglob("passes.txt")
    assert "merge_siblings            1" in passes.read_text() and "small.weight: TOO_SMALL" in passes.read_text()
    torch._dynamo.reset()
    monkeypatch.setenv("INTSCALE_DEBUG", "3")
    compiled()
    graphs = ["00_dynamo", "02_insert_qdq", "04_share_quantize", "05_merge_siblings", "06_fuse", "12_final"]
    names = [name for name in written(folder) if name[0].isdigit()]
    assert [name.partition("_")[2] for name in names] == [
        f"{g.partition('_')[2]}.{end}" for g in graphs for end in ("py", "svg")
    ]
    assert (folder / "summary.txt").read_text().count("products with weights quantized") == 3
    monkeypatch.setenv("INTSCALE_DEBUG", "4")
    for _ in range(2):
        torch._dynamo.reset()
        compiled()
        assert not compile_times()[-1].cached  # else nothing would be generated
    kernels = list(folder.rglob("kernels/*.py"))
    assert kernels and all("intscale.w4a8_linear" in path.read_text() for path in kernels)


def test_graphs_on_disk_run_and_pictures_are_svg(folder, monkeypatch):
    monkeypatch.setenv("INTSCALE_DEBUG", "3")
    compiled()
    for path in folder.rglob("*.py"):
        runpy.run_path(str(path))["forward"]
    (fused,) = folder.rglob("*_fuse.py")
    assert "import intscale_compile" in fused.read_text()  # a fork has it
    done = forks.run("plain", fused, timeout=300)
    assert done.returncode == 0 and "tensor(" in done.stdout, done.stderr
    for path in folder.rglob("*.svg"):
        xml.etree.ElementTree.parse(path)


def test_pictures_mark_what_the_pass_changed():
    compilation, _ = recorded(Block(), torch.randn(3, 64))
    root = xml.etree.ElementTree.fromstring(svg.draw(compilation.stage("fuse")))
    names = "{http://www.w3.org/2000/svg}"
    texts = ["".join(text.itertext()) for text in root.iter(f"{names}text")]
    marked = [rect for rect in root.iter(f"{names}rect") if rect.get("class") == "mark"]
    assert sum("intscale.w4a8_linear(" in text for text in texts) == 2
    assert len(marked) == len(compilation.stage("fuse").new_names - {"output"}) > 0
    assert not any(text.startswith("intscale_qdata") for text in texts)  # weights are left out
    unchanged = xml.etree.ElementTree.fromstring(svg.draw(compilation.stage("experts")))
    assert not [rect for rect in unchanged.iter(f"{names}rect") if rect.get("class") == "mark"]


def test_a_wrong_level_is_an_error(monkeypatch):
    monkeypatch.setenv("INTSCALE_DEBUG", "9")
    torch._dynamo.reset()
    with pytest.raises(ConfigError, match=r"INTSCALE_DEBUG='9' is not a level: use 1 \(summary\)"):
        knobs.debug_level()
    with pytest.raises(Exception, match="INTSCALE_DEBUG='9'"):
        compiled(nn.Linear(64, 64).requires_grad_(False))
    torch._dynamo.reset()


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("INTSCALE_DEBUG_DIR", str(tmp_path / "file"))
    monkeypatch.setenv("INTSCALE_DEBUG", "3")
    torch._dynamo.reset()
    compiled()
    assert "INTSCALE_DEBUG_DIR: debug output cannot be written" in caplog.text
    torch._dynamo.reset()


TRITON = """
import os, sys, triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from intscale_compile.debug.knobs import debug_patches

@triton.jit
def double(x, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + i, tl.load(x + i, mask=i < n) * 2, mask=i < n)

if __name__ == "__main__":
    debug_patches()
    source = ASTSource(double, {"x": "*fp32", "n": "i32", "BLOCK": "constexpr"}, {(2,): 128})
    for _ in range(2):  # the second one comes out of Triton's cache
        triton.compile(source, target=GPUTarget("cuda", 90, 32))
"""


@pytest.mark.slow
def test_machine_code_of_triton_kernels_is_written(tmp_path, monkeypatch):
    script = tmp_path / "kernel.py"
    script.write_text(TRITON)
    for level, suffixes in (("3", set()), ("4", {".ptx", ".sass"})):
        monkeypatch.setenv("INTSCALE_DEBUG", level)
        monkeypatch.setenv("INTSCALE_DEBUG_DIR", str(tmp_path / level))
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
        done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        files = list((tmp_path / level).rglob("double.*"))
        assert {path.suffix for path in files} == suffixes
    (sass,) = [path for path in files if path.suffix == ".sass"]
    assert "LDG" in sass.read_text() and "STG" in sass.read_text()
