"""A parameter's element, typed by the tool's JSON schema.

The grammar writes values without types: ``5`` may be a number or a text, an empty element may be
``""``, ``[]`` or ``{}``.  The schema decides; ``docs/tool-calls.md`` lists what is left open.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache, reduce
from itertools import chain, product
from typing import Any
from urllib.parse import unquote

Schema = Mapping[str, Any]

_BARE_TAG = re.compile(r"\s*<([^\s<>/][^<>]*)>")
_M2_PARAMETER = re.compile(r"""parameter\s+name\s*=\s*(?:"([^"]*)"|'([^']*)'|["']?([^\s"']+))""")
_INTEGER = re.compile(r"[+-]?[0-9]+\Z")
_NULLS = ("null", "NULL", "Null", "None", "none")
_NUMBER = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?\Z")
# JSON schema's names, and what tool authors write besides them: words of languages and of SQL.
_WORDS = {
    "string": "str text char character varchar nvarchar nchar clob tinytext mediumtext longtext varchar2"
    " nvarchar2 uuid guid url uri email date time datetime timestamp bytes bytea blob path file symbol",
    "integer": "int integer long short byte tinyint smallint mediumint bigint bigserial serial i u uint ulong"
    " ushort ubyte usize isize size ssize sint unsigned signed longlong biginteger",
    "number": "num number float double real decimal numeric money f floating bfloat half bigdecimal",
    "boolean": "bool boolean binary bit logical",
    "array": "array arr list sequence seq tuple set vec vector arraylist collection iterable frozenset slice",
    "object": "object obj dict dictionary map mapping hash hashmap record struct json jsonb",
    "null": "null none nil void undefined",
}
_KINDS = {word: kind for kind, words in _WORDS.items() for word in (kind, *words.split())}
_SIZE = re.compile(r"[\[(<].*", re.DOTALL)
_SEVERAL = re.compile(r"[|/]|,(?!.*[\])>])|\bor\b")
_BETWEEN_WORDS = re.compile(r"(?:[\s_-]|\d|\b(?:un)?signed)+")
# Nobody's arguments are as deep; text that opens tags without end has to be refused somewhere.
MAX_DEPTH = 100
# Python's own limit on digits, below which int() is fast.
_MAX_DIGITS = 4000
# What is looked at to find a schema's alternatives; they may be exponentially many.
_MOST_STEPS = 4000
_MOST_NESTED = 64
_ANYTHING: dict[str, Any] = {"type": None}
_TEXTLESS = ("integer", "number", "boolean", "null")


@dataclass
class Element:
    """One tag with what is in it.

    Attributes:
        name: of the tag.  text: all text directly in it.
        children: the tags directly in it.  source: everything between its tags, where there are any in it.
        depth: tags around it.
        between: text that is not blank among the children, each with the number of children before it.
    """

    name: str
    text: str = ""
    children: list["Element"] = field(default_factory=list)
    source: str = ""
    depth: int = 0
    between: list[tuple[int, str]] = field(default_factory=list)


def parameter_name(tag: str) -> str | None:
    """``x`` of ``parameter name="x"``, as M2 writes its tags."""
    found = _M2_PARAMETER.match(tag)
    return next((name for name in found.groups() if name is not None), None) if found else None


def bare_elements(text: str, depth: int) -> list[Element] | None:
    """``<key>value</key>`` one after the other, without the token that should stand before tags.

    None unless that is all there is in ``text``.  Models drop the token now and then.
    """
    found, end = first_bare_elements(text, 0, depth)
    return found if found and not text[end:].strip() else None


def first_bare_elements(
    text: str, begin: int, depth: int, last: int | None = None
) -> tuple[list[Element], int]:
    """Those from ``begin`` on and before ``last``, and where the last of them ends."""
    last = len(text) if last is None else last
    found: list[Element] = []
    while depth <= MAX_DEPTH and (opening := _BARE_TAG.match(text, begin, last)):
        name = parameter_name(opening[1])
        closing = f"</{opening[1] if name is None else 'parameter'}>"
        end = text.find(closing, opening.end(), last)
        if end < 0:
            break
        inner = text[opening.end() : end]
        found.append(Element(opening[1] if name is None else name, inner, depth=depth))
        begin = end + len(closing)
    return found, begin


def typed_arguments(parameters: list[Element], schemas: "Schemas") -> dict[str, Any]:
    """The arguments of a call, typed by what its tool has as ``parameters``."""
    element = Element("invoke", children=parameters)
    objects = [branch for branch in schemas.branches(schemas.root) if branch["type"] == "object"]
    return _object(element, _best_branch(element, objects, schemas) if objects else schemas.root, schemas)


# --- schemas ---


class Schemas:
    """A tool's whole ``parameters``, into which ``$ref`` points, and the alternatives in them."""

    def __init__(self, root: Any, as_json: bool = False):
        self.root: Schema = root if isinstance(root, Mapping) else {}
        # Nobody knows the tools: texts that are JSON are read as such.
        self.as_json = as_json
        # By identity, which is why the schema is kept with it.
        self._known: dict[int, tuple[Any, list[Schema]]] = {}
        self._shapes: dict[int, tuple[Any, Shape]] = {}
        self._steps_left = 0

    def shape(self, schema: Any) -> "Shape":
        if id(schema) not in self._shapes:
            self._shapes[id(schema)] = schema, Shape(schema, self)
        return self._shapes[id(schema)][1]

    def branches(self, schema: Any) -> list[Schema]:
        """The alternatives of a schema, in its order: no ``$ref``, ``anyOf``, ``oneOf``, ``allOf``,
        ``nullable`` or list of types is left in them.  Anything but a mapping says nothing: none."""
        if id(schema) not in self._known:
            self._steps_left = _MOST_STEPS
            found: list[Schema] = [{**each, "type": _type_of(each)} for each in self._expand(schema, ())]
            self._known[id(schema)] = schema, found
        return self._known[id(schema)][1]

    def _expand(self, schema: Any, way: tuple[str, ...]) -> Iterator[Schema]:
        """``way``: the keywords and references that led here."""
        self._steps_left -= 1
        if not isinstance(schema, Mapping) or self._steps_left < 0 or len(way) > _MOST_NESTED:
            return
        if schema.get("nullable") is True:
            yield from self._expand(_without(schema, "nullable"), (*way, "nullable"))
            yield {"type": "null"}
        elif isinstance(reference := schema.get("$ref"), str):
            # A reference that leads back to itself adds no alternative.
            if reference not in way:
                target = _resolve(reference, self.root)
                yield from self._all_of([_without(schema, "$ref"), target], (*way, reference))
        elif isinstance(parts := schema.get("allOf"), list):
            yield from self._all_of([_without(schema, "allOf"), *parts], (*way, "allOf"))
        elif key := next((key for key in ("anyOf", "oneOf") if isinstance(schema.get(key), list)), None):
            rest = _without(schema, key)
            for option in schema[key]:
                if isinstance(option, Mapping):
                    around = _without(rest, "type") if "type" in option else rest
                    yield from self._all_of([around, option], (*way, key))
        else:
            types = schema.get("type")
            for name in types if isinstance(types, list) else [types]:
                yield {**schema, "type": _kind(name) if isinstance(name, str) else None}

    def _all_of(self, parts: list[Any], way: tuple[str, ...]) -> Iterator[Schema]:
        """Every alternative of each part with every one of the others."""
        pools = [list(self._expand(part, way)) for part in parts if isinstance(part, Mapping)]
        for combination in product(*pools):
            self._steps_left -= len(combination)
            if self._steps_left < 0:
                return
            anything: Schema | None = _ANYTHING
            if (merged := reduce(_both, combination, anything)) is not None:
                yield merged


@cache
def _kind(name: str) -> str | None:
    """JSON schema's name for a type, whatever language its author comes from."""
    word = name.strip().lower()
    if word in _KINDS:
        return _KINDS[word]
    if word.startswith("[]") or word.endswith("[]"):
        return "array"
    words = [] if _SEVERAL.search(word) else _BETWEEN_WORDS.split(_SIZE.sub("", word))
    known = [_KINDS[word] for word in words if word in _KINDS]
    # ``list of int``, but ``long double``.
    return next((kind for kind in known if kind in ("array", "object")), known[-1] if known else None)


class Shape:
    """What a schema says about the tags in an element.

    Attributes:
        is_text: tags are text.  is_open: tags of any name may be in it.
        is_leaf: there is a text in it, and no tags.  is_array: it may be an array.
        is_array_only, is_structure: if it is not null, it is an array; or an array or an object.
    """

    def __init__(self, schema: Any, schemas: Schemas):
        self._schemas = schemas
        self._branches = schemas.branches(schema)
        kinds = {branch["type"] or _listed_kind(branch) for branch in self._branches} or {None}
        self._objects = [branch for branch in self._branches if branch["type"] == "object"]
        self._arrays = [branch for branch in self._branches if branch["type"] == "array"]
        self.is_text = "string" in kinds and not kinds & {"array", "object", None}
        self.is_leaf = not kinds & {"array", "object"}
        self.is_array = bool(self._arrays)
        self.is_array_only = self.is_array and not kinds - {"array", "null"}
        self.is_structure = not kinds - {"array", "object", "null"} and not self.is_leaf
        closed = [not branch.get("additionalProperties", not _properties(branch)) for branch in self._objects]
        self.is_open = None in kinds or not all(closed)

    def names(self, tag: str) -> bool:
        """Whether the schema itself has such a tag."""
        return any(tag in _properties(branch) for branch in self._objects) or (
            tag == "item" and self.is_array
        )

    def of_child(self, tag: str, index: int) -> "Shape":
        for branch in self._objects:
            if tag in _properties(branch):
                return self._schemas.shape(_properties(branch)[tag])
        for branch in self._arrays if tag == "item" or not self._objects else ():
            return self._schemas.shape(_item_schema(branch, index))
        extra = [
            branch["additionalProperties"] for branch in self._objects if "additionalProperties" in branch
        ]
        return self._schemas.shape(extra[0] if extra else None)


def _without(schema: Schema, key: str) -> dict[str, Any]:
    return {name: value for name, value in schema.items() if name != key}


def _resolve(reference: str, root: Schema) -> Any:
    if reference != "#" and not reference.startswith("#/"):
        return None
    target: Any = root
    for part in reference.split("/")[1:]:
        part = unquote(part).replace("~1", "/").replace("~0", "~")
        if isinstance(target, list):
            target = {str(index): item for index, item in enumerate(target)}
        target = target.get(part) if isinstance(target, Mapping) else None
    return target


def _both(one: Schema | None, other: Schema) -> Schema | None:
    """What fits both of two alternatives; None for types that exclude each other."""
    if one is None:
        return None
    kinds = {one["type"], other["type"]} - {None}
    if len(kinds) == 2 and kinds != {"integer", "number"}:
        return None
    kind = "integer" if len(kinds) == 2 else next(iter(kinds), None)
    properties = dict(_properties(one))
    for name, schema in _properties(other).items():
        properties[name] = {"allOf": [properties[name], schema]} if name in properties else schema
    merged = {**one, **other, "type": kind, "required": [*_required(one), *_required(other)]}
    return {**merged, "properties": properties} if properties else merged


def _type_of(schema: Schema) -> str | None:
    """The type of an alternative: as it says, or as its other keywords imply."""
    if schema["type"] is not None:
        return schema["type"]
    if "properties" in schema or "additionalProperties" in schema:
        return "object"
    return "array" if "items" in schema or "prefixItems" in schema else None


def _properties(schema: Schema) -> Schema:
    properties = schema.get("properties")
    return properties if isinstance(properties, Mapping) else {}


def _required(schema: Schema) -> list[str]:
    required = schema.get("required")
    return [name for name in required if isinstance(name, str)] if isinstance(required, list) else []


def _item_schema(schema: Schema, index: int) -> Any:
    prefix, items = schema.get("prefixItems"), schema.get("items")
    if isinstance(items, list):
        # Of drafts before 2020-12.
        prefix, items = items, schema.get("additionalItems")
    return prefix[index] if isinstance(prefix, list) and index < len(prefix) else items


def _listed_kind(schema: Schema) -> str | None:
    """Only scalars are listed: tags are text."""
    listed = _listed(schema)
    return "string" if listed and not any(isinstance(v, (list, dict)) for v in listed) else None


def _listed(schema: Schema) -> list[Any]:
    listed = [schema["const"]] if "const" in schema else schema.get("enum")
    return listed if isinstance(listed, list) else []


# --- values ---


def _typed(element: Element, schema: Any, schemas: Schemas) -> Any:
    """The value that ``element`` stands for, by what the schema of its parameter says."""
    branches = schemas.branches(schema)
    # Where a text may be, blanks are one, and not how a model writes what is listed and empty.
    blanks = all(_listed(branch) or branch["type"] in _TEXTLESS for branch in branches)
    for value in chain.from_iterable(map(_listed, branches)):
        if _is_written(value, element, blanks):
            return deepcopy(value)
    if not element.children:
        return _leaf(element, branches, schemas)
    kinds = {branch["type"] for branch in branches}
    if "string" in kinds and not kinds & {"array", "object", None}:
        # Tags in a text are text.
        return element.source
    return _structure(element, _best_branch(element, branches, schemas), schemas)


def rendered(value: Any) -> str:
    """A scalar as the chat template writes it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return "" if value is None else str(value)


def _is_written(value: Any, element: Element, blanks: bool = True) -> bool:
    """Whether ``element`` is what the chat template makes of ``value``, and ``blanks`` in an empty one."""
    if isinstance(value, Mapping):
        members = [(name, member) for name, member in value.items() if member is not None]
    elif isinstance(value, list):
        members = [("item", member) for member in value]
    else:
        return not element.children and rendered(value) == element.text
    text = element.text.strip() if members or blanks else element.text
    if text or [name for name, _ in members] != [child.name for child in element.children]:
        return False
    pairs = zip((member for _, member in members), element.children, strict=True)
    return all(_is_written(member, child, blanks) for member, child in pairs)


# --- text ---

_NO_VALUE = object()


def _leaf(element: Element, branches: list[Schema], schemas: Schemas) -> Any:
    text, kinds = element.text, [branch["type"] for branch in branches]
    if schemas.as_json and not branches:
        return _any_json(text)
    if text.strip() in _NULLS and _takes_null(branches, text):
        return None
    if not text.strip() and not any(map(_takes_text, branches)):
        for empty, kind in ((None, "null"), ([], "array"), ({}, "object")):
            if kind in kinds:
                return empty
    # What is written just as the template writes it goes before what can be understood.
    for exact in (True, False):
        for schema in branches:
            value = _as_type(element, schema, schemas)
            if value is not _NO_VALUE and (not exact or _is_exact(value, text)):
                return value
    arrays = [schema for schema in branches if schema["type"] == "array"]
    # One bare value as an array of it; else, whatever the schema wanted, this is what was written.
    return _array_of_one(element, arrays[0], schemas) if arrays and text.strip() else text


def _takes_null(branches: list[Schema], text: str) -> bool:
    """Whether the word is null: where that is allowed, or where it can't be a text."""
    texts = [b for b in branches if b["type"] == "string" or any(isinstance(v, str) for v in _listed(b))]
    if text.strip() != "null":
        # As other languages write it: only where nothing else is meant.
        return bool(branches) and not any(b["type"] in ("string", None) or _listed(b) for b in branches)
    if any(branch["type"] == "null" or None in _listed(branch) for branch in branches):
        return text == "null" or not any(map(_takes_text, texts))
    return not texts


def _any_json(text: str) -> Any:
    """Any JSON but a string."""
    word = text.strip()
    is_long_number = len(word) >= _MAX_DIGITS and word[0] not in "[{"
    value = _NO_VALUE if word.startswith('"') or is_long_number else _parsed(word)
    return text if value is _NO_VALUE else value


def _is_exact(value: Any, text: str) -> bool:
    return isinstance(value, (list, dict)) or text == ("null" if value is None else rendered(value))


def _takes_text(schema: Schema) -> bool:
    return schema["type"] in ("string", None) and not _listed(schema)


def _as_type(element: Element, schema: Schema, schemas: Schemas) -> Any:
    kind, text, word = schema["type"], element.text, element.text.strip()
    if kind in ("string", None):
        return text if _takes_text(schema) else _NO_VALUE
    if kind == "integer":
        return _integer(word)
    if kind == "number":
        return _number(word)
    if kind == "boolean":
        return {"true": True, "1": True, "false": False, "0": False}.get(word.lower(), _NO_VALUE)
    if kind == "null":
        return None if word.lower() in ("null", "none") else _NO_VALUE
    if word.startswith("<") and (children := bare_elements(word, element.depth + 1)):
        return _structure(Element(element.name, children=children), schema, schemas)
    return _json(word, list if kind == "array" else dict)


def _integer(word: str) -> Any:
    number = _number(word)
    if isinstance(number, float):
        return int(number) if number.is_integer() else _NO_VALUE
    return number


def _number(word: str) -> Any:
    if len(word) >= _MAX_DIGITS or not _NUMBER.match(word):
        return _NO_VALUE
    if _INTEGER.match(word):
        return int(word)
    return value if math.isfinite(value := float(word)) else _NO_VALUE


def _finite(word: str) -> float:
    if not math.isfinite(value := float(word)):
        raise ValueError(f"{word} is no number of JSON")
    return value


def _json(word: str, kind: type) -> Any:
    return _parsed(word) if word.startswith("[" if kind is list else "{") else _NO_VALUE


def _parsed(word: str) -> Any:
    try:
        return json.loads(word, parse_constant=_finite, parse_float=_finite)
    except (ValueError, RecursionError):
        return _NO_VALUE


def json_object(text: str) -> dict[str, Any] | None:
    value = _json(text.strip(), dict)
    return value if isinstance(value, dict) else None


def _array_of_one(element: Element, schema: Schema, schemas: Schemas) -> list[Any]:
    word = element.text.strip()
    only = Element("item", word, depth=element.depth + 1)
    # The items of an array of arrays are not guessed at any further.
    items = [branch for branch in schemas.branches(_item_schema(schema, 0)) if branch["type"] != "array"]
    return [_leaf(only, items, schemas)]


# --- tags ---


def _structure(element: Element, schema: Schema, schemas: Schemas) -> Any:
    if schema["type"] == "array" or (schema["type"] is None and _has_items(element)):
        return _items(_with_text(element), schema, schemas)
    return _object(element, schema, schemas)


def _best_branch(element: Element, branches: list[Schema], schemas: Schemas) -> Schema:
    """The alternative that has such tags in it: the first that fits, or the first that may."""
    names = {child.name for child in element.children}
    candidates = [schema for schema in branches if schema["type"] in ("array", "object")]
    for strictly in (True, False):
        for schema in candidates:
            if schema["type"] == "array" and names == {"item"}:
                return schema
            if schema["type"] == "object" and _object_fits(element, names, schema, schemas, strictly):
                return schema
    # Of what fits nowhere, an object's tags are told by not being items.
    objects = [schema for schema in candidates if schema["type"] == "object"]
    return (objects or candidates or [_ANYTHING])[0]


def _object_fits(element: Element, names: set[str], schema: Schema, schemas: Schemas, strictly: bool) -> bool:
    properties = _properties(schema)
    closed = not schema.get("additionalProperties", not properties)
    if strictly and not (set(_required(schema)) <= names and (names <= set(properties) or not closed)):
        return False
    if properties and not names & set(properties):
        return False
    for child in element.children:
        branches = schemas.branches(properties.get(child.name))
        listed = [_listed(branch) for branch in branches]
        if listed and all(listed) and not any(_is_written(v, child) for values in listed for v in values):
            return False
    return True


def _with_text(element: Element) -> list[Element]:
    """The items of an array: text among them is one as well."""
    items = list(element.children)
    for index, text in reversed(element.between):
        items.insert(index, Element("item", text.strip(), depth=element.depth + 1))
    return items


def _has_items(element: Element) -> bool:
    return bool(element.children) and all(child.name == "item" for child in element.children)


def _part(element: Element) -> list[Element]:
    """The items of an array of which this is one of several tags: it may be an item itself."""
    is_empty = not element.children and not element.text.strip()
    return _with_text(element) if is_empty or _has_items(element) else [element]


def _items(elements: list[Element], schema: Schema, schemas: Schemas) -> list[Any]:
    return [_typed(element, _item_schema(schema, index), schemas) for index, element in enumerate(elements)]


def _object(element: Element, schema: Schema, schemas: Schemas) -> dict[str, Any]:
    together: dict[str, list[Element]] = {}
    for child in element.children:
        together.setdefault(child.name, []).append(child)
    value: dict[str, Any] = {}
    for name, children in together.items():
        own = _properties(schema).get(name, schema.get("additionalProperties"))
        # A repeated tag is a list, whose schema may be the property's own.
        arrays = [branch for branch in schemas.branches(own) if branch["type"] == "array"]
        if len(children) == 1:
            value[name] = _typed(children[0], own, schemas)
        else:
            # One array in several tags.
            parts = [_part(child) if arrays else [child] for child in children]
            value[name] = _items(list(chain(*parts)), arrays[0] if arrays else {"items": own}, schemas)
    if element.text.strip():
        key = "$text"
        while key in value:
            key = f"${key}"
        value[key] = element.text
    return value
