"""Random replies of markers, half-markers, calls with faults, text and white space."""

import random

from tests.chat.tool_values import NS

STRING = {"type": "string"}
PARAMETERS = {"type": "object", "properties": {"a": STRING, "b": {"type": "array", "items": STRING}}}
TOOLS = [{"type": "function", "function": {"name": name, "parameters": PARAMETERS}} for name in "fg"]

PIECES = [
    *("<mm:think>", "</mm:think>", NS, f"{NS}<tool_call>", f"{NS}</tool_call>", f"{NS}<tool_call>\n"),
    *("<mm:thi", "</mm:", "<tool_call>", f"{NS}<tool_c", f"{NS}<invoke na", f"{NS} "),
    *("text", "a < b", "[x]", "\n", " ", "ü", "{", '{"name": "f"}', "<invoke", "</invoke>", "]"),
    *(f'{NS}<invoke name="f">', f"{NS}</invoke>", f"{NS}<a>", f"{NS}</a>", f"{NS}<b>", f"{NS}</b>"),
    *(f'{NS}<invoke name="f">{NS}<a>one{NS}</a>{NS}</invoke>', f"{NS}<a>two{NS}</a>", f"{NS}<item>"),
    f'{NS}<tool_call>\n{NS}<invoke name="g">{NS}<b>see{NS}</b>{NS}</invoke>\n{NS}</tool_call>',
    # Halves, which may meet where a marker was.
    *("]<]minimax", "[>[", "<mm:", "think>"),
]
HEADERS = [
    *(f'{NS}<invoke name="f">', f"{NS}<invoke name='g'>", f"{NS}<invoke to=f>", f'{NS}\n<invoke name="g">'),
    *(f'{NS}invoke name="f">', f'{NS}<invoke name f">', f'{NS}<invoke name{NS}<g">', f"{NS}<invoke nameg>"),
    *('<invoke name="f">', f'{NS}<invoke name="h">', f"{NS}<invoke nameh>"),
]
VALUES = [
    *("one", "", "null", "a < b", "[1]", " x\n", "</a>", "<mm:think>", "</mm:think>", "loose", "\n"),
    *(f"{NS}<item>i{NS}</item>{NS}<item>j{NS}</item>", "<item>x</item>", f"{NS}<item>"),
    *(NS, f"{NS}<b>", f"{NS}</invoke>", f"{NS}</tool_call>", f'{NS}<invoke name="x">'),
]
JSON_CALLS = [
    '{"name": "f", "arguments": {"a": "x"}}',
    '[{"name": "f", "arguments": {"a": "x"}},\n {"name": "g", "arguments": {}}]',
    '{"function": {"name": "f", "parameters": "{}"}} x',
]


def reply(rng: random.Random) -> str:
    if rng.random() < 0.4:
        return "".join(rng.choices(PIECES, k=rng.randint(1, 12)))
    pieces = [piece for _ in range(rng.randint(1, 3)) for piece in block(rng)]
    for _ in range(rng.choice([0, 0, 1, 1, 2])):
        at, kind = rng.randrange(len(pieces)), rng.randrange(4)
        if kind == 0:
            pieces[at] = ""
        elif kind == 1:
            pieces.insert(at, rng.choice(pieces))
        elif kind == 2:
            pieces.insert(at, rng.choice(PIECES))
        else:
            pieces = [*pieces[:at], ""]
    return "".join(pieces)


def block(rng: random.Random) -> list[str]:
    around = ["", "", " text", "<mm:think>hm", "</mm:think>", f"{NS}<tool_call>\n"]
    pieces = [rng.choice(around), rng.choice([f"{NS}<tool_call>"] * 3 + ["", " x ", f"{NS}<tool_call>\n"])]
    if rng.random() < 0.1:
        pieces.append(rng.choice(JSON_CALLS))
    for _ in range(rng.randint(1, 2)):
        pieces += invoke(rng)
    return [*pieces, rng.choice([f"{NS}</tool_call>"] * 4 + ["", f"{NS}</tool"])]


def invoke(rng: random.Random) -> list[str]:
    pieces = [rng.choice(HEADERS[:2] * 5 + HEADERS)]
    for _ in range(rng.randint(0, 3)):
        key = rng.choice("ab")
        opening, closing = rng.choice(_tags_of(key))
        pieces += [opening, rng.choice(VALUES[:4] * 3 + VALUES), closing]
        if rng.random() < 0.15:
            pieces.append(rng.choice([" ", "x", f"{NS}</q>", NS, "\n"]))
    ends = [f"{NS}</invoke>"] * 6 + ["</invoke>", "\n</invoke>", "", f"{NS} </invoke>"]
    return [*pieces, rng.choice(ends), rng.choice(["", "\n", " x"])]


def _tags_of(key: str) -> list[tuple[str, str]]:
    opening, closing = f"{NS}<{key}>", f"{NS}</{key}>"
    return [
        *[(opening, closing)] * 8,
        *((f"<{key}>", f"</{key}>"), (opening, f"</{key}>"), (f"{NS} <{key}>", f"{NS}\n</{key}>")),
        *((NS, closing), ("", closing), (opening, ""), (opening, f"{NS}</c>")),
        (f'{NS}<parameter name="{key}">', f"{NS}</parameter>"),
    ]
