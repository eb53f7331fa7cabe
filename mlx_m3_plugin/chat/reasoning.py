"""M3's reasoning: the markers around it, and the modes that a prompt can ask for."""

from typing import Any

# Each is one token of M3's vocabulary.  ``<think>`` is in the vocabulary too, but M3 does not use it.
THINK_START, THINK_END = "<mm:think>", "</mm:think>"

THINKING_MODES = ("enabled", "disabled", "adaptive")


def thinking_mode(arguments: dict[str, Any]) -> str | None:
    """The mode that a chat template's arguments ask for; None leaves it to the template.

    ``thinking_mode`` is M3's own name and wins; ``enable_thinking`` is what other models and
    their clients know.

    Raises:
        ValueError: ``thinking_mode`` is none of M3's.
    """
    mode = arguments.get("thinking_mode")
    if mode is not None and mode not in THINKING_MODES:
        raise ValueError(f"thinking_mode must be one of {', '.join(THINKING_MODES)}, not {mode!r}")
    if mode is None and isinstance(arguments.get("enable_thinking"), bool):
        return "enabled" if arguments["enable_thinking"] else "disabled"
    return mode
