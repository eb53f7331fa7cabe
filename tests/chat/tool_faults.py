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


def has_distinct_names(of: dict[str, Any]) -> bool:
    def names(of: dict[str, Any]) -> list[str]:
        own = list(of.get("properties", {}))
        inner = [*of.get("properties", {}).values(), *([of["items"]] if "items" in of else [])]
        return own + ["item"] * ("items" in of) + [name for each in inner for name in names(each)]

    found = names(of)
    return len(found) == len(set(found))


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
    head, end, body = f'{NS}<invoke name="{function}">', f"{NS}</invoke>", tags(arguments)
    opening = [n for n, t in enumerate(body) if t.startswith(f"{NS}<") and not t.startswith(f"{NS}</")]
    closing = [n for n, t in enumerate(body) if t.startswith(f"{NS}</")]
    before, after, forced = OPEN, CLOSE, True
    if kind == "closing tag missing":
        del body[rng.choice(closing)]
        # A name that is also one of what is around it may belong to either.
        forced = has_distinct_names(parameters)
    elif kind == "opening tag missing":
        at = rng.choice(opening)
        body[at] = NS
        forced = has_distinct_names(parameters) and not body[at + 1].startswith("<")
    elif kind == "wrong closing tag":
        at = rng.choice(closing)
        body[at] = f"{NS}</{rng.choice([*NAMES, 'other', 'item'])}>"
        # Of a container, or with the name of what is open or missing, it may mean more than one thing.
        forced = not body[at - 1].startswith(NS) and body[at].endswith("/other>")
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
