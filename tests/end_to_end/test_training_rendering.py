"""What the hosts train on is what their servers send to the model for the same conversation."""

import copy
import json
import random
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from mlx_lm import server
from mlx_lm.tokenizer_utils import load
from mlx_lm.tuner.datasets import ChatDataset

from tests.end_to_end import scripted_model
from tests.end_to_end.chat_hosts import Host, mlx_lm_host, mlx_vlm_host

PROPERTIES = {name: {} for name in "abc"}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f"Does {name}.",
            "parameters": {"type": "object", "properties": PROPERTIES},
        },
    }
    for name in ("find", "add")
]
TEXTS = ("Go.", "  two\n\nlines ", "", "Ünï ☃ 漢", "</think> & <b>", '{"a": 1}', "Is 1 < 2?")
# mlx-vlm's server counts an empty system message as none, and refuses a request with nothing but blanks.
NOT_EMPTY = tuple(text for text in TEXTS if text)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scripted_model.write_scripted_model(tmp_path_factory.mktemp("scripted") / "m3")


def value(rng: random.Random, depth: int = 0) -> Any:
    kinds: list[Callable[[], Any]] = [
        lambda: rng.choice(TEXTS),
        lambda: rng.randrange(-9, 999),
        lambda: rng.random(),
        lambda: rng.choice([True, False, None]),
    ]
    if depth < 2:
        kinds.append(lambda: [value(rng, depth + 1) for _ in range(rng.randrange(3))])
        kinds.append(lambda: {name: value(rng, depth + 1) for name in rng.sample("abc", rng.randrange(3))})
    return rng.choice(kinds)()


def said(rng: random.Random, content: str) -> dict[str, Any]:
    message = {"role": "assistant", "content": content}
    if rng.random() < 0.6:
        message[rng.choice(["reasoning", "reasoning_content"])] = rng.choice(TEXTS)
    return message


def conversation(rng: random.Random) -> dict[str, Any]:
    """Of the OpenAI form; the last message is the assistant's."""
    messages: list[Any] = []
    if rng.random() < 0.5:
        messages.append({"role": "system", "content": rng.choice(NOT_EMPTY)})
    with_tools = rng.random() < 0.7
    for turn in range(rng.randrange(1, 4)):
        messages.append({"role": "user", "content": rng.choice(TEXTS if turn else NOT_EMPTY)})
        for number in range(rng.randrange(3) if with_tools else 0):
            arguments = [{name: value(rng) for name in rng.sample("abc", rng.randrange(4))} for _ in range(2)]
            calls = [
                {
                    "type": "function",
                    "id": f"call-{number}-{n}",
                    "function": {"name": rng.choice(["find", "add"]), "arguments": json.dumps(of_one)},
                }
                for n, of_one in enumerate(arguments[: rng.randrange(1, 3)])
            ]
            messages.append(said(rng, rng.choice(["", "Let me see."])) | {"tool_calls": calls})
            messages += [
                {"role": "tool", "tool_call_id": call["id"], "content": rng.choice(TEXTS)} for call in calls
            ]
        messages.append(said(rng, rng.choice(TEXTS)))
    return {"messages": messages} | ({"tools": TOOLS} if with_tools else {})


def ask(host: Host, row: dict[str, Any], messages: list[Any]) -> None:
    host.post("/v1/chat/completions", {**row, "messages": messages, "max_tokens": 1})


@pytest.fixture(scope="module")
def prompts_of_mlx_lm(model: Path) -> Iterator[tuple[Host, list[list[int]]]]:
    prompts: list[list[int]] = []
    with pytest.MonkeyPatch.context() as patch, mlx_lm_host(model, patch) as host:
        given = server.stream_generate

        def recorded(model: Any, tokenizer: Any, prompt: Any, **options: Any) -> Any:
            prompts.append(list(prompt))
            return given(model, tokenizer, prompt, **options)

        patch.setattr(server, "stream_generate", recorded)
        yield host, prompts


def check(
    host: Host,
    prompts: list[list[int]],
    rendered: Callable[[dict[str, Any]], Any],
    rows: list[dict[str, Any]],
) -> None:
    for row in rows:
        tokens, offset = rendered(copy.deepcopy(row))
        *before, last = row["messages"]
        ask(host, row, before)
        assert tokens[:offset] == prompts[-1], row
        # The answer itself is what a later request sends as history.
        ask(host, row, [*before, last, {"role": "user", "content": "And now?"}])
        assert tokens == prompts[-1][: len(tokens)], row
        assert offset < len(tokens)


@pytest.fixture
def rows(fresh_seed: int, count: Callable[[int, int], int]) -> list[dict[str, Any]]:
    rng = random.Random(fresh_seed)
    return [conversation(rng) for _ in range(count(8, 500))]


def test_mlx_lm(model: Path, prompts_of_mlx_lm: Any, rows: list[dict[str, Any]]) -> None:
    dataset = ChatDataset([], load(model), mask_prompt=True)
    check(*prompts_of_mlx_lm, dataset.process, rows)


@pytest.mark.skipif(find_spec("mlx_vlm.train") is None, reason="mlx-vlm trains from local files from 0.7 on")
def test_mlx_vlm(model: Path, rows: list[dict[str, Any]]) -> None:
    import numpy as np
    from mlx_vlm.trainer.vlm.sft.dataset import VisionDataset
    from mlx_vlm.utils import load as load_vlm

    _, processor = load_vlm(str(model))
    config = json.loads((model / "config.json").read_text())
    dataset = VisionDataset([], config, processor, {"train_on_completions": True})

    def rendered(row: dict[str, Any]) -> tuple[list[int], int]:
        inputs = dataset.process(row)
        said = np.array(inputs["completion_mask"]).reshape(-1)
        return np.array(inputs["input_ids"]).reshape(-1).tolist(), int(said.argmax())

    class Prompts(list[list[int]]):
        def __getitem__(self, index: Any) -> Any:
            text = host.prompts[index]
            return processor.tokenizer.encode(text, add_special_tokens=False)

    with pytest.MonkeyPatch.context() as patch, mlx_vlm_host(model, patch) as host:
        check(host, Prompts(), rendered, rows)
