"""A parameter's element, typed by the tool's JSON schema.

The grammar writes values without types: ``5`` may be a number or a text, an empty element may be
``""``, ``[]`` or ``{}``.  The schema decides; ``docs/tool-calls.md`` lists what is left open.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

Schema = Mapping[str, Any]

_BARE_TAG = re.compile(r"\s*<([^\s<>/][^<>]*)>")
_INTEGER = re.compile(r"[+-]?\d+$")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$")
# What tool authors write besides JSON schema's own names.
_ALIASES = {
    "str": "string",
    "text": "string",
    "int": "integer",
    "long": "integer",
    "float": "number",
    "double": "number",
    "bool": "boolean",
    "list": "array",
    "dict": "object",
    "map": "object",
    "none": "null",
}
# Nobody's arguments are as deep; text that opens tags without end has to be refused somewhere.
MAX_DEPTH = 100
# Python's own limit on digits, below which int() is fast.
_MAX_DIGITS = 4000


@dataclass
class Element:
    """One tag with what is in it.

    Attributes:
        name: of the tag.  text: all text directly in it.
        children: the tags directly in it.  source: everything between its tags, as written.
        depth: tags around it.
    """

    name: str
    text: str = ""
    children: list["Element"] = field(default_factory=list)
    source: str = ""
    depth: int = 0


def bare_elements(text: str, depth: int) -> list[Element] | None:
    """``<key>value</key>`` one after the other, without the token that should stand before tags.

    None unless that is all there is in ``text``.  Models drop the token now and then.
    """
    found: list[Element] = []
    position = 0
    while True:
        opening = _BARE_TAG.match(text, position)
        if opening is None:
            return found if found and not text[position:].strip() else None
        closing = f"</{opening[1]}>"
        end = text.find(closing, opening.end())
        if end < 0 or depth > MAX_DEPTH:
            return None
        inner = text[opening.end() : end]
        found.append(Element(opening[1], inner, source=inner, depth=depth))
        position = end + len(closing)


def typed(element: Element, schema: Any, root: Schema) -> Any:
    """The value that ``element`` stands for.

    Args:
        schema: what its parameter's schema says; anything that is not a mapping says nothing.
        root: the tool's whole ``parameters``, which ``$ref`` points into.
    """
    branches = list(_branches(schema, root))
    if element.children:
        return _structure(element, branches, root)
    return _leaf(element, branches, root)


def _branches(schema: Any, root: Schema, seen: set[str] | None = None) -> Iterator[Schema]:
    """The alternatives of a schema, in its order: no ``$ref``, ``anyOf``, ``oneOf``, ``allOf`` or
    list of types is left in them."""
    if not isinstance(schema, Mapping):
        return
    # A second time the same reference adds no alternative, and it may be its own.
    seen = set() if seen is None else seen
    if isinstance(schema.get("$ref"), str):
        if schema["$ref"] not in seen:
            seen.add(schema["$ref"])
            rest = {key: value for key, value in schema.items() if key != "$ref"}
            for branch in _branches(_resolve(schema["$ref"], root), root, seen):
                yield {**branch, **rest}
        return
    if isinstance(schema.get("allOf"), list):
        yield from _branches(_merged(schema, root, seen), root, seen)
        return
    for key in ("anyOf", "oneOf"):
        if isinstance(schema.get(key), list):
            rest = {k: v for k, v in schema.items() if k != key}
            for option in schema[key]:
                if isinstance(option, Mapping):
                    yield from _branches({**rest, **option}, root, seen)
            return
    types = schema.get("type")
    for name in types if isinstance(types, list) else [types]:
        kind = _ALIASES.get(str(name).lower(), str(name).lower()) if name is not None else None
        yield {**schema, "type": kind or _implied_type(schema)}
    if schema.get("nullable") is True:
        yield {"type": "null"}


def _resolve(reference: str, root: Schema) -> Any:
    if not reference.startswith("#"):
        return None
    target: Any = root
    for part in reference[1:].split("/")[1:]:
        part = part.replace("~1", "/").replace("~0", "~")
        target = target.get(part) if isinstance(target, Mapping) else None
    return target


def _merged(schema: Schema, root: Schema, seen: set[str]) -> Schema:
    """All parts of an ``allOf`` in one; of a part with alternatives, the first."""
    merged: dict[str, Any] = {key: value for key, value in schema.items() if key != "allOf"}
    for part in schema["allOf"]:
        branch: Schema = next(_branches(part, root, seen), {})
        properties = {**merged.get("properties", {}), **branch.get("properties", {})}
        required = [*merged.get("required", []), *branch.get("required", [])]
        kind = merged.get("type") or branch.get("type")
        merged = {**merged, **branch, "type": kind}
        if properties:
            merged["properties"] = properties
        if required:
            merged["required"] = required
    return merged


def _implied_type(schema: Schema) -> str | None:
    if "properties" in schema or "additionalProperties" in schema:
        return "object"
    return "array" if "items" in schema or "prefixItems" in schema else None


# --- text ---


def _leaf(element: Element, branches: list[Schema], root: Schema) -> Any:
    text = element.text
    for schema in branches:
        for value in _listed(schema):
            if rendered(value) == text:
                return value
    kinds = [schema["type"] for schema in branches]
    if text == "" and "string" not in kinds:
        for empty, kind in ((None, "null"), ([], "array"), ({}, "object")):
            if kind in kinds:
                return empty
    for schema in branches:
        value = _as_type(element, schema, root)
        if value is not _NO_VALUE:
            return value
    # Whatever the schema wanted, this is what was written.
    return text


def _listed(schema: Schema) -> Iterable[Any]:
    if "const" in schema:
        return [schema["const"]]
    listed = schema.get("enum")
    return listed if isinstance(listed, list) else []


def rendered(value: Any) -> str:
    """A scalar as the chat template writes it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return "" if value is None else str(value)


_NO_VALUE = object()


def _as_type(element: Element, schema: Schema, root: Schema) -> Any:
    kind, text, word = schema["type"], element.text, element.text.strip()
    if kind in ("string", None):
        return text if not _listed(schema) or kind is None else _NO_VALUE
    if kind == "integer":
        return _integer(word)
    if kind == "number":
        return _number(word)
    if kind == "boolean":
        return {"true": True, "1": True, "false": False, "0": False}.get(word.lower(), _NO_VALUE)
    if kind == "null":
        return None if word.lower() in ("null", "none") else _NO_VALUE
    if kind in ("array", "object"):
        return _written_otherwise(element, schema, root)
    return _NO_VALUE


def _integer(word: str) -> Any:
    if _INTEGER.match(word) and len(word) < _MAX_DIGITS:
        return int(word)
    number = _number(word)
    return int(number) if isinstance(number, float) and number.is_integer() else _NO_VALUE


def _number(word: str) -> Any:
    if len(word) >= _MAX_DIGITS or not _NUMBER.match(word):
        return _NO_VALUE
    if _INTEGER.match(word):
        return int(word)
    value = float(word)
    return value if math.isfinite(value) else _NO_VALUE


def _written_otherwise(element: Element, schema: Schema, root: Schema) -> Any:
    """An array or object as JSON, or in tags without their token; one bare value as an array of it."""
    kind, word = schema["type"], element.text.strip()
    if children := bare_elements(word, element.depth + 1):
        return _structure(Element(element.name, children=children, depth=element.depth), [schema], root)
    try:
        value = json.loads(word)
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, list if kind == "array" else dict):
        return value
    if kind == "array" and word:
        only = Element("item", word, source=word, depth=element.depth + 1)
        # The items of an array of arrays are not guessed at any further.
        items = [branch for branch in _branches(_item_schema(schema, 0), root) if branch["type"] != "array"]
        return [_leaf(only, items, root)]
    return _NO_VALUE


# --- tags ---


def _structure(element: Element, branches: list[Schema], root: Schema) -> Any:
    if branches and all(schema["type"] == "string" for schema in branches):
        # Tags in a text are text.
        return element.source
    schema = _best_branch(element, branches)
    if schema["type"] == "array":
        return [
            typed(child, _item_schema(schema, index), root) for index, child in enumerate(element.children)
        ]
    if schema["type"] is None and all(child.name == "item" for child in element.children):
        return [typed(child, None, root) for child in element.children]
    return _object(element, schema, root)


def _best_branch(element: Element, branches: list[Schema]) -> Schema:
    names = {child.name for child in element.children}
    candidates = [schema for schema in branches if schema["type"] in ("array", "object")]
    for schema in candidates:
        if schema["type"] == "array" and names == {"item"}:
            return schema
        if schema["type"] == "object" and _object_fits(element, names, schema):
            return schema
    # Of what does not fit, the first one that can have tags in it at all.
    return candidates[0] if candidates else {"type": None}


def _object_fits(element: Element, names: set[str], schema: Schema) -> bool:
    properties = schema.get("properties") or {}
    if not set(schema.get("required") or ()) <= names:
        return False
    if schema.get("additionalProperties", not properties) is False and not names <= set(properties):
        return False
    if properties and not names & set(properties):
        return False
    told_apart = [
        c for c in element.children if not c.children and isinstance(properties.get(c.name), Mapping)
    ]
    for child in told_apart:
        listed = list(_listed(properties[child.name]))
        if listed and child.text not in map(rendered, listed):
            return False
    return True


def _item_schema(schema: Schema, index: int) -> Any:
    prefix = schema.get("prefixItems")
    items = schema.get("items")
    if isinstance(items, list):
        # Of drafts before 2020-12.
        prefix, items = items, schema.get("additionalItems")
    if isinstance(prefix, list) and index < len(prefix):
        return prefix[index]
    return items


def _object(element: Element, schema: Schema, root: Schema) -> dict[str, Any]:
    together: dict[str, list[Element]] = {}
    for child in element.children:
        together.setdefault(child.name, []).append(child)
    value = {name: _property(children, schema, root) for name, children in together.items()}
    if element.text.strip():
        key = "$text"
        while key in value:
            key = f"${key}"
        value[key] = element.text
    return value


def _property(children: list[Element], schema: Schema, root: Schema) -> Any:
    own = property_schema(schema, children[0].name)
    if len(children) == 1:
        return typed(children[0], own, root)
    # A repeated tag is a list, whose schema may be the property's own.
    array = next((branch for branch in _branches(own, root) if branch["type"] == "array"), None)
    return [
        typed(child, own if array is None else _item_schema(array, index), root)
        for index, child in enumerate(children)
    ]


def property_schema(schema: Schema, name: str) -> Any:
    properties = schema.get("properties")
    if isinstance(properties, Mapping) and name in properties:
        return properties[name]
    return schema.get("additionalProperties")
