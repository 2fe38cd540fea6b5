"""Private names of other packages: all are there, all that are used are listed, and a missing one is said."""

from __future__ import annotations

import ast
import functools
import logging
import re
import subprocess
import sys
import types
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

import intscale_compile
from intscale_cli import doctor
from intscale_compile.errors import VersionError
from intscale_compile.integrations import after_import, registry, transformers, weight_updates
from intscale_compile.integrations import torchao as ours
from intscale_compile.integrations.registry import CHANGED, FOUND, MISSING, NAMES, NOT_INSTALLED, PrivateName
from intscale_compile.reasons import log_once
from intscale_compile.saving.shard_reading import register_sharded_loading

PACKAGE = Path(intscale_compile.__file__).parent


@pytest.fixture
def declared():
    """Entries that a test declares are no part of the list afterwards."""
    before = len(NAMES)
    yield
    del NAMES[before:]


@pytest.fixture
def said(caplog):
    """Messages since the test began, also those that were said before."""
    log_once.cache_clear()
    caplog.set_level(logging.INFO, "intscale_compile")
    yield lambda: [record.getMessage() for record in caplog.records]
    log_once.cache_clear()


def test_every_name_is_there():
    pytest.importorskip("transformers")
    states = {name.target: name.state().state for name in NAMES if registry.installed(name.package)}
    assert {target: state for target, state in states.items() if state != FOUND} == {}
    assert len(states) > 100 and all(name.purpose for name in NAMES)


# --- the list is complete -----------------------------------------------------------------------------------------------

OF_PYTHON = {"_asdict", "_fields", "_replace", "_field_defaults", "_getframe"}  # namedtuples; frames
OF_TRITON = {"_reinterpret", "_init_handles"}  # Gluon's own language; kernels.prepared looks whether it is there


@functools.lru_cache(maxsize=1)
def _sources():
    """Every file with all nodes of its syntax tree, walked once."""
    return [(path, list(ast.walk(ast.parse(path.read_text())))) for path in sorted(PACKAGE.rglob("*.py"))]


def _dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        base = _dotted(node.value)
        return f"{base}.{node.attr}" if base else ""
    return node.id if isinstance(node, ast.Name) else ""


def _is_private(dotted: str) -> bool:
    return any(part.startswith("_") and not part.startswith("__") for part in dotted.split("."))


def _imported(nodes: list[ast.AST]):
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_every_private_name_that_is_used_is_listed():
    listed = {name.target.replace(":", ".") for name in NAMES}
    leaves = {part for target in listed for part in re.findall(r"\w+", target)}
    own = {
        name
        for _, nodes in _sources()
        for node in nodes
        for name in (
            *([node.name] if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else ()),
            *([node.id] if isinstance(node, ast.Name) else ()),
            *([node.arg] if isinstance(node, ast.arg) else ()),
            *([node.attr] if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) else ()),
        )
    }
    unlisted = []
    for path, nodes in _sources():
        where = path.relative_to(PACKAGE)
        for dotted in _imported(nodes):
            foreign = dotted.startswith(("torch.", "torchao.", "transformers."))
            if foreign and _is_private(dotted) and not any(n.startswith(dotted) for n in listed):
                unlisted.append(f"{where}: {dotted}")
        for node in nodes:
            if isinstance(node, ast.Attribute) and _is_private(node.attr):
                dotted = _dotted(node)
                whole = dotted.startswith("torch.") and not any(n.startswith(dotted) for n in listed)
                if dotted.startswith(("aten.", "torch.ops.aten.")):  # an operator's name
                    continue
                unknown = node.attr not in leaves | own | OF_PYTHON | OF_TRITON
                if whole and not dotted.startswith(("torch._dynamo", "torch._inductor")) or unknown:
                    unlisted.append(f"{where}:{node.lineno}: {dotted or node.attr}")
    assert unlisted == []


def test_only_the_registry_patches():
    """Assignments to what another package's class or module holds are made in integrations/ only."""
    pattern = re.compile(r"^\s*(torch|torchao|transformers|TritonKernel|AsyncCompile)\.[\w.]+ = ", re.M)
    found = [p.name for p, _ in _sources() if p.parent.name != "integrations" and pattern.search(p.read_text())]
    assert found == []


# --- where one is missing -----------------------------------------------------------------------------------------------


def test_without_a_fallback_it_is_an_error(declared):
    name = PrivateName("torch._C:no_such_name", "nothing")
    assert name.state().state == MISSING
    wanted = (
        rf"torch\._C:no_such_name is not there in torch {re.escape(version('torch'))} \(nothing\): install a version that it "
        r"was checked with: pip install 'torch>=2\.11,<2\.16'\."
    )
    with pytest.raises(VersionError, match=wanted):
        name.get()
    with pytest.raises(VersionError, match=wanted):
        name.find()


def test_with_a_fallback_it_is_said_once(declared, said):
    name = PrivateName("torch._C:no_such_name", "nothing", "something else is done")
    assert name.find() is None and name.find() is None and not name.there()
    (message,) = said()
    assert "(nothing); something else is done: install" in message
    with name.patched(lambda f: f) as possible:
        assert not possible


def test_another_form_and_another_package(declared):
    assert PrivateName("torch:relu_", "x", "y", parameters=("nothing",)).state().state == CHANGED
    assert PrivateName("torch:nn", "x", "y", form=lambda found: False).state().state == CHANGED
    assert PrivateName("no_such_package.module:name", "x", "y").state().state == NOT_INSTALLED


def test_explain_repeats_what_was_missing(declared):
    name = PrivateName("torch:nowhere_to_be_found", "a test", "the slow way is taken")
    model, x = torch.nn.Linear(64, 64).requires_grad_(False), torch.randn(2, 64)
    assert not [note for note in intscale_compile.explain(model, x).notes if "slow way" in note]
    name.find()
    assert name.message(MISSING) in intscale_compile.explain(model, x).notes
    assert "torch:nowhere_to_be_found is not there in torch" in str(intscale_compile.explain(model, x))


def test_load_state_dict_is_wrapped_once_and_listed():
    weight_updates.after_load_state_dict(lambda module: None)
    wrapped = torch.nn.Module.load_state_dict
    weight_updates.after_load_state_dict(lambda module: None)
    assert torch.nn.Module.load_state_dict is wrapped and wrapped.__wrapped__.__name__ == "load_state_dict"
    assert weight_updates.LOADING in NAMES and weight_updates.LOADING.state().state == FOUND


def test_import_fails_with_the_name_that_is_missing():
    """In a process of its own: torch without one of the names that files import directly."""
    code = "import torch._guards; del torch._guards.detect_fake_mode; import intscale_compile"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1
    assert last.startswith("intscale_compile.errors.VersionError: torch._guards:detect_fake_mode is not there in torch")


def test_patched_is_undone(declared):
    class Owner:
        value = 3

    module = types.ModuleType("torch_patch_target")
    module.Owner = Owner
    sys.modules[module.__name__] = module
    name = PrivateName("torch_patch_target:Owner.value", "x", probe=None)
    try:
        registry.installed.cache_clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(registry, "installed", lambda package: "1.0")
            with pytest.raises(ZeroDivisionError), name.patched(lambda value: value + 1):
                assert Owner.value == 4
                _ = 1 / 0
        assert Owner.value == 3
    finally:
        del sys.modules[module.__name__]


# --- transformers -------------------------------------------------------------------------------------------------------


def _remove(monkeypatch, name):
    """A function of a module, or a class with all that is wrapped of it but for this method, inherited ones included."""
    assert name.state().state == FOUND
    module, _, path = name.target.partition(":")
    if "." not in path:
        monkeypatch.delattr(sys.modules[module], path)
        return
    owner = name._owner()
    left = [n.attribute for n in transformers.HOOKED if n is not name and n._owner() is owner]
    bare = type(owner.__name__, (), {attribute: getattr(owner, attribute) for attribute in left})
    monkeypatch.setattr(sys.modules[module], owner.__name__, bare)


@pytest.mark.parametrize("name", transformers.HOOKED, ids=lambda name: name.attribute)
def test_a_hook_of_transformers_is_missing(name, monkeypatch, said):
    """Each is said with what does not work then and the mend; the others are still in place."""
    pytest.importorskip("transformers")
    _remove(monkeypatch, name)
    register_sharded_loading()
    (message,) = [text for text in said() if name.attribute in text]
    assert message.startswith(f"{name.target} is not there in transformers") and name.fallback in message
    assert message.endswith("pip install 'transformers>=5.17,<5.25'.")
    for other in transformers.HOOKED:
        if other is not name:
            assert getattr(other.find(), "_intscale_wrapped", False)


def test_a_module_of_transformers_is_missing(monkeypatch, said):
    """Its hooks would wait for ever: said when transformers' entrance is imported."""
    pytest.importorskip("transformers")
    monkeypatch.setattr(transformers, "_module_exists", lambda name: "sharding_utils" not in name)
    transformers.look_at_modules()
    (message,) = said()
    assert message.startswith("transformers.distributed.sharding_utils:DtensorShardOperation.shard_tensor is not there")
    assert "cannot read quantized checkpoints shard by shard" in message


def test_a_changed_signature_of_transformers(monkeypatch, said):
    modeling = pytest.importorskip("transformers.modeling_utils")
    monkeypatch.setattr(modeling, "convert_and_load_state_dict_in_model", lambda model, files: None)
    register_sharded_loading()
    assert any(text.startswith(f"{transformers.LOADING.target} has another form") for text in said())


def test_to_find_a_module_does_not_use_up_its_hooks(tmp_path, monkeypatch):
    """Two hooks on one module run once it is loaded, in their order, whoever looked for it before."""
    (tmp_path / "hooked_module.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    ran = []
    after_import.after_import("hooked_module", lambda module: ran.append(("first", module.value)))
    after_import.after_import("hooked_module", lambda module: ran.append(("second", module.value)))
    import importlib.util

    assert importlib.util.find_spec("hooked_module") is not None and ran == []
    import hooked_module

    assert ran == [("first", 1), ("second", 1)]
    assert type(hooked_module.__loader__).__name__ == "SourceFileLoader"
    assert not any(getattr(finder, "name", "") == "hooked_module" for finder in sys.meta_path)
    del sys.modules["hooked_module"]


# --- torchao ------------------------------------------------------------------------------------------------------------


def test_unknown_torchao(monkeypatch, said):
    """A version above the range: said once. Without its registries: what does not work then."""
    monkeypatch.setattr(registry, "installed", lambda package: "0.23.1")
    monkeypatch.delattr(ours.CONFIG_MODULES._owner(), "ALLOWED_AO_MODULES")
    for _ in range(2):
        intscale_compile.register()
    above, missing = said()
    assert above.startswith(
        "torchao 0.23.1 is outside of the range that this release was checked with (>=0.18,<0.19): if"
    )
    assert missing.startswith("torchao.core.config:ALLOWED_AO_MODULES is not there in torchao 0.23.1")
    assert "transformers cannot load checkpoints with an IntScaleConfig" in missing


# --- doctor -------------------------------------------------------------------------------------------------------------


def test_doctor_lists_every_name_with_its_state(monkeypatch):
    checks = {check.name: check for check in doctor.private_names(True)}
    here = [name for name in NAMES if registry.installed(name.package)]
    assert checks.keys() >= {name.target for name in here}
    assert {check.status for check in checks.values()} == {"ok"}
    of_torch = [name for name in here if name.package == "torch"]
    line = checks["private names of torch"].found
    assert line.startswith(f"{len(of_torch)} of {len(of_torch)} found in {version('torch')}")


def test_doctor_says_what_is_missing(monkeypatch):
    import torch._guards

    monkeypatch.delattr(ours.CLASSES._owner(), "ALLOWED_CLASSES")
    monkeypatch.delattr(torch._guards, "detect_fake_mode")
    checks = {check.name: check for check in doctor.private_names(False)}
    assert checks[ours.CLASSES.target].status == "note"
    assert ours.CLASSES.fallback in checks[ours.CLASSES.target].found
    broken = checks["torch._guards:detect_fake_mode"]
    assert broken.status == "broken" and broken.mend == "pip install 'torch>=2.11,<2.16'"
    assert len(checks) == 2 + len({n.package for n in NAMES if registry.installed(n.package)})
