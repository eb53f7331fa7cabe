"""M3-nano through stock commands: a question, a tool call, a needle, a picture; and the needle without us.

    pip install -e ".[cpu,vlm]" openai      # on a Mac without cpu
    python examples/demo.py [DIR]

``make demo`` does both.  Every command is printed before it is run; nothing here imports the plugin.
"""

import json
import os
import random
import shlex
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from openai import OpenAI

sys.path.insert(0, str(Path(__file__).with_name("nano")))

import needles
import tools
from sizes import BUDGET

SCRIPTS = Path(sys.executable).parent
TIMES = 8
OFFERED = ("get_weather", "send_mail", "book_room")


def main(directory: Path) -> None:
    if not directory.exists():
        run("mlx-m3", "demo", str(directory))
    model = str(directory)
    heading("A question about what the prompt says")
    question = (
        "Anna lives in Rome. The nurse is Ben. Ben likes rice. The dog belongs to Anna. Whose is the dog?"
    )
    show(run("mlx_lm.generate", "--model", model, *SHORT, "--prompt", question))
    heading("Reasoning apart from the answer, a tool call, and none where no tool fits, from mlx_lm.server")
    with server(model) as address:
        client = OpenAI(base_url=address, api_key="not needed")
        ask(client, "What is 68 - 25?")
        offered = [tool.schema() for tool in tools.TOOLS if tool.name in OFFERED]
        call_a_tool(client, "How will the weather be in Cairo for 3 days?", offered)
        ask(client, "Change 50 euro into yen.", tools=offered)
    heading("What is in the picture?")
    picture = ("--image", str(directory / "picture.png"), "--prompt", "What is in the picture?")
    show(run("mlx_vlm.generate", "--model", model, *VLM, *picture))
    heading("The same answer in fewer forward passes, with M3-nano's draft head")
    # Without --no-verbose, for what it counts.
    drafts = ("--draft-model", str(directory / "dspark"), "--draft-block-size", "8", *VLM[:-1], *picture)
    printed = run("mlx_vlm.generate", "--model", model, *drafts).splitlines()
    show(next(line for line in printed if line.startswith("Speculative decoding")))
    heading(f"A needle in {TIMES} times the {BUDGET} tokens that a query may attend to")
    case = needle(directory)
    prompt = case.messages[0]["content"]
    print("   (stock mlx-vlm loses some of such needles, see docs/nano/recall.md; this is one of them)")
    print(f"   ... {prompt[-160:]}\n   right: {case.reply['content']}")
    command = ("mlx_vlm.generate", "--model", model, *VLM, "--prompt", prompt)
    show(run(*command), "   with the plugin:")
    show(run(*command, environment={"MLX_M3_PLUGIN": "off"}), "   stock mlx-vlm:  ")


SHORT = ("--max-tokens", "60", "--temp", "0", "--verbose", "False")
VLM = ("--max-tokens", "60", "--temperature", "0", "--no-verbose")


def heading(text: str) -> None:
    print(f"\n=== {text}", flush=True)


def show(text: str, before: str = "  ") -> None:
    print(before, text.strip() or "(nothing)", flush=True)


def run(script: str, *arguments: str, environment: dict[str, str] | None = None) -> str:
    """What a stock command prints."""
    told = shlex.join([script, *(a if len(a) < 120 else "..." for a in arguments)])
    print("$", *(f"{name}={value}" for name, value in (environment or {}).items()), told, flush=True)
    command = [str(SCRIPTS / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | (environment or {}))
    if done.returncode:
        raise SystemExit(f"{script} failed:\n{done.stdout}\n{done.stderr}")
    return done.stdout


@contextmanager
def server(model: str) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = ["mlx_lm.server", "--model", model, "--port", str(port)]
    print("$", shlex.join(command), "&", flush=True)
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([str(SCRIPTS / command[0]), *command[1:]], **quiet)
    try:
        while not answers(f"http://127.0.0.1:{port}/health"):
            if process.poll() is not None:
                raise SystemExit(
                    f"the server ended with {process.returncode}; run the command above to see why"
                )
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(timeout=30)


def answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=5).close()
    except (urllib.error.URLError, OSError):
        return False
    return True


def ask(client: OpenAI, question: str, **more: Any) -> Any:
    messages = [{"role": "user", "content": question}]
    print(f"   user:      {question}")
    return complete(client, messages, **more)


def complete(client: OpenAI, messages: list[Any], **more: Any) -> Any:
    reply = client.chat.completions.create(
        model="default_model", messages=messages, temperature=0, max_tokens=120, **more
    )
    message = reply.choices[0].message
    if getattr(message, "reasoning", None):
        print(f"   reasoning: {message.reasoning}")
    if message.content:
        print(f"   content:   {message.content}", flush=True)
    return message


def call_a_tool(client: OpenAI, request: str, offered: list[Any]) -> None:
    said = ask(client, request, tools=offered)
    for call in said.tool_calls or []:
        print(f"   calls:     {call.function.name} {call.function.arguments}")
        result = json.dumps({"sky": "sunny"})
        print(f"   result:    {result}")
        messages = [{"role": "user", "content": request}, said.model_dump(exclude_none=True)]
        messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
        complete(client, messages, tools=offered)


def needle(directory: Path) -> Any:
    (case,) = needles.draw(random.Random(35), TIMES * BUDGET, needles.token_counter(directory))
    return case


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "m3-nano"))
