"""Options of ``torch.compile(..., backend="intscale", mode=..., options={...})``: ours, and what goes on to Inductor."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any, Optional

from ..communication.choice import Allowed
from ..config import IntScaleConfig
from ..errors import ConfigError
from ..passes import PASSES, POST_GRAD_PASSES
from ..passes.settings import FORCIBLE, Settings

PREFIX = "intscale."
WIRE_FORMATS = (
    '"int8", "int6", "int5" or "int4", with "-spikes" after it where wanted, "auto" (lossless forms), "auto+int8" and so on '
    "(both), or None"
)
_CONFIG_FIELDS = tuple(f.name for f in dataclasses.fields(IntScaleConfig) if f.name != "version")


_PASS_NAMES = (*(one.name for one in PASSES), *POST_GRAD_PASSES)
_OWN_FIELDS = tuple(f.name for f in dataclasses.fields(Settings))


def parse_options(mode: Optional[str], options: Optional[Mapping[str, Any]]) -> tuple[Settings, dict[str, Any]]:
    """Split the options of ``torch.compile`` into our settings and Inductor's config patches.

    Raises:
        ConfigError: an ``intscale.`` key is unknown or its value has the wrong type; an Inductor option is unknown.
    """
    # Slow to import.
    from torch._inductor import list_mode_options

    try:
        patches = dict(list_mode_options(mode)) if mode and mode != "default" else {}
    except RuntimeError as error:
        raise ConfigError(f"mode={mode!r} is not one that Inductor knows: {error}") from error
    own: dict[str, Any] = {}
    for key, value in (options or {}).items():
        if key.startswith(PREFIX):
            own[key.removeprefix(PREFIX)] = value
        elif key == PREFIX.rstrip("."):
            raise ConfigError(f"option {key!r} is not known: did you mean 'intscale.config'?")
        else:
            patches[_inductor_key(key)] = value
    return _settings(own), patches


def _inductor_key(key: str) -> str:
    """The attribute name of an Inductor option; unknown ones are refused here, with the nearest name."""
    # Slow to import.
    from torch._inductor import config as inductor_config

    known = inductor_config.get_config_copy()
    attribute = key.replace("-", "_")
    if attribute not in known:
        ours = [PREFIX + name for name in (*_OWN_FIELDS, *_CONFIG_FIELDS)]
        raise ConfigError(
            f"option {key!r} is known neither to Inductor nor to intscale{_nearest(key, [*known, *ours])}."
        )
    return attribute


def _nearest(name: str, known: list[str], prefix: str = "") -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f": did you mean {prefix + close[0]!r}?" if close else ""


def _settings(own: dict[str, Any]) -> Settings:
    for name in own:
        if name not in (*_OWN_FIELDS, *_CONFIG_FIELDS):
            known = sorted((*_OWN_FIELDS, *_CONFIG_FIELDS))
            hint = _nearest(name.lower(), known, PREFIX) or f": use one of {[PREFIX + n for n in known]}."
            if name in _PASS_NAMES:
                forced = f"; {list(FORCIBLE)} may stand in 'intscale.force_passes'"
                hint = f": to turn the pass off, name it in 'intscale.disable_passes'{forced}."
            raise ConfigError(f"option {PREFIX + name!r} is not known{hint}")
    config = own.get("config", IntScaleConfig())
    if not isinstance(config, IntScaleConfig):
        raise ConfigError(f"option 'intscale.config' takes an IntScaleConfig, not {type(config).__name__}.")
    changed = {name: own[name] for name in _CONFIG_FIELDS if name in own}
    if changed:
        config = dataclasses.replace(config, **changed)
    quantize_plain = own.get("quantize_plain")
    if not isinstance(quantize_plain, (bool, type(None))):
        raise ConfigError(f"option 'intscale.quantize_plain' takes True, False or None, not {quantize_plain!r}.")
    whole_prompt = own.get("whole_prompt", False)
    if not isinstance(whole_prompt, bool):
        raise ConfigError(f"option 'intscale.whole_prompt' takes True or False, not {whole_prompt!r}.")
    integer_only = own.get("integer_only", False)
    if not isinstance(integer_only, bool):
        raise ConfigError(f"option 'intscale.integer_only' takes True or False, not {integer_only!r}.")
    return Settings(
        config,
        quantize_plain,
        _patterns(own.get("skip", ())),
        _disabled(own.get("disable_passes", ())),
        _pass_names("force_passes", own.get("force_passes", ()), FORCIBLE),
        _wire_format(own.get("communication")),
        _bytes("communication_min_bytes", own.get("communication_min_bytes")),
        whole_prompt,
        integer_only,
        _positions(own.get("positions", Settings.positions)),
    )


def _positions(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"option 'intscale.positions' takes a number of positions, 1 or more, not {value!r}.")
    return value


def _wire_format(name: Any) -> Optional[str]:
    """The value of the option that names a wire format or ``"auto"``, checked."""
    try:
        return None if name is None else str(Allowed.parse(name))
    except (ConfigError, TypeError) as error:
        raise ConfigError(f"option 'intscale.communication'={name!r} is not supported: use {WIRE_FORMATS}.") from error


def _disabled(names: Any) -> tuple[str, ...]:
    """Names of passes, checked. ``match`` is refused: the others work on what it finds."""
    names = _pass_names("disable_passes", names, _PASS_NAMES)
    if "match" in names:
        raise ConfigError(
            "option 'intscale.disable_passes': 'match' cannot be turned off, the other passes work on what it finds; "
            "'insert_qdq' and 'experts' leave every weight as it is."
        )
    return names


def _pass_names(option: str, names: Any, known: Sequence[str]) -> tuple[str, ...]:
    """The value of an option that takes names of the passes ``known``, checked."""
    names = (names,) if isinstance(names, str) else names
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"option {PREFIX + option!r} takes a list of names of passes, not {names!r}.")
    for name in names:
        if name not in known:
            other = name in _PASS_NAMES
            problem = f"the pass {name!r} cannot be forced" if other else f"no pass is called {name!r}"
            hint = "" if other else _nearest(name, list(known))
            raise ConfigError(f"option {PREFIX + option!r}: {problem}{hint or f': use one of {list(known)}.'}")
    return tuple(names)


def _bytes(name: str, value: Any) -> Optional[int]:
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
        raise ConfigError(f"option {PREFIX + name!r} takes a number of bytes, 0 or more, or None, not {value!r}.")
    return value


def _patterns(skip: Any) -> tuple[str, ...]:
    patterns = (skip,) if isinstance(skip, str) else skip
    if not isinstance(patterns, (list, tuple)) or not all(isinstance(pattern, str) for pattern in patterns):
        raise ConfigError(f"option 'intscale.skip' takes a regular expression or a list of them, not {skip!r}.")
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ConfigError(f"option 'intscale.skip': {pattern!r} is not a regular expression ({error}).") from error
    return tuple(patterns)
