"""Random replies, with what they say by the rules, and ways to cut them."""

import random
import re
from dataclasses import dataclass, field
from typing import Any

from mlx_m3_plugin.chat.calls import ToolCall
from mlx_m3_plugin.chat.reply import Event, ReplyParser
from tests.chat.tool_rendering import marked
from tests.chat.tool_values import NS

MARKERS = ("<mm:think>", "</mm:think>", NS)
TEXTS = [
    *(
        "Hello",
        " world",
        "x < y",
        "a > b",
        "\n",
        "\n\n",
        " ",
        "<",
        "</",
        "<b>bold</b>",
        "<think>",
        "]",
        "[",
        "ü",
    ),
    *(
        "<mm",
        "<mm:think",
        "</mm:think",
        "/mm:think>",
        "mm:think>",
        "]<",
        "]<]minimax[>",
        "minimax[>[",
        "]<]image[>[",
    ),
    *(
        "<tool_call>",
        "</tool_call>",
        '<invoke name="f">',
        "</invoke>",
        "tool_call>",
        "<item>",
        "]<]]<]",
        "<<mm:",
    ),
]


@dataclass
class Reply:
    """A whole reply."""

    reasoning: str = ""
    content: str = ""
    calls: list[ToolCall] = field(default_factory=list)
    repairs: list[str] = field(default_factory=list)

    def add(self, event: Event) -> None:
        if event.kind == "reasoning":
            self.reasoning += event.text
        elif event.kind == "content":
            self.content += event.text
        elif event.call is not None:
            self.calls.append(event.call)
        else:
            self.repairs.append(event.text)


@dataclass
class Sample:
    """A reply, and what it says."""

    text: str = ""
    in_reasoning: bool = False
    says: Reply = field(default_factory=Reply)
    is_well_formed: bool = True


def sample(rng: random.Random) -> Sample:
    while True:
        made = _Writer(rng).write()
        if made is not None:
            return made


class _Writer:
    def __init__(self, rng: random.Random):
        self.rng = rng
        mode = rng.choice(["enabled", "disabled", "adaptive"])
        self.made = Sample(in_reasoning=mode == "enabled")
        self.state = "reasoning" if mode == "enabled" else "content"
        self.markers: list[int] = []

    def write(self) -> Sample | None:
        """None where text and markers met in a way that makes another marker."""
        if self.state == "content" and self.rng.random() < 0.5:
            self.marker(self.rng.choice(MARKERS[:2]))
        steps = [self.text, self.text, self.text, self.think, self.stray_marker, self.block, self.block]
        steps += [self.lone_token, self.bare_invoke]
        for _ in range(self.rng.randint(1, 7)):
            self.rng.choice(steps)()
        if self.rng.random() < 0.2:
            self.rng.choice([self.unclosed_block, self.half_opener])()
        text = self.made.text
        found = [match.start() for match in re.finditer("|".join(map(re.escape, MARKERS)), text)]
        return self.made if found == self.markers else None

    def raw(self, text: str) -> None:
        """Text whose markers are meant."""
        pattern = "|".join(map(re.escape, MARKERS))
        self.markers += [len(self.made.text) + match.start() for match in re.finditer(pattern, text)]
        self.made.text += text

    def text(self) -> None:
        text = "".join(self.rng.choices(TEXTS, k=self.rng.randint(1, 4)))
        self.made.text += text
        self.said(text)

    def said(self, text: str) -> None:
        if self.state == "reasoning":
            self.made.says.reasoning += text
        else:
            self.made.says.content += text

    def marker(self, marker: str) -> None:
        self.raw(marker)
        if marker == "</mm:think>":
            self.state = "content"
        elif marker == "<mm:think>":
            self.state = "reasoning"

    def think(self) -> None:
        self.marker("<mm:think>")
        self.text()
        self.marker("</mm:think>")

    def stray_marker(self) -> None:
        self.marker(self.rng.choice(MARKERS[:2]))

    def lone_token(self) -> None:
        self.raw(NS)
        self.said(NS)
        # What follows it is no tag of a block.
        text = self.rng.choice(["x", " x", "<b>", "</b>", "<tool-call>", "\n"]) + "."
        self.made.text += text
        self.said(text)
        self.made.is_well_formed = False

    def arguments(self) -> dict[str, str]:
        """Texts with everything in them but the token; without tools they stay texts."""
        names = self.rng.sample(["a", "b", "c d"], self.rng.randint(0, 3))
        pieces = [*TEXTS, "<mm:think>", "</mm:think>"]
        values = ["".join(self.rng.choices(pieces, k=self.rng.randint(0, 3))) for _ in names]
        return {name: value for name, value in zip(names, values, strict=True) if NS not in value}

    def invoke(self) -> str:
        arguments = self.arguments()
        name = self.rng.choice(["f", "get weather"])
        self.made.says.calls.append(ToolCall(name, arguments))
        parameters = "".join(f"§<{key}>{value}§</{key}>" for key, value in arguments.items())
        return f'§<invoke name="{name}">{parameters}§</invoke>'

    def closed(self, text: str) -> None:
        """Markers in a call are text, but for the token, which is not looked for in it either."""
        before = len(self.made.text)
        self.raw(marked(text))
        assert before in self.markers

    def block(self) -> None:
        invokes = [self.invoke() for _ in range(self.rng.randint(1, 2))]
        if self.rng.random() < 0.2:
            wrong = [
                '§<invoke name="lost">§<lost>1',
                "junk",
                "§<b>",
                '§<invoke name="lost">§</a>oh§</invoke>',
            ]
            invokes.append(self.rng.choice(wrong))
            self.said("\n" + marked(invokes[-1]) + "\n")
            self.made.is_well_formed = False
        self.closed("§<tool_call>\n" + "\n".join(invokes) + "\n§</tool_call>")

    def bare_invoke(self) -> None:
        self.closed(self.invoke())

    def unclosed_block(self) -> None:
        whole = self.invoke() if self.rng.random() < 0.5 else ""
        rest = self.rng.choice(["", "\n", "§", '§<invoke name="l">§<a>1'])
        if rest.strip() or not whole:
            self.said(marked(("" if whole else "§<tool_call>\n") + rest))
        self.closed(f"§<tool_call>\n{whole}{rest}")
        self.made.is_well_formed = False

    def half_opener(self) -> None:
        half = NS + self.rng.choice(["", " ", "<", "<tool_cal", "\n<inv", "</tool_c"])
        self.said(half)
        self.raw(half)
        self.made.is_well_formed = False


def read(pieces: list[str], in_reasoning: bool = False, tools: Any = None) -> tuple[Reply, list[Event]]:
    parser, reply = ReplyParser(tools, in_reasoning), Reply()
    events = [event for piece in pieces for event in parser.feed(piece)]
    events += parser.finish()
    for event in events:
        reply.add(event)
    return reply, events


def read_block(text: str, tools: Any = None) -> Reply:
    """What is between the markers of calls."""
    reply, _ = read([NS + "<tool_call>" + text], tools=tools)
    reply.content = reply.content.removeprefix(NS + "<tool_call>")
    return reply
