"""Three tools: call the one that fits, with nested values; answer from a result; or say that none fits."""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from case import Case, says, user
from facts import NAMES, THINGS

DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
SUBJECTS = "lunch music sports news money travel health homework".split()
SKIES = "sunny cloudy rainy windy snowy foggy".split()
NO_TOOL = "None of these tools can do that."

Arguments = dict[str, Any]


@dataclass(frozen=True)
class Tool:
    """``ask`` draws a request and the arguments that it means; ``answer`` a result, and what to say of it."""

    name: str
    parameters: dict[str, Any]
    ask: Callable[[random.Random], tuple[str, Arguments]]
    answer: Callable[[random.Random, Arguments], tuple[Any, str]]

    def schema(self) -> dict[str, Any]:
        parameters = {"type": "object", "properties": self.parameters, "required": list(self.parameters)}
        return {"type": "function", "function": {"name": self.name, "parameters": parameters}}


STRING, INTEGER = {"type": "string"}, {"type": "integer"}
STRINGS = {"type": "array", "items": STRING}
TIME = {"type": "object", "properties": {"day": STRING, "hour": INTEGER}}


def _ask_weather(rng: random.Random) -> tuple[str, Arguments]:
    city, days = rng.choice(THINGS["place"]), rng.randrange(1, 10)
    return f"How will the weather be in {city} for {days} days?", {"city": city, "days": days}


def _answer_weather(rng: random.Random, arguments: Arguments) -> tuple[Any, str]:
    sky = rng.choice(SKIES)
    return {"sky": sky}, f"It will be {sky} in {arguments['city']}."


def _ask_mail(rng: random.Random) -> tuple[str, Arguments]:
    to, subject = rng.sample(NAMES, rng.randrange(1, 4)), rng.choice(SUBJECTS)
    return f"Send a mail to {_listed(to)} about {subject}.", {"to": to, "subject": subject}


def _answer_mail(rng: random.Random, arguments: Arguments) -> tuple[Any, str]:
    number = rng.randrange(10, 100)
    return {"number": number}, f"The mail about {arguments['subject']} has the number {number}."


def _ask_room(rng: random.Random) -> tuple[str, Arguments]:
    day, hour, people = rng.choice(DAYS), rng.randrange(8, 20), rng.randrange(2, 10)
    return (
        f"Book a room for {people} people on {day} at {hour}.",
        {"people": people, "when": {"day": day, "hour": hour}},
    )


def _answer_room(rng: random.Random, arguments: Arguments) -> tuple[Any, str]:
    number, day = rng.randrange(10, 100), arguments["when"]["day"]
    return {"room": number, "day": day}, f"You have room {number} on {day}."


def _ask_task(rng: random.Random) -> tuple[str, Arguments]:
    title, tags, day = rng.choice(SUBJECTS), rng.sample(THINGS["work"], rng.randrange(1, 3)), rng.choice(DAYS)
    return (
        f"Add the task {title} for the {_listed(tags)}, due {day}.",
        {"task": {"title": title, "tags": tags}, "due": day},
    )


def _answer_task(rng: random.Random, arguments: Arguments) -> tuple[Any, str]:
    title, count = arguments["task"]["title"], rng.randrange(2, 10)
    return {"title": title, "tasks": count}, f"The task {title} is one of {count}."


def _ask_money(rng: random.Random) -> tuple[str, Arguments]:
    amount, (first, second) = rng.randrange(10, 100), rng.sample(["euro", "dollar", "yen", "pound"], 2)
    return f"Change {amount} {first} into {second}.", {"amount": amount, "from": first, "into": second}


def _answer_money(rng: random.Random, arguments: Arguments) -> tuple[Any, str]:
    amount = rng.randrange(10, 100)
    return {"amount": amount, "currency": arguments["into"]}, f"That is {amount} {arguments['into']}."


TOOLS = (
    Tool("get_weather", {"city": STRING, "days": INTEGER}, _ask_weather, _answer_weather),
    Tool("send_mail", {"to": STRINGS, "subject": STRING}, _ask_mail, _answer_mail),
    Tool("book_room", {"people": INTEGER, "when": TIME}, _ask_room, _answer_room),
    Tool(
        "add_task",
        {"task": {"type": "object", "properties": {"title": STRING, "tags": STRINGS}}, "due": STRING},
        _ask_task,
        _answer_task,
    ),
    Tool("change_money", {"amount": INTEGER, "from": STRING, "into": STRING}, _ask_money, _answer_money),
)


def draw(rng: random.Random, questions: int = 1) -> list[Case]:
    """Requests with the same tools.  Three of eight are calls, three results; for two no tool fits."""
    offered = rng.sample(TOOLS, 3)
    return [_one(rng, offered) for _ in range(questions)]


def _one(rng: random.Random, offered: list[Tool]) -> Case:
    """The reasoning goes on, after the tool's name, as the schema does where there is one."""
    schemas = [tool.schema() for tool in offered]
    if rng.random() < 0.25:
        absent = rng.choice([tool for tool in TOOLS if tool not in offered])
        reply = says(NO_TOOL, reasoning_content=f'It takes "{absent.name}" and that is not there.')
        return Case("no call", [user(absent.ask(rng)[0])], reply, schemas)
    tool = rng.choice(offered)
    request, arguments = tool.ask(rng)
    call = says(
        "",
        reasoning_content=f'It takes "{tool.name}", which is there.',
        tool_calls=[{"type": "function", "function": {"name": tool.name, "arguments": arguments}}],
    )
    if rng.random() < 0.5:
        return Case("call", [user(request)], call, schemas)
    result, answer = tool.answer(rng, arguments)
    messages = [user(request), call, {"role": "tool", "content": json.dumps(result)}]
    return Case("result", messages, says(answer), schemas)


def _listed(names: list[str]) -> str:
    return " and ".join(names)
