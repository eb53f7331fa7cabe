"""An agent that sees and calls tools, on a stock mlx_vlm.server that runs MiniMax-M3.  It streams.

    pip install "mlx-m3-plugin[vlm]" openai
    mlx_vlm.server --model path/to/MiniMax-M3-mlx --port 8080
    export M3_MODEL=path/to/MiniMax-M3-mlx
    python examples/tool_agent_mlx_vlm.py "What time is it where this was taken?" photo.jpg

The server answers as it does for any model: the reasoning in ``reasoning``, calls in ``tool_calls``.
"""

import base64
import json
import mimetypes
import os
import sys
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from openai import OpenAI

MOST_ROUNDS = 20


def local_time(utc_offset_hours: float) -> str:
    return datetime.now(timezone(timedelta(hours=utc_offset_hours))).isoformat(timespec="minutes")


def convert(values: list[dict[str, Any]]) -> list[float]:
    factors = {("mi", "km"): 1.609344, ("km", "mi"): 1 / 1.609344, ("kg", "lb"): 1 / 0.45359237}
    return [v["value"] * factors[v["from"], v["to"]] for v in values]


def tool(name: str, description: str, **properties: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return {
        "type": "function",
        "function": {"name": name, "description": description, "parameters": parameters},
    }


CONVERSION = {
    "type": "object",
    "properties": {"value": {"type": "number"}, "from": {"type": "string"}, "to": {"type": "string"}},
}
FUNCTIONS = {"local_time": local_time, "convert": convert}
TOOLS = [
    tool("local_time", "The time at an offset from UTC.", utc_offset_hours={"type": "number"}),
    tool("convert", "Units: mi, km, kg, lb.", values={"type": "array", "items": CONVERSION}),
]


def result_of(name: str, arguments: str) -> str:
    """What goes back to the model, which can correct its own mistakes."""
    try:
        return json.dumps(FUNCTIONS[name](**json.loads(arguments)))
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def picture(path: str) -> dict[str, Any]:
    kind = mimetypes.guess_type(path)[0] or "image/png"
    data = base64.b64encode(Path(path).read_bytes()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:{kind};base64,{data}"}}


def streamed(client: OpenAI, messages: list[Any]) -> dict[str, Any]:
    """One reply, printed as it comes: reasoning to stderr, content to stdout."""
    message: dict[str, Any] = {"role": "assistant", "content": "", "reasoning": "", "tool_calls": []}
    chunks = client.chat.completions.create(
        model=os.environ["M3_MODEL"],
        messages=messages,
        tools=TOOLS,  # type: ignore[arg-type]
        max_tokens=8192,
        stream=True,
        # "adaptive" lets the model decide, "disabled" answers at once.
        extra_body={"thinking_mode": "enabled"},
    )
    for chunk in chunks:
        for choice in chunk.choices:
            delta = choice.delta.model_dump(exclude_none=True)
            for name, stream in (("reasoning", sys.stderr), ("content", sys.stdout)):
                message[name] += delta.get(name, "")
                print(delta.get(name, ""), end="", file=stream, flush=True)
            # Each call of M3 comes whole.
            message["tool_calls"] += delta.get("tool_calls", [])
    return message


def main(question: str, *pictures: str) -> None:
    server = os.environ.get("M3_SERVER", "http://localhost:8080/v1")
    client = OpenAI(base_url=server, api_key="not needed")
    content = [*map(picture, pictures), {"type": "text", "text": question}]
    messages: list[Any] = [{"role": "user", "content": content}]
    for _ in range(MOST_ROUNDS):
        # Kept with its reasoning, which M3 wants to see again.
        message = streamed(client, messages)
        messages.append(message)
        if not message["tool_calls"]:
            print()
            return
        for call in message["tool_calls"]:
            name, arguments = call["function"]["name"], call["function"]["arguments"]
            result = result_of(name, arguments)
            print(f"\n{name}({arguments}) -> {result[:100]}", file=sys.stderr)
            messages.append({"role": "tool", "tool_call_id": call["id"], "content": result})
    sys.exit(f"no answer after {MOST_ROUNDS} rounds of tools")


if __name__ == "__main__":
    main(*(sys.argv[1:] or ["What time is it in Kathmandu?"]))
