"""Hooks that run when another package's module is imported, for modules that we must not import ourselves."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable
from typing import Any, Optional


class _AfterImport(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds one module as the other finders do, and calls functions with it once it is loaded."""

    def __init__(self, name: str):
        self.name = name
        self.hooks: list[Callable[[Any], None]] = []
        self._loader: Any = None

    def find_spec(self, name: str, path: Any, target: Any = None) -> Optional[importlib.machinery.ModuleSpec]:
        if name != self.name:
            return None
        finders = [finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec")]
        specs = (finder.find_spec(name, path, target) for finder in finders)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None and spec.loader is not None:
            self._loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> Any:
        return self._loader.create_module(spec)

    def exec_module(self, module: Any) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        if self in sys.meta_path:  # to find a module is not to load it: until then the hooks wait
            sys.meta_path.remove(self)
        for hook in self.hooks:
            hook(module)


def after_import(name: str, hook: Callable[[Any], None]) -> None:
    """Call ``hook(module)``: now where the module ``name`` is imported, else when it will be. Once for each name and hook."""
    module = sys.modules.get(name)
    if module is not None:
        hook(module)
        return
    waiting = next((f for f in sys.meta_path if isinstance(f, _AfterImport) and f.name == name), None)
    if waiting is None:
        waiting = _AfterImport(name)
        sys.meta_path.insert(0, waiting)
    if hook not in waiting.hooks:
        waiting.hooks.append(hook)
