"""Hooks that run when another package's module is imported, for modules that we must not import ourselves."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable
from typing import Any, Optional


class _AfterImport(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds one module as Python does, and calls a function with it once it is loaded."""

    def __init__(self, name: str, hook: Callable[[Any], None]):
        self.name, self.hook = name, hook
        self._loader: Any = None

    def find_spec(self, name: str, path: Any, target: Any = None) -> Optional[importlib.machinery.ModuleSpec]:
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None:
            self._loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> Any:
        return self._loader.create_module(spec)

    def exec_module(self, module: Any) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        self.hook(module)


def after_import(name: str, hook: Callable[[Any], None]) -> None:
    """Call ``hook(module)``: now where the module ``name`` is imported, else when it will be. Once for each name and hook."""
    module = sys.modules.get(name)
    if module is not None:
        hook(module)
    elif not any(isinstance(f, _AfterImport) and (f.name, f.hook) == (name, hook) for f in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport(name, hook))
