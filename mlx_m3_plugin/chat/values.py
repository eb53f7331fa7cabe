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


@dataclass(eq=False)
class Element:
    """One tag with what is in it.

    Attributes:
        name: of the tag.
        texts: those directly in it, in pieces: the ones before each child, and those after the last one.
        children: the tags directly in it.  source: everything between its tags, where there are any in it.
        depth: tags around it.
    """

    name: str
    texts: list[list[str]] = field(default_factory=lambda: [[]])
    children: list["Element"] = field(default_factory=list)
    source: str = ""
    depth: int = 0

    @property
    def text(self) -> str:
        return "".join(chain(*self.texts))


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
        found.append(Element(opening[1] if name is None else name, [[inner]], depth=depth))
        begin = end + len(closing)
    return found, begin


def typed_arguments(parameters: list[Element], schemas: "Schemas") -> dict[str, Any]:
    """The arguments of a call, typed by what its tool has as ``parameters``."""
    element = Element("invoke", children=parameters)
    schemas.found_bare_tags = False
    root = Branch({**schemas.root, "type": "object"}, schemas)
    return _object(element, _best_branch(element, schemas.shape(schemas.root).objects, root))


# --- schemas ---


class Schemas:
    """A tool's whole ``parameters``, into which ``$ref`` points, and the alternatives in them."""

    def __init__(self, root: Any, as_json: bool = False):
        self.root: Schema = root if isinstance(root, Mapping) else {}
        # Nobody knows the tools: texts that are JSON are read as such.
        self.as_json = as_json
        # By identity, which is why the schema is kept with it.
        self._shapes: dict[int, tuple[Any, Shape]] = {}
        self._steps_left = 0
        # Whether the arguments that were typed last had tags without their token in a text.
        self.found_bare_tags = False
        self.anything = Branch(_ANYTHING, self)

    def shape(self, schema: Any) -> "Shape":
        if id(schema) not in self._shapes:
            self._steps_left = _MOST_STEPS
            branches = [Branch(each, self) for each in self._expand(schema, ())]
            self._shapes[id(schema)] = schema, Shape(branches, self)
        return self._shapes[id(schema)][1]

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


class Branch:
    """One alternative of a schema: in it are no ``$ref``, ``anyOf``, ``oneOf``, ``allOf``, ``nullable`` and
    lists of types.

    Attributes:
        type: JSON schema's word, as it says, or as its other keywords imply; or None.
        listed: the values of ``enum`` or ``const``.  takes_text: it allows every text.
        kind: the type; of listed scalars, as tags in them are text, a string.
        is_open: an object may have properties that it does not name.
    """

    def __init__(self, schema: Schema, schemas: Schemas):
        self._schema, self.schemas = schema, schemas
        self.type: str | None = schema["type"]
        if self.type is None and ("properties" in schema or "additionalProperties" in schema):
            self.type = "object"
        elif self.type is None and ("items" in schema or "prefixItems" in schema):
            self.type = "array"
        self.properties, self.required = _properties(schema), set(_required(schema))
        listed = [schema["const"]] if "const" in schema else schema.get("enum")
        self.listed = listed if isinstance(listed, list) else []
        self.takes_text = self.type in ("string", None) and not self.listed
        lists_tags = any(isinstance(value, (list, dict)) for value in self.listed)
        self.kind = self.type or ("string" if self.listed and not lists_tags else None)
        self.types_others = "additionalProperties" in schema
        self.is_open = bool(schema.get("additionalProperties", not self.properties))

    def member(self, name: str) -> "Shape":
        return self.schemas.shape(self.properties.get(name, self._schema.get("additionalProperties")))

    def item(self, index: int) -> "Shape":
        prefix, items = self._schema.get("prefixItems"), self._schema.get("items")
        if isinstance(items, list):
            # Of drafts before 2020-12.
            prefix, items = items, self._schema.get("additionalItems")
        if isinstance(prefix, list) and index < len(prefix):
            items = prefix[index]
        return self.schemas.shape(items)


class Shape:
    """What a schema says about the tags in an element.

    Attributes:
        branches: the alternatives of the schema, in its order.  Anything but a mapping says nothing: none.
        objects, arrays: those of these types.
        is_text: tags are text.  is_open: tags of any name may be in it.
        is_leaf: there is a text in it, and no tags.
        is_array_only, is_structure: if it is not null, it is an array; or an array or an object.
    """

    def __init__(self, branches: list[Branch], schemas: Schemas):
        self.schemas, self.branches = schemas, branches
        self.objects = [branch for branch in branches if branch.type == "object"]
        self.arrays = [branch for branch in branches if branch.type == "array"]
        kinds = {branch.kind for branch in branches} or {None}
        self.is_text = "string" in kinds and not kinds & {"array", "object", None}
        self.is_leaf = not kinds & {"array", "object"}
        self.is_array_only = "array" in kinds and not kinds - {"array", "null"}
        self.is_structure = not kinds - {"array", "object", "null"} and not self.is_leaf
        self.is_open = None in kinds or any(branch.is_open for branch in self.objects)

    def names(self, tag: str) -> bool:
        """Whether the schema itself has such a tag."""
        return (tag == "item" and bool(self.arrays)) or any(tag in each.properties for each in self.objects)

    def of_child(self, tag: str, index: int) -> "Shape":
        for branch in self.objects:
            if tag in branch.properties:
                return branch.member(tag)
        if self.arrays and (tag == "item" or not self.objects):
            return self.arrays[0].item(index)
        others = [branch for branch in self.objects if branch.types_others]
        return others[0].member(tag) if others else self.schemas.shape(None)


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


def _properties(schema: Schema) -> Schema:
    properties = schema.get("properties")
    return properties if isinstance(properties, Mapping) else {}


def _required(schema: Schema) -> list[str]:
    required = schema.get("required")
    return [name for name in required if isinstance(name, str)] if isinstance(required, list) else []


# --- values ---


def _typed(element: Element, shape: Shape) -> Any:
    """The value that ``element`` stands for, by what the schema of its parameter says."""
    branches = shape.branches
    # Where a text may be, blanks are one, and not how a model writes what is listed and empty.
    blanks = all(branch.listed or branch.type in _TEXTLESS for branch in branches)
    for value in chain.from_iterable(branch.listed for branch in branches):
        if _is_written(value, element, blanks):
            return deepcopy(value)
    if not element.children:
        text = element.text
        return _any_json(text) if shape.schemas.as_json else _leaf(text, branches, element.depth)
    if shape.is_text:
        return element.source
    return _structure(element, _best_branch(element, branches, shape.schemas.anything))


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


def _leaf(text: str, branches: list[Branch], depth: int) -> Any:
    """``depth``: tags around it."""
    kinds = [branch.type for branch in branches]
    if text.strip() in _NULLS and _takes_null(branches, text):
        return None
    if not text.strip() and not any(branch.takes_text for branch in branches):
        for empty, kind in ((None, "null"), ([], "array"), ({}, "object")):
            if kind in kinds:
                return empty
    # What is written just as the template writes it goes before what can be understood.
    for exact in (True, False):
        for branch in branches:
            value = _as_type(text, branch, depth)
            if value is not _NO_VALUE and (not exact or _is_exact(value, text)):
                return value
    if "array" in kinds and text.strip():
        # One bare value as an array of it.  The items of an array of arrays are not guessed at any further.
        items = branches[kinds.index("array")].item(0).branches
        return [_leaf(text.strip(), [branch for branch in items if branch.type != "array"], depth + 1)]
    # Whatever the schema wanted, this is what was written.
    return text


def _takes_null(branches: list[Branch], text: str) -> bool:
    """Whether the word is null: where that is allowed, or where it can't be a text."""
    texts = [b for b in branches if b.type == "string" or any(isinstance(v, str) for v in b.listed)]
    if text.strip() != "null":
        # As other languages write it: only where nothing else is meant.
        return bool(branches) and not any(b.type in ("string", None) or b.listed for b in branches)
    if any(branch.type == "null" or None in branch.listed for branch in branches):
        return text == "null" or not any(branch.takes_text for branch in texts)
    return not texts


def _any_json(text: str) -> Any:
    """Any JSON but a string."""
    word = text.strip()
    is_long_number = len(word) >= _MAX_DIGITS and word[0] not in "[{"
    value = _NO_VALUE if word.startswith('"') or is_long_number else parsed(word)
    return text if value is _NO_VALUE else value


def _is_exact(value: Any, text: str) -> bool:
    return isinstance(value, (list, dict)) or text == ("null" if value is None else rendered(value))


def _as_type(text: str, branch: Branch, depth: int) -> Any:
    kind, word = branch.type, text.strip()
    if kind in ("string", None):
        return text if branch.takes_text else _NO_VALUE
    if kind == "integer":
        return _integer(word)
    if kind == "number":
        return _number(word)
    if kind == "boolean":
        return {"true": True, "1": True, "false": False, "0": False}.get(word.lower(), _NO_VALUE)
    if kind == "null":
        return None if word.lower() in ("null", "none") else _NO_VALUE
    if word.startswith("<") and (children := bare_elements(word, depth + 1)):
        branch.schemas.found_bare_tags = True
        return _structure(Element("", children=children), branch)
    value = parsed(word)
    return value if isinstance(value, list if kind == "array" else dict) else _NO_VALUE


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


def parsed(word: str) -> Any:
    try:
        return json.loads(word, parse_constant=_finite, parse_float=_finite)
    except (ValueError, RecursionError):
        return _NO_VALUE


def json_object(text: str) -> dict[str, Any] | None:
    value = parsed(text.strip())
    return value if isinstance(value, dict) else None


# --- tags ---


def _structure(element: Element, branch: Branch) -> Any:
    if branch.type == "array" or (branch.type is None and _has_items(element)):
        return _items(_with_text(element), branch)
    return _object(element, branch)


def _best_branch(element: Element, branches: list[Branch], otherwise: Branch) -> Branch:
    """The alternative that has such tags in it: the first that fits, or the first that may."""
    names = {child.name for child in element.children}
    candidates = [branch for branch in branches if branch.type in ("array", "object")]
    for strictly in (True, False):
        for branch in candidates:
            if branch.type == "array" and names == {"item"}:
                return branch
            if branch.type == "object" and _object_fits(element, names, branch, strictly):
                return branch
    # Of what fits nowhere, an object's tags are told by not being items.
    objects = [branch for branch in candidates if branch.type == "object"]
    return (objects or candidates or [otherwise])[0]


def _object_fits(element: Element, names: set[str], branch: Branch, strictly: bool) -> bool:
    properties = branch.properties.keys()
    if strictly and not (branch.required <= names and (names <= properties or branch.is_open)):
        return False
    if properties and not names & properties:
        return False
    for child in element.children:
        member = branch.member(child.name) if child.name in properties else None
        listed = [each.listed for each in member.branches] if member else []
        if listed and all(listed) and not any(_is_written(v, child) for values in listed for v in values):
            return False
    return True


def _with_text(element: Element) -> list[Element]:
    """The items of an array: text among them is one as well."""
    items = list(element.children)
    for index, pieces in reversed(list(enumerate(element.texts))):
        if text := "".join(pieces).strip():
            items.insert(index, Element("item", [[text]], depth=element.depth + 1))
    return items


def _has_items(element: Element) -> bool:
    return bool(element.children) and all(child.name == "item" for child in element.children)


def _part(element: Element) -> list[Element]:
    """The items of an array of which this is one of several tags: it may be an item itself."""
    is_empty = not element.children and not element.text.strip()
    return _with_text(element) if is_empty or _has_items(element) else [element]


def _items(elements: list[Element], branch: Branch) -> list[Any]:
    return [_typed(element, branch.item(index)) for index, element in enumerate(elements)]


def _object(element: Element, branch: Branch) -> dict[str, Any]:
    together: dict[str, list[Element]] = {}
    for child in element.children:
        together.setdefault(child.name, []).append(child)
    value: dict[str, Any] = {}
    for name, children in together.items():
        own = branch.member(name)
        if len(children) == 1:
            value[name] = _typed(children[0], own)
        elif own.arrays:
            # A repeated tag is a list, whose schema may be the property's own: one array in several tags.
            value[name] = _items(list(chain(*map(_part, children))), own.arrays[0])
        else:
            value[name] = [_typed(child, own) for child in children]
    if element.text.strip():
        key = "$text"
        while key in value:
            key = f"${key}"
        value[key] = element.text
    return value
