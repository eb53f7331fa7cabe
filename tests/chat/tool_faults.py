"""Calls with one fault each, as models write them: the original call is known."""

import json
import random
from dataclasses import dataclass
from typing import Any

from tests.chat.tool_values import NS

NAMES = ["city", "count", "tags", "note", "place", "legs", "ratio", "on", "lines", "who"]
WORDS = ["Oslo", "x y", "a < b", "<b>", "5", "true", "", " kept ", "two\nlines", "ü", "]", "name=value"]


def schema(rng: random.Random, depth: int) -> dict[str, Any]:
    kind = rng.choice(["string", "string", "integer", "number", "boolean", "array", "object"][: 5 + depth])
    if kind == "array":
        return {"type": "array", "items": schema(rng, depth - 1)}
    if kind == "object":
        return object_schema(rng, depth - 1)
    return {"type": kind}


def object_schema(rng: random.Random, depth: int) -> dict[str, Any]:
    names = rng.sample(NAMES, rng.randint(1, 4))
    return {"type": "object", "properties": {name: schema(rng, depth) for name in names}}


def value(rng: random.Random, of: dict[str, Any]) -> Any:
    kind = of["type"]
    if kind == "object":
        properties = of["properties"]
        chosen = [name for name in properties if rng.random() < 0.8]
        rng.shuffle(chosen)
        return {name: value(rng, properties[name]) for name in chosen}
    if kind == "array":
        return [value(rng, of["items"]) for _ in range(rng.randint(0, 3))]
    values = {"string": WORDS, "integer": [0, -4, 12], "number": [0.5, 3], "boolean": [True, False]}
    return rng.choice(values[kind])


def tags(content: Any) -> list[str]:
    """As the template has it: opening and closing tags with texts between."""
    if isinstance(content, dict):
        return [t for key, v in content.items() for t in [f"{NS}<{key}>", *tags(v), f"{NS}</{key}>"]]
    if isinstance(content, list):
        return [t for v in content for t in [f"{NS}<item>", *tags(v), f"{NS}</item>"]]
    return [json.dumps(content) if isinstance(content, bool) else str(content)]


@dataclass
class Faulty:
    """``forced``: tags or schema leave one reading."""

    kind: str
    text: str
    tools: list[Any]
    call: dict[str, Any]
    forced: bool = True


# --- what the rules force ---


@dataclass(frozen=True)
class Open:
    """An open element at some place of a call; ``begun``: names of the elements that have begun in it."""

    name: str
    schema: dict[str, Any]
    begun: frozenset[str] = frozenset()

    def lacks(self, name: str) -> bool:
        """Whether an element of this name may still come in it."""
        if self.schema["type"] == "array":
            return name == "item"
        return name in self.schema.get("properties", {}) and name not in self.begun


@dataclass
class Piece:
    """A tag or a text.  ``around``: what is open where it stands, the outermost first."""

    text: str
    around: tuple[Open, ...]

    @property
    def name(self) -> str:
        return self.text.removeprefix(NS).strip("</>")

    @property
    def is_closing(self) -> bool:
        return self.text.startswith(f"{NS}</")

    @property
    def is_opening(self) -> bool:
        return self.text.startswith(f"{NS}<") and not self.is_closing


def pieces_of(content: Any, of: dict[str, Any], around: tuple[Open, ...]) -> list[Piece]:
    """The same as :func:`tags`, with what is open."""
    if not isinstance(content, (dict, list)):
        return [Piece(*tags(content), around)]
    found, parent = [], around[-1]
    members = content.items() if isinstance(content, dict) else [("item", member) for member in content]
    for name, member in members:
        schema = of["items"] if isinstance(content, list) else of["properties"][name]
        opening = Piece(f"{NS}<{name}>", (*around[:-1], parent))
        parent = Open(parent.name, parent.schema, parent.begun | {name})
        inside = (*around[:-1], parent, Open(name, schema))
        inner = pieces_of(member, schema, inside)
        begun = frozenset(member) if isinstance(member, dict) else frozenset({"item"})
        closing = Piece(f"{NS}</{name}>", (*inside[:-1], Open(name, schema, begun)))
        found += [opening, *inner, closing]
    return found


def ends_by_itself(closing: Piece, after: Piece) -> bool:
    """Whether what comes after a container or a leaf closes it as well, if its own closing tag does not."""
    element, parent = closing.around[-1], closing.around[-2]
    if after.is_closing:
        return parent.name != element.name
    # An opening tag that could belong in it may do so.
    return after.is_opening and not element.lacks(after.name)


def wrong_closing_is_forced(body: list[Piece], at: int, name: str) -> bool:
    """``name``: that of the tag which stands there instead."""
    *around, element = body[at].around
    if name == element.name:
        return True
    if name in [each.name for each in around[1:]]:
        # It closes that element, too: right if this was to come, and if nothing takes the tags that come.
        depth = [each.name for each in reversed(around)].index(name) + 1
        coming = body[at + 1 : at + 1 + depth]
        left = around[: len(around) - depth]
        return all(each.is_closing for each in coming) and not any(
            each.lacks(piece.name) for each in left for piece in coming
        )
    if any(each.lacks(name) for each in body[at].around):
        # An opening tag of that name may have been lost.
        return False
    return ("properties" not in element.schema and "items" not in element.schema) or ends_by_itself(
        body[at], body[at + 1]
    )


def lost_opening_is_forced(body: list[Piece], at: int) -> bool:
    around, name = body[at].around, body[at].name
    if body[at + 1].text.startswith("<") or name in [each.name for each in around[1:]]:
        return False
    end = next(
        n for n in range(at + 1, len(body)) if body[n].is_closing and len(body[n].around) == len(around) + 1
    )
    inner = [
        piece for piece in body[at + 1 : end] if piece.is_opening and len(piece.around) == len(around) + 1
    ]
    return not any(each.lacks(piece.name) for each in around for piece in inner)


OPEN, CLOSE = f"{NS}<tool_call>\n", f"\n{NS}</tool_call>"
HEADERS = {
    "invoke header": ["{ns}invoke name=\"{f}\">", "{ns}<invoke name {f}\">", "{ns}<invoke name{f}\">",
                      "{ns}<invoke name name=\"{f}\">", "{ns}<invoke name{ns}<{f}\">"],
    "token missing": ["<invoke name=\"{f}\">"],
}  # fmt: skip
KINDS = [
    *("closing tag missing", "opening tag missing", "wrong closing tag", "stray closing tag"),
    *("invoke not closed", "blank after the token", "token missing", "M2 parameter tags", "invoke header"),
    *("no outer tag", "JSON in the block", "token quoted"),
]


def faulty(rng: random.Random) -> Faulty:
    function = rng.choice(["ride", "get_weather", "book"])
    parameters = object_schema(rng, 2)
    tools = [{"type": "function", "function": {"name": function, "parameters": parameters}}]
    arguments = value(rng, parameters)
    kind = rng.choice(KINDS)
    if kind == "token quoted" or (kind != "JSON in the block" and not arguments):
        name = rng.choice(NAMES)
        parameters["properties"][name] = {"type": "string"}
        quoted = [f'{NS}<invoke name="x">', f"{NS}</tool_call>", f"{NS}<b>", f"{NS}</invoke> x", NS]
        arguments[name] = f"see {rng.choice(quoted)} here" if kind == "token quoted" else "x"
    head, end = f'{NS}<invoke name="{function}">', f"{NS}</invoke>"
    parts = pieces_of(arguments, parameters, (Open("invoke", parameters),))
    parts.append(Piece(end, ()))
    body = [piece.text for piece in parts[:-1]]
    opening = [n for n, piece in enumerate(parts[:-1]) if piece.is_opening]
    closing = [n for n, piece in enumerate(parts[:-1]) if piece.is_closing]
    before, after, forced = OPEN, CLOSE, True
    if kind == "closing tag missing":
        at = rng.choice(closing)
        del body[at]
        forced = ends_by_itself(parts[at], parts[at + 1])
    elif kind == "opening tag missing":
        at = rng.choice(opening)
        body[at] = NS
        forced = lost_opening_is_forced(parts, at)
    elif kind == "wrong closing tag":
        at, name = rng.choice(closing), rng.choice([*NAMES, "other", "item"])
        body[at] = f"{NS}</{name}>"
        forced = wrong_closing_is_forced(parts, at, name)
    elif kind == "stray closing tag":
        at = rng.choice([0, *(n + 1 for n in closing)])
        body.insert(at, f"{NS}</other>")
    elif kind == "invoke not closed":
        end = ""
    elif kind == "blank after the token":
        blank = rng.choice([" ", "\n", "  "])
        body = [t.replace(f"{NS}<", f"{NS}{blank}<") for t in body]
        head, end = (t.replace(NS, NS + blank) for t in (head, end))
    elif kind == "token missing":
        if rng.random() < 0.5:
            head = head.removeprefix(NS)
        else:
            end = "\n" + end.removeprefix(NS)
    elif kind == "M2 parameter tags":
        body = []
        for name, argument in arguments.items():
            body += [f'{NS}<parameter name="{name}">', *tags(argument), f"{NS}</parameter>"]
    elif kind == "invoke header":
        head = rng.choice(HEADERS[kind]).format(ns=NS, f=function)
    elif kind == "no outer tag":
        before, after = rng.choice([("", ""), ("", CLOSE), (OPEN, "")])
    if kind == "JSON in the block":
        call = {"name": function, "arguments": arguments}
        text = OPEN + json.dumps(call, indent=rng.choice([None, 1])) + CLOSE
    else:
        text = before + head + "".join(body) + end + after
    return Faulty(kind, text, tools, {"name": function, "arguments": arguments}, forced)
