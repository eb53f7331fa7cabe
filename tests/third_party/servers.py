"""Third-party servers in environments of their own, with the plugin and without.

    python -m tests.third_party.servers [HOST ...]

For each host it makes an environment in ``.envs/hosts``, starts the host's server on M3-nano twice, asks it
what ``QUESTIONS`` names, and prints a row of a table for each.  Environments are removed afterwards unless
``--keep`` is given.  Texts are compared with mlx-lm's own, with the plugin.

oMLX is on no registry: it is measured where ``.envs/hosts/omlx``, a link to an environment of its own, has
it, mlx-m3-plugin and the versions that its pyproject.toml pins.
"""

import argparse
import base64
import contextlib
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
import venv
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(CHECKOUT / "examples" / "nano"))

import needles  # noqa: E402
import tools  # noqa: E402
from sizes import BUDGET  # noqa: E402

ENVIRONMENTS = CHECKOUT / ".envs" / "hosts"
MLX_LM = "0.31.3"
# What the hosts need beside the libraries; they would bring torch themselves, which M3 does not need.
COMMON = (
    "fastapi uvicorn psutil pyyaml requests tabulate jsonschema referencing mcp rich pillow openai httpx "
    "python-multipart starlette prometheus-client tiktoken safetensors openai-harmony llguidance "
    "opencv-python-headless"
).split()
PARSERS = "--reasoning-parser minimax_m3 --tool-call-parser minimax_m3 --enable-auto-tool-choice"


@dataclass(frozen=True)
class Host:
    """One server.

    Attributes:
        requirement: of the host itself, installed without what it depends on.
        mlx_vlm: the release that it takes.
        needs: more packages.  alone: more packages, without what they depend on.
        serve: its command; ``MODEL``, ``PARENT`` (the directory that has the model) and ``PORT`` stand for
            those.
        parsers: options that name M3's parsers, which are there with the plugin alone.
        sees: takes images.
        settings: files that it reads in its home, and their texts.
        is_on_registry: its environment can be made here.
    """

    requirement: str
    mlx_vlm: str
    serve: str
    needs: str = ""
    alone: str = ""
    transformers: str = "transformers"
    parsers: str = ""
    sees: bool = False
    settings: tuple[tuple[str, str], ...] = ()
    is_on_registry: bool = True


HOSTS = {
    "rapid-mlx": Host(
        "rapid-mlx==0.16.10",
        "0.7.2",
        "rapid-mlx serve MODEL --port PORT",
        "argcomplete certifi pypdf tomli-w websockets",
        transformers="transformers<5.16",
        parsers=PARSERS,
        sees=True,
    ),
    "vllm-mlx": Host(
        "vllm-mlx==0.6.0",
        "0.7.10",
        "vllm-mlx serve MODEL --continuous-batching --port PORT",
        "lm-format-enforcer interegular pytz",
        parsers=PARSERS,
        sees=True,
    ),
    "mlx-openai-server": Host(
        "mlx-openai-server==1.6.3",
        "0.4.4",
        "mlx-openai-server launch --model-path MODEL --model-type lm --port PORT",
        # Its click is too old for newer releases of huggingface-hub.
        "aiofiles aiohttp json_repair<0.60 loguru outlines<1.2 av librosa click<8.4 huggingface-hub<1.19 "
        "dill datasets",
        alone="mlx-embeddings mlx-whisper",
        parsers=PARSERS,
    ),
    "vmlx": Host(
        "vmlx==1.6.81",
        "0.7.10",
        "vmlx serve MODEL --port PORT",
        "einops",
        alone="jang dflash-mlx==0.1.8",
        transformers="transformers>=5.18",
    ),
}
HOSTS["rapid-mlx --no-mllm"] = replace(
    HOSTS["rapid-mlx"], serve="rapid-mlx serve MODEL --no-mllm --port PORT", sees=False
)
HOSTS["omlx"] = Host(
    "omlx", "0.6.3", "omlx serve --model-dir PARENT --port PORT", sees=True, is_on_registry=False
)
_TEXT_ENGINE = {"version": 1, "models": {"m3-nano": {"model_type_override": "llm"}}}
HOSTS["omlx, text engine"] = replace(
    HOSTS["omlx"], sees=False, settings=((".omlx/model_settings.json", json.dumps(_TEXT_ENGINE)),)
)
ON_REGISTRY = [name for name, host in HOSTS.items() if host.is_on_registry]


# --- environments ---


def environment_of(host: Host) -> Path:
    directory = ENVIRONMENTS / host.requirement.partition("==")[0]
    if (directory / ".ready").exists():
        return directory
    if not host.is_on_registry:
        raise SystemExit(f"{directory} is missing; make it, and an empty file .ready in it")
    venv.create(directory, with_pip=True, clear=True)
    mlx = "mlx" if sys.platform == "darwin" else "mlx[cpu]"
    pip(directory, mlx, f"mlx-lm=={MLX_LM}", host.transformers, *COMMON, *host.needs.split())
    pip(directory, "--no-deps", f"mlx-vlm=={host.mlx_vlm}", host.requirement, *host.alone.split())
    pip(directory, "--no-deps", "-e", str(CHECKOUT))
    (directory / ".ready").touch()
    return directory


def pip(directory: Path, *arguments: str) -> None:
    command = [directory / "bin" / "python", "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    subprocess.run([*command, *arguments], check=True)


# --- one server ---


@dataclass(frozen=True)
class Reply:
    content: str
    reasoning: str
    calls: tuple[tuple[str, Any], ...]

    @property
    def text(self) -> str:
        return plain(self.reasoning + self.content)


@dataclass(frozen=True)
class Client:
    address: str
    model: str

    def ask(self, prompt: Any, mode: str = "adaptive", stream: bool = False, **more: Any) -> Reply:
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0,
            "max_tokens": 60,
            "stream": stream,
            "chat_template_kwargs": {"thinking_mode": mode},
            **more,
        }
        request = urllib.request.Request(
            f"{self.address}/v1/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json", "Authorization": "Bearer none"},
        )
        with urllib.request.urlopen(request, timeout=300) as answer:
            if not stream:
                return _reply([json.load(answer)["choices"][0]["message"]])
            events = [line[6:] for line in answer.read().decode().splitlines() if line.startswith("data: ")]
        read = [json.loads(event) for event in events if event != "[DONE]"]
        return _reply([choice["delta"] for event in read for choice in event.get("choices") or ()])


def _reply(parts: list[Mapping[str, Any]]) -> Reply:
    """A message, or the deltas of one."""
    calls: dict[Any, list[str]] = {}
    for part in parts:
        for number, call in enumerate(part.get("tool_calls") or ()):
            name_and_arguments = calls.setdefault(call.get("index", number), ["", ""])
            name_and_arguments[0] += call["function"].get("name") or ""
            name_and_arguments[1] += call["function"].get("arguments") or ""
    reasoning = "".join(part.get("reasoning_content") or part.get("reasoning") or "" for part in parts)
    content = "".join(part.get("content") or "" for part in parts)
    read = [(name, json.loads(arguments)) for name, arguments in calls.values()]
    return Reply(content.strip(), reasoning.strip(), tuple(read))


@contextlib.contextmanager
def served(
    directory: Path, host: Host, model: Path, log: Path, with_plugin: bool, cache: Path
) -> Iterator[Client]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    given = {"MODEL": str(model), "PARENT": str(model.parent), "PORT": str(port)}
    words = [given.get(word, word) for word in host.serve.split()]
    command = [str(directory / "bin" / words[0]), *words[1:], *(host.parsers.split() if with_plugin else ())]
    switched = {} if with_plugin else {"MLX_M3_PLUGIN": "off"}
    # Caches on disk are the host's own, and empty.
    home = {"HOME": str(cache), "HF_HUB_OFFLINE": "1"}
    for name, text in host.settings:
        (cache / name).parent.mkdir(parents=True, exist_ok=True)
        (cache / name).write_text(text)
    with log.open("w") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, **home, **switched}
        )
    address = f"http://127.0.0.1:{port}"
    try:
        yield Client(address, _model_name(address, process, log))
    finally:
        process.terminate()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class NotServedError(Exception):
    """The server ends, or does not answer."""


def _model_name(address: str, process: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + 240
    while process.poll() is None and time.monotonic() < deadline:
        with (
            contextlib.suppress(OSError, ValueError, LookupError),
            urllib.request.urlopen(f"{address}/v1/models", timeout=5) as answer,
        ):
            return str(json.load(answer)["data"][0]["id"])
        time.sleep(0.5)
    raise NotServedError(log.read_text()[-2000:])


# --- what is asked ---

WEATHER = next(tool for tool in tools.TOOLS if tool.name == "get_weather")
TOOLS: dict[str, Any] = {"tools": [WEATHER.schema()]}
CALL = (("get_weather", {"city": "Cairo", "days": 3}),)
ASKED_FOR_A_CALL = "How will the weather be in Cairo for 3 days?"
SUM = "What is 68 - 25?"


def prompts(model: Path) -> list[str]:
    """Needles in texts of one to eight budgets."""
    count, rng = needles.token_counter(model), random.Random(35)
    drawn = [needles.draw(rng, factor * BUDGET, count)[0] for factor in (1, 2, 3, 4, 5, 6, 7, 8)]
    return [case.messages[0]["content"] for case in drawn]


def is_exact(client: Client, expected: Mapping[str, str]) -> bool:
    return all(client.ask(prompt).text == text for prompt, text in expected.items())


def four_at_once(client: Client, expected: Mapping[str, str]) -> bool:
    asked = list(expected)[::2]
    with ThreadPoolExecutor(4) as pool:
        return [reply.text for reply in pool.map(client.ask, asked)] == [expected[p] for p in asked]


def shared_prefix(client: Client, expected: Mapping[str, str]) -> bool:
    """The same text with another question, cold and after the first one; ``expected`` has both."""
    return all(client.ask(prompt).text == expected[prompt] for prompt in expected for _ in range(2))


def calls(client: Client, stream: bool) -> bool:
    reply = client.ask(ASKED_FOR_A_CALL, stream=stream, **TOOLS)
    return (reply.calls, reply.content) == (CALL, "")


def reasons(client: Client, stream: bool) -> bool:
    """In each mode; without reasoning nano is bad at sums."""
    thinking, adaptive, direct = (client.ask(SUM, m, stream) for m in ("enabled", "adaptive", "disabled"))
    reasoned = [(reply.content, reply.reasoning) for reply in (thinking, adaptive)]
    return reasoned == [("43", "8 - 5 = 3, 6 - 2 = 4")] * 2 and (direct.content != "") > bool(
        direct.reasoning
    )


Question = Callable[[Client, Mapping[str, str], Mapping[str, str]], bool]
QUESTIONS: dict[str, Question] = {
    "exact": lambda client, texts, shared: is_exact(client, texts),
    "four at once": lambda client, texts, shared: four_at_once(client, texts),
    "shared prefix": lambda client, texts, shared: shared_prefix(client, shared),
    "calls": lambda client, texts, shared: calls(client, False),
    "calls, streamed": lambda client, texts, shared: calls(client, True),
    "reasoning": lambda client, texts, shared: reasons(client, False),
    "reasoning, streamed": lambda client, texts, shared: reasons(client, True),
}


def image_of(model: Path) -> Question:
    """Its picture, as ``mlx-m3 demo`` shows it: asked whole and streamed."""
    encoded = base64.b64encode((model / "picture.png").read_bytes()).decode()
    content = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded}"}},
        {"type": "text", "text": "What is in the picture?"},
    ]
    texts = {"A red circle and a blue square."}
    return lambda client, *given: (
        {client.ask(content, stream=stream).text for stream in (False, True)} == texts
    )


def sharing(model: Path) -> list[str]:
    """Prompts that part after a long text: at its end, and in the midst of a block."""
    text = prompts(model)[3]
    story, _, question = text.rpartition("What is the code")
    other = prompts(model)[4].rpartition("What is the code")[2]
    return [text, f"{story}What is the code{other}", f"{text[: len(story) // 2]} What is the code{question}"]


_REFERENCE = """
import json, sys
from mlx_lm import generate, load
model, tokenizer = load(sys.argv[1])
texts = {}
for prompt in json.load(sys.stdin):
    tokens = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True)
    texts[prompt] = generate(model, tokenizer, tokens, max_tokens=60)
print(json.dumps(texts))
"""


def reference(python: Path, model: Path, asked: list[str]) -> dict[str, str]:
    """mlx-lm's texts, with the plugin."""
    command = [str(python), "-c", _REFERENCE, str(model)]
    done = subprocess.run(command, input=json.dumps(asked), capture_output=True, text=True, check=True)
    texts = json.loads(done.stdout.splitlines()[-1])
    return {prompt: plain(text) for prompt, text in texts.items()}


def plain(text: str) -> str:
    """Without markers, which hosts leave where they know no parser for them."""
    return text.replace("</mm:think>", "").replace("<mm:think>", "").strip()


def measure(name: str, model: Path, work: Path) -> Iterator[str]:
    """A row of the table with the plugin, and one without."""
    host = HOSTS[name]
    directory = environment_of(host)
    python = directory / "bin" / "python"
    texts, shared = (reference(python, model, asked) for asked in (prompts(model), sharing(model)))
    for with_plugin in (True, False):
        switch = "with" if with_plugin else "without"
        cells = [f"{name} ({host.requirement}) {switch}"]
        where = work / f"{name.replace(' ', '')}-{switch}"
        where.mkdir(parents=True)
        try:
            with served(directory, host, model, where / "log", with_plugin, where) as client:
                cells += ["yes", *(_cell(ask, client, texts, shared) for ask in QUESTIONS.values())]
                cells.append(_cell(image_of(model), client, texts, shared) if host.sees else "–")
        except NotServedError as error:
            cells += ["no", str(error).strip().splitlines()[-1][:100]]
        yield f"| {' | '.join(cells)} |"


def _cell(ask: Question, client: Client, texts: Mapping[str, str], shared: Mapping[str, str]) -> str:
    try:
        return "yes" if ask(client, texts, shared) else "**no**"
    except (OSError, ValueError, LookupError) as error:
        return f"**{type(error).__name__}: {error}**"


def write_nano(directory: Path) -> None:
    command = [sys.executable, "-m", "mlx_m3_plugin", "demo", str(directory)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("hosts", nargs="*", default=ON_REGISTRY, choices=[*HOSTS, []], metavar="HOST")
    parser.add_argument("--keep", action="store_true", help="leave the environments there")
    parser.add_argument("--work", type=Path, default=ENVIRONMENTS / "runs")
    args = parser.parse_args()
    shutil.rmtree(args.work, ignore_errors=True)
    model = args.work / "nano" / "m3-nano"
    write_nano(model)
    print(f"| host | loads | {' | '.join(QUESTIONS)} | image |\n|{'---|' * (len(QUESTIONS) + 3)}")
    for name in args.hosts:
        for row in measure(name, model, args.work):
            print(row, flush=True)
    if not args.keep:
        shutil.rmtree(ENVIRONMENTS)


if __name__ == "__main__":
    main()
