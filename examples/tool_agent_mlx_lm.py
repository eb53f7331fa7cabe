"""An agent with two tools, on a stock mlx_lm.server that runs MiniMax-M3.

    pip install mlx-m3-plugin openai
    mlx_lm.server --model path/to/MiniMax-M3-mlx --port 8080
    python examples/tool_agent_mlx_lm.py "What takes more space here: the tests or the documentation?"

The server answers as it does for any model: the reasoning in ``reasoning``, calls in ``tool_calls``.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from openai import OpenAI

MOST_ROUNDS = 20


def list_directory(path: str) -> list[dict[str, Any]]:
    return [{"name": p.name, "directory": p.is_dir()} for p in sorted(Path(path).iterdir())]


def total_size(paths: list[str]) -> dict[str, int]:
    def size(path: Path) -> int:
        files = path.rglob("*") if path.is_dir() else [path]
        return sum(file.stat().st_size for file in files if file.is_file())

    return {path: size(Path(path)) for path in paths}


def tool(name: str, description: str, **properties: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return {
        "type": "function",
        "function": {"name": name, "description": description, "parameters": parameters},
    }


FUNCTIONS = {"list_directory": list_directory, "total_size": total_size}
TOOLS = [
    tool("list_directory", "What a directory holds.", path={"type": "string"}),
    tool("total_size", "Bytes in each path.", paths={"type": "array", "items": {"type": "string"}}),
]


def result_of(name: str, arguments: str) -> str:
    """What goes back to the model, which can correct its own mistakes."""
    try:
        return json.dumps(FUNCTIONS[name](**json.loads(arguments)))
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def main(question: str) -> None:
    server = os.environ.get("M3_SERVER", "http://localhost:8080/v1")
    client = OpenAI(base_url=server, api_key="not needed")
    messages: list[Any] = [{"role": "user", "content": question}]
    for _ in range(MOST_ROUNDS):
        reply = client.chat.completions.create(
            model="default_model",
            messages=messages,
            tools=TOOLS,  # type: ignore[arg-type]
            max_tokens=8192,
            # "adaptive" lets the model decide, "disabled" answers at once.
            extra_body={"chat_template_kwargs": {"thinking_mode": "enabled"}},
        )
        message = reply.choices[0].message
        # With its reasoning, which M3 wants to see again.  The server has it all in its prompt cache.
        messages.append(message.model_dump(exclude_none=True))
        if not message.tool_calls:
            print(message.content)
            return
        for call in message.tool_calls:
            result = result_of(call.function.name, call.function.arguments)
            print(f"{call.function.name}({call.function.arguments}) -> {result[:100]}", file=sys.stderr)
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
    sys.exit(f"no answer after {MOST_ROUNDS} rounds of tools")


if __name__ == "__main__":
    main(" ".join(sys.argv[1:]) or "What is in this directory?")
