"""The number that separates cache entries: it changes with what generated code depends on, and with nothing else."""

import shutil

import pytest

from intscale_compile.kernels.abi import FILES, FOLDERS, KERNEL_ABI, ROOT, _source_hash


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    root = tmp_path_factory.mktemp("abi") / "package"
    shutil.copytree(ROOT, root, ignore=shutil.ignore_patterns("__pycache__"))
    return root


def changed(path, root) -> bool:
    text = path.read_text()
    path.write_text(text + "\n")
    different = _source_hash(root) != KERNEL_ABI
    path.write_text(text)
    return different


def test_a_change_of_what_generated_code_depends_on_changes_it(copy):
    assert _source_hash(copy) == KERNEL_ABI
    sources = [next((copy / folder).rglob("*.py")) for folder in FOLDERS] + [copy / name for name in FILES]
    for path in (*sources, copy / "kernels" / "template.py", next((copy / "kernels" / "tables").glob("*.json"))):
        assert changed(path, copy), path


def test_nothing_else_does(copy):
    others = [p for p in copy.iterdir() if p.is_dir() and p.name not in FOLDERS and p.name != "__pycache__"]
    assert {"commands", "explanation", "calibration"} <= {p.name for p in others}
    for folder in others:
        path = next(p for p in folder.rglob("*.py") if str(p.relative_to(copy)) not in FILES)
        assert not changed(path, copy), path
    assert not changed(copy / "__init__.py", copy)
