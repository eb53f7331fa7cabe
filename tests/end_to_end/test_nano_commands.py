"""M3-nano through stock commands and servers: what it says has a meaning, and is right."""

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from needles import draw
from sizes import BUDGET
from tools import NO_TOOL, TOOLS

from tests.end_to_end.chat_server import ChatServer, serving
from tests.end_to_end.environments import Environment

WORLD = "Anna lives in Rome. The nurse is Ben. Ben likes rice. The dog belongs to Anna."
OFFERED = [tool.schema() for tool in TOOLS if tool.name in ("get_weather", "send_mail", "book_room")]


@pytest.fixture(scope="module")
def model(guest: Environment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("nano") / "m3"
    guest.run_script("mlx-m3", "demo", directory)
    return directory


@pytest.fixture(scope="module", params=["mlx_lm.server", "mlx_vlm.server"])
def server(
    request: pytest.FixtureRequest, guest: Environment, model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ChatServer]:
    with serving(guest, request.param, model, tmp_path_factory.mktemp("log") / "log") as running:
        yield running


def generate(guest: Environment, model: Path, prompt: str) -> str:
    options = ("--max-tokens", "60", "--temp", "0", "--verbose", "False", "--prompt", prompt)
    return guest.run_script("mlx_lm.generate", "--model", model, *options).stdout.strip()


@pytest.mark.parametrize(
    ("question", "answer"),
    [("Whose is the dog?", "The dog belongs to Anna."), ("Where does Anna live?", "Anna lives in Rome.")],
)
def test_generate_knows_what_the_prompt_says(
    guest: Environment, model: Path, question: str, answer: str
) -> None:
    assert generate(guest, model, f"{WORLD} {question}") == f"</mm:think>{answer}"


def test_reasoning_is_apart(server: ChatServer) -> None:
    answer = server.ask("What is 68 - 25?")
    assert answer.reasoning.strip() == "8 - 5 = 3, 6 - 2 = 4"
    assert answer.content.strip() == "43"


def test_calls_with_nested_arguments(server: ChatServer) -> None:
    asked = server.ask("Book a room for 4 people on Friday at 15.", tools=OFFERED)
    assert asked.reasoning.strip() == 'It takes "book_room", which is there.'
    assert asked.calls == [("book_room", {"people": 4, "when": {"day": "Friday", "hour": 15}})]
    asked = server.ask("Send a mail to Anna and Ben about lunch.", tools=OFFERED)
    assert asked.calls == [("send_mail", {"to": ["Anna", "Ben"], "subject": "lunch"})]


def test_no_call_where_no_tool_fits(server: ChatServer) -> None:
    asked = server.ask("Change 50 euro into yen.", tools=OFFERED)
    assert asked.reasoning.strip() == 'It takes "change_money" and that is not there.'
    assert asked.content.strip() == NO_TOOL
    assert not asked.calls


def test_the_answer_from_a_result(server: ChatServer) -> None:
    request = {"role": "user", "content": "How will the weather be in Cairo for 3 days?"}
    asked = server.ask([request], tools=OFFERED)
    assert asked.calls == [("get_weather", {"city": "Cairo", "days": 3})]
    call_id = asked.message["tool_calls"][0]["id"]
    result = {"role": "tool", "tool_call_id": call_id, "content": json.dumps({"sky": "sunny"})}
    answer = server.ask([request, asked.message, result], tools=OFFERED)
    assert answer.content.strip() == "It will be sunny in Cairo."
    assert not answer.calls


def test_a_needle_far_past_the_budget(server: ChatServer) -> None:
    (case,) = draw(random.Random(2), 8 * BUDGET, lambda text: len(text.split()))
    answer = server.ask(case.messages)
    assert answer.prompt > 8 * BUDGET
    assert answer.content.strip() == case.reply["content"]


def test_it_names_what_is_in_the_picture(guest: Environment, model: Path) -> None:
    options = ("--max-tokens", "40", "--temperature", "0", "--image", model / "picture.png")
    told = guest.run_script(
        "mlx_vlm.generate", "--model", model, *options, "--prompt", "What is in the picture?"
    )
    assert "A red circle and a blue square." in told.stdout
