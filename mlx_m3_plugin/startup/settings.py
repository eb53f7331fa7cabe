"""The environment variables of the plugin.  No other file reads them."""

import os
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

PIPELINE_SPLIT = "MLX_M3_PLUGIN_PIPELINE_SPLIT"
EFFORT = "MLX_M3_PLUGIN_REASONING_EFFORT"
EXPERT_MEMORY = "MLX_M3_PLUGIN_EXPERT_MEMORY"
_PREFIX = "MLX_M3_PLUGIN"

_ON_OR_OFF = dict.fromkeys(("on", "1", "true", "yes"), True) | dict.fromkeys(
    ("off", "0", "false", "no"), False
)
_IS_NATIVE = {"native": True, "plugin": False}
_ATTENTION = {name: name for name in ("sparse", "dense")}
_ENGINE = {name: name for name in ("auto", "plain", "kernels")}
# Of MiniMax-M3.1.
EFFORTS = ("low", "medium", "high", "xhigh", "max")


def _layers_by_rank(value: str) -> tuple[int, ...]:
    return tuple(int(count) for count in value.split(","))


def _memory(value: str) -> int | str:
    """Bytes, ``"auto"``, or 0 for ``off``.  Memory is sold by powers of 1024."""
    if value in ("auto", "off"):
        return value if value == "auto" else 0
    found = re.fullmatch(r"([0-9.]+) *([kmgt]?)(i?b)?", value)
    if found is None:
        raise ValueError(value)
    number, unit, in_bytes = found.groups()
    return int(float(number) * 1024 ** "bkmgt".index(unit or ("b" if in_bytes else "g")))


# Variable -> attribute of Settings, how to read a value, and what to use.
_VARIABLES: dict[str, tuple[str, Callable[[str], Any], str]] = {
    "MLX_M3_PLUGIN": ("enabled", _ON_OR_OFF.__getitem__, "'on' or 'off'"),
    "MLX_M3_PLUGIN_PREFER": ("prefer_native", _IS_NATIVE.__getitem__, "'native' or 'plugin'"),
    "MLX_M3_PLUGIN_STRICT": ("strict", _ON_OR_OFF.__getitem__, "'on' or 'off'"),
    "MLX_M3_PLUGIN_ATTENTION": ("attention", _ATTENTION.__getitem__, "'sparse' or 'dense'"),
    "MLX_M3_PLUGIN_ENGINE": ("engine", _ENGINE.__getitem__, "'auto', 'plain' or 'kernels'"),
    EXPERT_MEMORY: ("expert_memory", _memory, "a size such as 64GB, 'auto' or 'off'"),
    PIPELINE_SPLIT: ("pipeline_split", _layers_by_rank, "layers by rank, such as 40,20"),
    EFFORT: ("reasoning_effort", dict(zip(EFFORTS, EFFORTS, strict=True)).__getitem__, ", ".join(EFFORTS)),
}


class Settings(NamedTuple):
    """What the user asks for.

    Attributes:
        enabled: ``MLX_M3_PLUGIN``; ``off`` leaves upstream exactly as it is.
        prefer_native: ``MLX_M3_PLUGIN_PREFER=native`` keeps upstream's own module
            wherever it has one under the same name.
        strict: ``MLX_M3_PLUGIN_STRICT=1`` turns every degradation into an exception.
        attention: ``MLX_M3_PLUGIN_ATTENTION``, ``"sparse"`` or ``"dense"``; None leaves it to the config.
        engine: ``MLX_M3_PLUGIN_ENGINE``; ``"auto"``, or ``"plain"`` without Metal kernels, or ``"kernels"``
            without measuring which is faster.
        expert_memory: ``MLX_M3_PLUGIN_EXPERT_MEMORY``, bytes for routed experts, of which the others stay on
            the disk; ``"auto"`` takes what the machine has left; 0 keeps all in memory.
        pipeline_split: ``MLX_M3_PLUGIN_PIPELINE_SPLIT``, layers by rank; None splits evenly.
        reasoning_effort: ``MLX_M3_PLUGIN_REASONING_EFFORT``, for prompts that ask for none; None leaves it to
            the chat template.
        complaints: one line for each variable or value that is not understood.
    """

    enabled: bool = True
    prefer_native: bool = False
    strict: bool = False
    attention: str | None = None
    engine: str = "auto"
    expert_memory: int | str = 0
    pipeline_split: tuple[int, ...] | None = None
    reasoning_effort: str | None = None
    complaints: tuple[str, ...] = ()


def read_settings(environ: Mapping[str, str] = os.environ) -> Settings:
    """All switches.  One with an unknown value keeps its default, with a complaint."""
    read: dict[str, Any] = {}
    complaints = [*_misspelt(environ)]
    for name, (attribute, _, _) in _VARIABLES.items():
        try:
            if (value := _read(name, environ)) is not None:
                read[attribute] = value
        except ValueError as error:
            complaints.append(str(error))
    return Settings(**read, complaints=tuple(complaints))


def checked(attribute: str, environ: Mapping[str, str] = os.environ) -> Any:
    """One attribute of :class:`Settings`, for code that cannot go on with a default.

    Raises:
        ValueError: the value is not understood.  It names the variable.
    """
    name = next(name for name, (its_attribute, _, _) in _VARIABLES.items() if its_attribute == attribute)
    value = _read(name, environ)
    return getattr(Settings(), attribute) if value is None else value


def model_settings(environ: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """``attention`` and ``pipeline_split``, those that are set: what changes how a model is made."""
    settings = {attribute: checked(attribute, environ) for attribute in ("attention", "pipeline_split")}
    return {attribute: value for attribute, value in settings.items() if value is not None}


def engine_settings() -> dict[str, Any]:
    """How sparse attention is computed: ``mode``, ``strict`` and ``store``, the file of measurements."""
    store = os.path.join(cache_directory(), "engine.json")
    return {"mode": checked("engine"), "strict": checked("strict"), "store": store}


def cache_directory() -> str:
    """Where we keep what can be made again."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(base, "mlx-m3")


def without_plugin() -> dict[str, str]:
    """Variables for a process in which upstream is exactly as it is."""
    return {**os.environ, "MLX_M3_PLUGIN": "off"}


def lines_of(settings: Mapping[str, Any]) -> list[str]:
    """For people: the settings that are not the default."""
    defaults = Settings()
    return [
        f"{variable}: {attribute} is {settings[attribute]}"
        for variable, (attribute, _, _) in _VARIABLES.items()
        if settings[attribute] != getattr(defaults, attribute)
    ]


def _read(name: str, environ: Mapping[str, str]) -> Any:
    """The meaning of a variable's value; None where it is not set, or empty."""
    _, parse, choices = _VARIABLES[name]
    value = environ.get(name, "").strip().lower()
    if not value:
        return None
    try:
        return parse(value)
    except (KeyError, ValueError):
        raise ValueError(f"{name}={environ[name]!r} is not understood; use {choices}") from None


def _misspelt(environ: Mapping[str, str]) -> list[str]:
    unknown = [name for name in environ if name.upper().startswith(_PREFIX) and name not in _VARIABLES]
    if not unknown:
        return []
    # Imported here, because it takes time and is rarely needed.
    from difflib import get_close_matches

    nearest = {name: get_close_matches(name.upper(), _VARIABLES, n=1, cutoff=0) for name in unknown}
    return [f"unknown variable {name}; did you mean {meant[0]}?" for name, meant in nearest.items()]
