"""The time that replies with tool calls take, and how it grows with the length of a value.

    python benchmarks/tool_calls.py --before OTHER_CHECKOUT

Well-formed replies are read by pieces of about a token's size.  With ``--before``, another checkout reads the
same replies in the same run, in turns, and the ratio of the best times is printed.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

CHECKOUT = Path(__file__).resolve().parents[1]
NS = "]<]minimax[>["
PIECE = 4
ROUNDS = 7

WORKER = """
import sys, time
sys.path.insert(0, sys.argv[1])
from mlx_m3_plugin.chat.reply import ReplyParser
import json
tools, texts = json.load(open(sys.argv[2]))
for _ in sys.stdin:
    begin = time.process_time()
    for pieces in texts:
        parser = ReplyParser(tools)
        for piece in pieces:
            parser.feed(piece)
        parser.finish()
    print(time.process_time() - begin, flush=True)
"""


def reply(value: str, calls: int = 4) -> str:
    invoke = f'{NS}<invoke name="write">{NS}<path>a.py{NS}</path>{NS}<body>{value}{NS}</body>'
    invoke += f"{NS}<tags>{NS}<item>a{NS}</item>{NS}<item>b{NS}</item>{NS}</tags>{NS}</invoke>\n"
    return f"<mm:think>Let me see.</mm:think>Writing.{NS}<tool_call>\n{invoke * calls}{NS}</tool_call>"


STRING = {"type": "string"}
PROPERTIES = {"path": STRING, "body": STRING, "tags": {"type": "array", "items": STRING}}
PARAMETERS = {"type": "object", "properties": PROPERTIES}
TOOLS = [{"type": "function", "function": {"name": "write", "parameters": PARAMETERS}}]


def pieces_of(text: str) -> list[str]:
    """Of a few characters, with the namespace token whole, as the tokenizer has it."""
    pieces = []
    for n, part in enumerate(text.split(NS)):
        pieces += [NS] * (n > 0) + [part[at : at + PIECE] for at in range(0, len(part), PIECE)]
    return pieces


def worker(checkout: Path, file: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WORKER, str(checkout), str(file)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def seconds(process: subprocess.Popen[str]) -> float:
    assert process.stdin
    assert process.stdout
    process.stdin.write("\n")
    process.stdin.flush()
    return float(process.stdout.readline())


def growth() -> float:
    sys.path.insert(0, str(CHECKOUT))
    from mlx_m3_plugin.chat.reply import ReplyParser

    def best(size: int) -> float:
        pieces, times = pieces_of(reply("x = 1 < 2\n" * (size // 10), calls=1)), []
        for _ in range(3):
            begin, parser = time.process_time(), ReplyParser(TOOLS)
            events = [event for piece in pieces for event in parser.feed(piece)] + parser.finish()
            times.append(time.process_time() - begin)
            assert sum(event.call is not None for event in events) == 1
        return min(times)

    return best(1_000_000) / best(100_000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", type=Path, help="another checkout to compare with")
    arguments = parser.parse_args()
    for name, value, count in (("short values", "x = 1", 300), ("values of 4 kB", "x = 1 < 2\n" * 400, 10)):
        with TemporaryDirectory() as directory:
            file = Path(directory) / "replies.json"
            file.write_text(json.dumps([TOOLS, [pieces_of(reply(value))] * count]))
            checkouts = [CHECKOUT, *([arguments.before.resolve()] if arguments.before else [])]
            workers = [worker(checkout, file) for checkout in checkouts]
            times = [[seconds(process) for process in workers] for _ in range(ROUNDS)]
            best = [min(column) for column in zip(*times, strict=True)]
            for process in workers:
                assert process.stdin
                process.stdin.close()
                process.wait()
        line = f"{name}: {best[0] / count * 1000:.3f} ms for a reply"
        print(line + (f", {best[0] / best[1]:.3f} times the other checkout" if arguments.before else ""))
    print(f"a value of 1 MB: {growth():.1f} times the time of 100 kB")


if __name__ == "__main__":
    main()
