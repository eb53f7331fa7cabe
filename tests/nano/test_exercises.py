"""M3-nano's exercises: what they ask can be answered from what they show, and the answer is right.

Each is solved here again, by means of its own, from the prompt alone.
"""

import random
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import conversations
import echo
import facts
import figures
import needles
import numpy as np
import pytest
import sums
import tools
from case import Case
from conversations import Encoder
from transformers import PreTrainedTokenizerFast

from mlx_m3_plugin.chat.prompt import CHAT_TEMPLATE
from tests.checkpoints.random_model import m3_tokenizer

# How each kind of fact is told, and what asks for it.
TOLD = (
    (r"(\w+) lives in \w+\.", r"Where does (\w+) live\?"),
    (r"(\w+) likes \w+\.", r"What does (\w+) like\?"),
    (r"The (\w+) belongs to \w+\.", r"Whose is the (\w+)\?"),
    (r"The (\w+) is \w+\.", r"Who is the (\w+)\?"),
)


def words(text: str) -> int:
    return len(text.split())


def content(case: Case) -> str:
    return case.messages[0]["content"]


def drawn(draw: Callable[..., list[Case]], seed: int, *more: Any) -> list[Case]:
    return [case for number in range(200) for case in draw(random.Random(f"{seed} {number}"), *more)]


@pytest.mark.parametrize("draw", [echo.draw, facts.draw, sums.draw, tools.draw, figures.draw])
def test_a_seed_is_enough(draw: Callable[..., list[Case]], fresh_seed: int) -> None:
    first, again = drawn(draw, fresh_seed), drawn(draw, fresh_seed)
    assert [(c.messages, c.reply, c.tools) for c in first] == [(c.messages, c.reply, c.tools) for c in again]
    assert len({str(c.messages) + str(c.reply) for c in first}) > 1


def test_what_is_to_be_said_again_is_in_the_prompt(fresh_seed: int) -> None:
    cases = drawn(echo.draw, fresh_seed, 1, 9)
    assert {words(case.reply["content"]) for case in cases} == set(range(1, 10))
    for case in cases:
        assert content(case) == f"Say this again: {case.reply['content']}"


def test_beginners_get_shorter_texts_and_more_to_copy(fresh_seed: int) -> None:
    rng = random.Random(fresh_seed)
    tasks, hay = {}, {}
    for difficulty in (0.0, 1.0):
        seen = [conversations.draw(rng, difficulty, words) for _ in range(1000)]
        tasks[difficulty] = sum(cases[0].task == "echo" for cases in seen)
        hay[difficulty] = max(words(content(cases[0])) for cases in seen if cases[0].task == "needles")
    assert tasks[0.0] > 3 * tasks[1.0] > 0
    assert hay[0.0] < 60
    assert 500 < hay[1.0] < 600


def test_facts_are_told_once(fresh_seed: int) -> None:
    for case in drawn(facts.draw, fresh_seed):
        (answer,) = solved_facts(content(case))
        assert case.reply["content"] == answer


def solved_facts(text: str) -> list[str]:
    """The sentences that answer what is asked."""
    return [
        sentence[0]
        for told, asked in TOLD
        for name in re.findall(asked, text)
        for sentence in re.finditer(told, text)
        if sentence[1] == name
    ]


@pytest.mark.parametrize("draw", [facts.draw, partial(needles.draw, tokens=40, count=words)])
def test_nothing_is_asked_for_twice(draw: Callable[..., list[Case]], fresh_seed: int) -> None:
    """What was answered before could be said again without a look at where it was told."""
    for number in range(200):
        cases = draw(random.Random(f"{fresh_seed} {number}"), questions=8)
        told = [sentence for case in cases for sentence in re.split(" and the |[.]", case.reply["content"])]
        told = [sentence.removeprefix("The ") for sentence in told if sentence]
        assert len(told) == len(set(told)) >= len(cases)


def test_sums_are_right_and_so_is_their_working(fresh_seed: int) -> None:
    for case in drawn(sums.draw, fresh_seed):
        first, sign, second = re.fullmatch(r"What is (\d+) ([+-]) (\d+)\?", content(case)).groups()
        assert int(case.reply["content"]) == added(first, sign, second) >= 0
        for step in case.reply["reasoning_content"].split(", "):
            *equation, result = re.fullmatch(r"(\d+) ([+-]) (\d+) = (\d+)", step).groups()
            assert added(*equation) == int(result), step


def added(first: str, sign: str, second: str) -> int:
    return int(first) + int(second) if sign == "+" else int(first) - int(second)


def test_a_call_takes_all_its_values_from_the_request(fresh_seed: int) -> None:
    seen = set()
    for case in drawn(tools.draw, fresh_seed):
        seen.add(case.task)
        offered = {tool["function"]["name"]: tool["function"]["parameters"] for tool in case.tools}
        assert len(offered) == 3
        if case.task == "no call":
            assert case.reply["content"] == tools.NO_TOOL
            (wanted,) = re.findall(
                'It takes "([a-z_]+)" and that is not there.', case.reply["reasoning_content"]
            )
            assert wanted not in offered
            continue
        said = case.reply if case.task == "call" else case.messages[1]
        (call,) = said["tool_calls"]
        name = call["function"]["name"]
        assert said["reasoning_content"] == f'It takes "{name}", which is there.'
        parameters = offered[name]
        assert set(call["function"]["arguments"]) == set(parameters["required"])
        for value in leaves(call["function"]["arguments"]):
            assert re.search(rf"\b{value}\b", content(case)), (value, content(case))
    assert seen == {"call", "no call", "result"}


def leaves(value: Any) -> list[Any]:
    if isinstance(value, (dict, list)):
        parts = value.values() if isinstance(value, dict) else value
        return [leaf for part in parts for leaf in leaves(part)]
    return [value]


@pytest.mark.parametrize("length", [40, 500])
def test_needles_are_in_a_prompt_of_the_length(length: int, fresh_seed: int) -> None:
    places = []
    for case in drawn(needles.draw, fresh_seed, length, words):
        text = content(case)
        assert length - 10 < words(text[: text.index("What is the code")]) < length + 10
        codes = dict(re.findall(r"The code of (\w+) is (\d+)\.", text))
        asked = re.search(r"What is the code of (.*)\?", text).group(1).split(" and ")
        answer = " and the ".join(f"code of {name} is {codes[name]}" for name in asked)
        assert case.reply["content"] == f"The {answer}."
        places.append(text.index(f"of {asked[0]} is") / len(text))
    assert min(places) < 0.2, "needles stand at the beginning, too"
    assert max(places) > 0.7
    assert 0.3 < np.mean(places) < 0.7


def test_pictures_show_what_is_said(fresh_seed: int) -> None:
    seen = set()
    for case in drawn(figures.draw, fresh_seed):
        if case.is_video:
            continue
        (picture,) = case.pictures
        names = re.findall(r"a (\w+) (\w+)", case.reply["content"].lower())
        assert picture.shape == (56, 56 * len(names), 3)
        for number, (colour, shape) in enumerate(names):
            cell = picture[:, 56 * number : 56 * (number + 1)]
            painted = (cell == figures.COLOURS[colour]).all(-1)
            other = ~painted & (cell != figures.BACKGROUND).any(-1)
            assert painted.any()
            assert not other.any()
            assert shape == shape_of(painted)
            seen.add((colour, shape))
    # Not every pair: of some 200 figures one in 24 may be missing.
    assert {colour for colour, _ in seen} == set(figures.COLOURS)
    assert {shape for _, shape in seen} == set(figures.SHAPES)


def shape_of(painted: np.ndarray) -> str:
    """By how much of its box it fills, and whether it is the same upside down."""
    rows, columns = painted.any(1).nonzero()[0], painted.any(0).nonzero()[0]
    box = painted[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    if box.mean() > 0.65:
        return "square" if box.all() else "circle"
    return "cross" if (box == box[::-1]).mean() > 0.95 else "triangle"


def test_videos_move_where_it_is_said(fresh_seed: int) -> None:
    for case in drawn(figures.draw, fresh_seed):
        if not case.is_video:
            continue
        middles = [
            np.argwhere((frame != figures.BACKGROUND).any(-1)).mean(0)
            for frame in (case.pictures[0], case.pictures[-1])
        ]
        down, right = middles[1] - middles[0]
        moved = ("down" if down > 0 else "up") if abs(down) > abs(right) else "right" if right > 0 else "left"
        (colour,) = {
            name
            for name, value in figures.COLOURS.items()
            if any((frame == value).all(-1).any() for frame in case.pictures)
        }
        assert case.reply["content"] == f"Something {colour} moves {moved}."


@pytest.mark.parametrize("draw", [facts.draw, sums.draw, tools.draw])
def test_all_that_the_model_says_is_learned_and_nothing_else(
    draw: Callable[..., list[Case]], fresh_seed: int
) -> None:
    wrapped = PreTrainedTokenizerFast(tokenizer_object=m3_tokenizer(), bos_token="]~!b[", eos_token="[e~[")
    wrapped.chat_template = CHAT_TEMPLATE
    encoder = Encoder(wrapped)
    for number in range(20):
        cases = draw(random.Random(f"{fresh_seed} {number}"), 3)
        encoded = encoder.encode(cases)
        learned = wrapped.decode(encoded.ids[encoded.said])
        turns = re.findall(r"\]~b\]ai\n(.*?\[e~\[)", encoder.text(cases), re.DOTALL)
        assert learned == "".join(turns)
        for case in cases:
            assert case.reply["content"] in learned
