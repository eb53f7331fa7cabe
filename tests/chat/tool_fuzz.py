"""Random input for the parsers, most of it wrong: texts, blocks, tools."""

import random
from typing import Any

from tests.chat.tool_values import NS

# What the grammar is made of, and what looks like it.
SOUP = [
    *(NS, NS, NS, NS, NS, "<tool_call>", "</tool_call>", "<mm:think>", "</mm:think>"),
    *('<invoke name="f">', "<invoke name='g'>", "<invoke to=f>", "<invoke name=", "<invoke>", "</invoke>"),
    *("<a>", "</a>", "<b>", "</b>", "<item>", "</item>", "<c d>", "</", "<", ">", "/", "=", '"', "'"),
    *("]<]", "minimax", "[>[", "]<]minimax[>", " ", "\n", " " * 9, "x", "\u3000", "\x00", "\ud800", "ü"),
    *(
        "5",
        "-1.5",
        "1e999",
        "1" * 4100,
        "null",
        "TRUE",
        "nan",
        "[1, 2]",
        '{"a": [NaN]}',
        "[",
        '{"a":',
        "[" * 50,
    ),
]
NAMES = ["a", "b", "item", "c d", "$text", "kind"]
KEYWORDS = ["type", "properties", "items", "prefixItems", "additionalProperties", "required", "enum", "const"]
KEYWORDS += ["anyOf", "oneOf", "allOf", "$ref", "nullable", "additionalItems", "$defs", "description"]
TYPES = ["string", "integer", "number", "boolean", "null", "array", "object", "int", "STR", "file", ""]
REFERENCES = [
    "#",
    "#/",
    "#/$defs/a",
    "#/properties/a",
    "#/properties/b/anyOf/0",
    "#a",
    "http://x",
    "#/$defs/a/b",
]


def schema(rng: random.Random, depth: int) -> Any:
    """Mostly a schema, and sometimes not even that."""
    if depth == 0 or rng.random() < 0.05:
        return rng.choice([{}, True, None, 5, "x", [], [[]], {"type": rng.choice(TYPES)}, {"$ref": "#"}])
    made: dict[str, Any] = {}
    for keyword in rng.sample(KEYWORDS, rng.randint(1, 4)):
        if rng.random() < 0.1:
            made[keyword] = rng.choice(
                [None, 5, "x", [], {}, [5], [[]], {"a": 5}, True, [None], {"": ""}, "#"]
            )
        elif keyword in ("properties", "$defs"):
            made[keyword] = {name: schema(rng, depth - 1) for name in rng.sample(NAMES, 3)}
        elif keyword in ("prefixItems", "anyOf", "oneOf", "allOf"):
            made[keyword] = [schema(rng, depth - 1) for _ in range(rng.randint(0, 3))]
        elif keyword in ("items", "additionalItems", "additionalProperties"):
            made[keyword] = schema(rng, depth - 1)
        elif keyword == "type":
            made[keyword] = rng.choice(TYPES) if rng.random() < 0.8 else rng.sample(TYPES, 3)
        elif keyword == "required":
            made[keyword] = rng.sample(NAMES, 2)
        elif keyword == "enum":
            made[keyword] = [value(rng, 1) for _ in range(rng.randint(0, 3))]
        else:
            made[keyword] = {"const": value(rng, 1), "$ref": rng.choice(REFERENCES)}.get(keyword, True)
    return made


def tools(rng: random.Random) -> Any:
    if rng.random() < 0.1:
        return rng.choice(
            [None, [], {}, "x", [None], [{"function": None}], [{"name": 5}], [{"function": {}}], 5]
        )
    made = []
    for name in ("f", "g"):
        parameters = schema(rng, 4)
        if isinstance(parameters, dict) and rng.random() < 0.8:
            parameters["type"] = "object"
        made.append({"type": "function", "function": {"name": name, "parameters": parameters}})
    return made


def value(rng: random.Random, depth: int) -> Any:
    kind = rng.randrange(3 if depth > 0 else 1)
    if kind == 1:
        return [value(rng, depth - 1) for _ in range(rng.randint(0, 3))]
    if kind == 2:
        return {name: value(rng, depth - 1) for name in rng.sample(NAMES, rng.randint(0, 3))}
    return rng.choice(["", "x", " y\n", "<b>", "5", 5, 1.5, True, None, "null", 10**30])


def tagged(content: Any) -> str:
    """As the template has it; nulls in objects included, for what models may do."""
    if isinstance(content, dict):
        return "".join(f"{NS}<{key}>{tagged(member)}{NS}</{key}>" for key, member in content.items())
    if isinstance(content, list):
        return "".join(f"{NS}<item>{tagged(member)}{NS}</item>" for member in content)
    return str(content)


def block(rng: random.Random) -> str:
    invokes = []
    for _ in range(rng.randint(1, 2)):
        arguments = {name: value(rng, 3) for name in rng.sample(NAMES, 2)}
        invokes.append(f'{NS}<invoke name="{rng.choice("fgh")}">{tagged(arguments)}{NS}</invoke>\n')
    return f"{NS}<tool_call>\n{''.join(invokes)}{NS}</tool_call>"


def mutated(rng: random.Random, text: str) -> str:
    """A few pieces lost, doubled, swapped, cut or put in."""
    for _ in range(rng.randint(1, 4)):
        begin = rng.randint(0, len(text))
        end = min(len(text), begin + rng.choice([1, 3, 13, 40]))
        kind = rng.randrange(6)
        if kind == 0:
            text = text[:begin] + text[end:]
        elif kind == 1:
            text = text[:end] + text[begin:]
        elif kind == 2:
            text = text[:begin] + rng.choice(SOUP) + text[begin:]
        elif kind == 3:
            text = text[:begin] if rng.random() < 0.5 else text[begin:]
        elif kind == 4:
            # The commonest fault: a tag without its token.
            parts = text.split(NS)
            del_at = rng.randrange(len(parts))
            text = NS.join([*parts[:del_at], "".join(parts[del_at : del_at + 2]), *parts[del_at + 2 :]])
        else:
            text = text[end:] + text[:begin]
    return text


def text(rng: random.Random, blocks: list[str]) -> str:
    kind = rng.randrange(8)
    if kind == 0:
        return "".join(chr(rng.randrange(32, 1200)) for _ in range(rng.randint(0, 60)))
    if kind in (1, 2, 3):
        opened = rng.choice(["", f"{NS}<tool_call>", f'{NS}<tool_call>{NS}<invoke name="f">{NS}<a>'])
        return opened + "".join(rng.choices(SOUP, k=rng.randint(0, 30)))
    return mutated(rng, rng.choice(blocks))


def pieces(rng: random.Random, text: str) -> list[str]:
    """The text, cut at random."""
    cuts = sorted(rng.randint(0, len(text)) for _ in range(rng.randint(0, 8)))
    return [text[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
