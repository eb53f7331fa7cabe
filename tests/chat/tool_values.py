"""Random texts, keys and scalars, and the rules for what the grammar of tool calls can carry.

What it cannot carry is excluded by rule: :func:`carried`, and the alphabets of strings and keys.
``docs/tool-calls.md`` lists the same rules.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from hypothesis import strategies as st

NS = "]<]minimax[>["

# Pieces of text that a careless parser takes for something else.
PIECES = [
    *(
        "<b>",
        "</b>",
        "</item>",
        "<item>",
        "</invoke>",
        "<tool_call>",
        "</a>",
        "<",
        ">",
        "&lt;",
        "]<]",
        "]",
        "[",
    ),
    *(
        "null",
        "None",
        "true",
        "5",
        "-1",
        "1.50",
        "007",
        "1e5",
        "[1]",
        "{}",
        '{"a": 1}',
        "<mm:think>",
        "</mm:think>",
    ),
    *(" ", "\n", "\t", "\r\n", "  ", "\u3000", "", "ü", "\U0001f642", '"', "'", "\\n", "#", "%20", "~1"),
]
STRINGS = st.one_of(st.lists(st.sampled_from(PIECES), max_size=4).map("".join), st.text(max_size=6)).filter(
    lambda text: NS not in text
)
KEYS = st.one_of(
    st.sampled_from(
        [
            "a",
            "b",
            "item",
            "key with blanks",
            " x",
            "y/",
            "$text",
            "kind",
            "ключ",
            "x-y_z.1",
            "$ref",
            "type",
            '"',
        ]
    ),
    st.text(st.characters(exclude_characters="<>", exclude_categories=["Cs"]), min_size=1, max_size=5),
).filter(lambda key: not key.startswith("/") and key.split()[:1] not in (["invoke"], ["tool_call"]))
TOOL_NAMES = st.one_of(
    st.sampled_from(["f", "get_weather", "a.b-c", "with blanks"]),
    st.text(st.characters(exclude_characters='"', exclude_categories=["Cs"]), min_size=1, max_size=5),
)
INTEGERS = st.one_of(st.integers(-20, 20), st.integers(), st.integers(10**300, 10**300 + 5))
FLOATS = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, 1e16, 1e-7, 5e-324]), st.floats(allow_nan=False, allow_infinity=False)
)
SCALARS: dict[str, st.SearchStrategy[Any]] = {
    "string": STRINGS,
    "integer": INTEGERS,
    "number": st.one_of(INTEGERS, FLOATS),
    "boolean": st.booleans(),
    "null": st.none(),
}


@dataclass
class Alternative:
    """One type that a schema allows.  ``value(depth)`` draws such a value; ``allows_item``: objects
    with a member named ``item``."""

    kind: str
    value: Callable[[int], Any]
    listed: list[Any] = field(default_factory=list)
    allows_item: bool = False


@dataclass
class Shape:
    """A schema, with its alternatives in its own order."""

    schema: Any
    alternatives: list[Alternative]


# --- what can be carried ---


def pruned(value: Any) -> Any:
    """Without the members that are null, which the template leaves out."""
    if isinstance(value, dict):
        return {key: pruned(member) for key, member in value.items() if member is not None}
    return [pruned(member) for member in value] if isinstance(value, list) else value


def written(value: Any) -> Any:
    """What of a value is on paper: text, or names with what is in them.  Nothing tells "", [], {}
    and null apart."""
    if isinstance(value, dict):
        return [(key, written(member)) for key, member in value.items() if member is not None] or ""
    if isinstance(value, list):
        return [("item", written(member)) for member in value] or ""
    if isinstance(value, bool):
        return "true" if value else "false"
    return "" if value is None else str(value)


def exactly(one: Any, other: Any) -> bool:
    """Equal, with equal types and equal order: 1, 1.0 and True are three values, and so are the zeros."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return list(one) == list(other) and all(exactly(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(exactly, one, other))
    return repr(one) == repr(other)


def looks_like(kind: str, text: str) -> bool:
    """Whether a text may be taken for a value of a type."""
    if kind in ("array", "object"):
        return text.strip()[:1] in ("[", "{", "<")
    if kind == "integer":
        return (
            text.removeprefix("-").isascii() and text.removeprefix("-").isdecimal() and str(int(text)) == text
        )
    if kind == "number":
        try:
            return looks_like("integer", text) or (str(float(text)) == text and math.isfinite(float(text)))
        except ValueError:
            return False
    return text in {"boolean": ("true", "false"), "null": ("null",)}[kind]


def carried(alternatives: list[Alternative], index: int, value: Any) -> bool:
    """Whether a value of ``alternatives[index]`` is still that value after it was written."""
    for listed in [listed for alternative in alternatives for listed in alternative.listed]:
        if written(listed) == written(value):
            return exactly(listed, pruned(value))
    text = written(value)
    if isinstance(text, str) and text.strip() == "null":
        # The word is null where that is allowed, and where nothing says that it is a string.
        kinds = [alternative.kind for alternative in alternatives]
        if "null" in kinds or "string" not in kinds or any(None in a.listed for a in alternatives):
            return False
    earlier = alternatives[:index]
    takes_text = [a.kind in ("string", "anything") and not a.listed for a in alternatives]
    if isinstance(text, list):
        if isinstance(value, list):
            return not any(a.kind == "array" or a.allows_item for a in earlier)
        # Objects of a union are made so that members tell them apart.
        return {name for name, _ in text} != {"item"} or "array" not in [a.kind for a in alternatives]
    if not text.strip() and not any(takes_text):
        nothing = {"null": None, "array": [], "object": {}}
        first = next((kind for kind in nothing if kind in [a.kind for a in alternatives]), "")
        return first in nothing and exactly(pruned(value), nothing[first])
    if text == "" and not isinstance(value, str):
        return False
    return not any(takes_text[:index]) and not any(
        looks_like(a.kind, text) for a in earlier if a.kind not in ("string", "anything", "listed")
    )
