"""The environment switches, read when an upstream library is first imported."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

_OFF = ("off", "0", "false", "no")
_ON = ("", "on", "1", "true", "yes")


@dataclass(frozen=True)
class Settings:
    """What the user asked for.

    Attributes:
        enabled: ``MLX_M3_PLUGIN``; ``off`` leaves upstream exactly as it is.
        prefer_native: ``MLX_M3_PLUGIN_PREFER=native`` keeps upstream's own module
            wherever it has one under the same name.
        strict: ``MLX_M3_PLUGIN_STRICT=1`` turns every degradation into an exception.
        complaints: one line for each value that was not understood.
    """

    enabled: bool = True
    prefer_native: bool = False
    strict: bool = False
    complaints: tuple[str, ...] = ()


def read_settings(environ: Mapping[str, str] = os.environ) -> Settings:
    complaints: list[str] = []

    def switch(name: str, default: bool) -> bool:
        value = environ.get(name, "").strip().lower()
        if value in _OFF:
            return False
        if value in _ON:
            return True if value else default
        complaints.append(f"{name}={environ[name]!r} is not understood; use 'on' or 'off'")
        return default

    enabled = switch("MLX_M3_PLUGIN", default=True)
    strict = switch("MLX_M3_PLUGIN_STRICT", default=False)
    prefer = environ.get("MLX_M3_PLUGIN_PREFER", "").strip().lower()
    if prefer not in ("", "native", "plugin"):
        complaints.append(f"MLX_M3_PLUGIN_PREFER={prefer!r} is not understood; use 'native' or 'plugin'")
    return Settings(enabled, prefer == "native", strict, tuple(complaints))
