"""Every console script and ``python -m`` entry of both libraries, run on a small random M3 checkpoint.

    python -m tests.end_to_end.commands newest=PYTHON oldest=PYTHON

writes the table of ``docs/commands.md``: each command with the plugin and without, in each environment.
``test_commands.py`` holds what they do with the plugin against :data:`COMMANDS`.
"""

import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from tests.end_to_end.environments import clean_variables
from tests.end_to_end.forks import Fork, Forks

# Many times the random model's block budget of 32 tokens.
PROMPT = " ".join(f"You may call tool {n}, then respond step by step." for n in range(8))
WORKS = "works"
SECONDS = 1800


@dataclass(frozen=True)
class Files:
    """What commands read: a checkpoint with vision, texts to train on, a home with calibration data."""

    directory: Path

    @property
    def model(self) -> Path:
        return self.directory / "m3"

    @property
    def data(self) -> Path:
        return self.directory / "data"

    @property
    def picture(self) -> Path:
        return self.model / "picture.png"

    def write(self) -> None:
        from tests.checkpoints import random_vision
        from tests.checkpoints.random_model import write_random_model

        write_random_model(self.model, vision=True)
        (self.model / random_vision.PICTURE).rename(self.picture)
        self.data.mkdir()
        for split in ("train", "valid", "test"):
            turns = [
                [
                    {"role": "user", "content": f"Count to {n}. " * 4},
                    {"role": "assistant", "content": f"It is {n}, and so on. " * (3 + n)},
                ]
                for n in range(4)
            ]
            rows = [json.dumps({"messages": messages}) for messages in turns]
            (self.data / f"{split}.jsonl").write_text("\n".join(rows) + "\n")
        (self.model / "README.md").write_text("---\nlibrary_name: mlx\n---\n# M3\n")
        cache = self.directory / "home" / ".cache"
        (cache / "huggingface" / "hub").mkdir(parents=True)
        calibration = cache / "mlx-lm" / "calibration_v5.txt"
        calibration.parent.mkdir()
        calibration.write_text(PROMPT * 12)


@dataclass(frozen=True)
class Command:
    """One command line.

    Attributes:
        run: the arguments of ``python -m``, with ``{model}``, ``{data}``, ``{picture}``; ``{out}`` is an
            empty directory of this command's own.  Several commands run one after the other.
        refuses: what the plugin makes it say, where it does not work; a pattern.
        since, before: the releases that have it, of the library that its name starts with.
        stdin: what is typed.
        says: a pattern in what it prints.
    """

    name: str
    run: tuple[str, ...]
    refuses: str = ""
    since: tuple[int, ...] = ()
    before: tuple[int, ...] = ()
    stdin: str = ""
    says: str = ""

    @property
    def library(self) -> str:
        return "mlx-vlm" if self.run[0].startswith("mlx_vlm") else "mlx-lm"


def lm(name: str, *options: str, **more: object) -> Command:
    return Command(f"mlx_lm.{name}", tuple(f"mlx_lm {o}" for o in options), **more)  # type: ignore[arg-type]


def vlm(name: str, *options: str, **more: object) -> Command:
    return Command(f"mlx_vlm.{name}", tuple(f"mlx_vlm {o}" for o in options), **more)  # type: ignore[arg-type]


GENERATE = 'generate --model {model} --prompt "{prompt}" --max-tokens 8'
TRAIN = "lora --model {model} --train --data {data} --iters 2 --batch-size 2 --num-layers 2 --val-batches 1"
TRAIN += " --max-seq-length 160 --adapter-path {out}/adapters"
LM_CONVERT = "convert --hf-path {model} --mlx-path {out}/mlx"
ADAPTER = " --adapter-path {out}/adapters"
FILE = " --prompt-cache-file {out}/prompt.safetensors"
OPEN = 'generate --model {out}/mlx --prompt "{prompt}" --max-tokens 4'
FUSE = "fuse --model {model} --adapter-path {out}/adapters --save-path {out}/mlx"
DWQ = "dwq --model {model} --mlx-path {out}/dwq --data-path {data} --num-samples 2 --batch-size 2"
DWQ += " --max-seq-length 96"
DEQUANTIZE = "convert --hf-path {out}/mlx --mlx-path {out}/plain --dequantize"
SEEN = '--image {picture} --prompt "What is this?" --max-tokens 6'
VLM_GENERATE = "generate --model {model} " + SEEN
VLM_CONVERT = "convert --hf-path {model} --mlx-path {out}/mlx"
VLM_OPEN = "generate --model {out}/mlx " + SEEN
NETWORK = r"(?i)connect|offline|network|resolve|reach|local|cache"

COMMANDS = [
    lm("generate", GENERATE, says="Generation"),
    lm("generate --kv-bits 8", GENERATE + " --kv-bits 8 --kv-group-size 32 --quantized-kv-start 0"),
    lm("generate --max-kv-size", GENERATE + " --max-kv-size 64"),
    *(
        lm(f"generate --num-draft-tokens {n}", GENERATE + f" --draft-model {{model}} --num-draft-tokens {n}")
        for n in (1, 3, 8)
    ),
    lm("chat", "chat --model {model} --max-tokens 6", stdin="Hello there\nq\n"),
    lm("server", "server --model {model} --port {port}"),
    lm("cache_prompt", 'cache_prompt --model {model} --prompt "{prompt}"' + FILE, GENERATE + FILE),
    lm("convert", LM_CONVERT, OPEN),
    *(
        lm(f"convert -q --q-mode {mode}", LM_CONVERT + f" -q --q-mode {mode}", OPEN)
        for mode in ("affine", "mxfp4", "nvfp4", "mxfp8")
    ),
    *(
        lm(f"convert --quant-predicate {recipe}", LM_CONVERT + f" -q --quant-predicate {recipe}", OPEN)
        for recipe in ("mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6")
    ),
    lm("convert --dequantize", LM_CONVERT + " -q", DEQUANTIZE, OPEN.replace("/mlx", "/plain")),
    lm("lora", TRAIN, "lora --model {model} --test --data {data} --test-batches 1" + ADAPTER,
       GENERATE + ADAPTER),
    lm("lora --fine-tune-type dora", TRAIN + " --fine-tune-type dora", refuses="doesn't support DoRA"),
    lm("lora --fine-tune-type full", TRAIN + " --fine-tune-type full", GENERATE + ADAPTER),
    lm("lora --grad-checkpoint --mask-prompt", TRAIN + " --grad-checkpoint --mask-prompt"),
    lm("fuse", TRAIN, FUSE, OPEN),
    lm("fuse --export-gguf", TRAIN, FUSE + " --export-gguf", refuses="not supported for GGUF"),
    lm("dwq", LM_CONVERT + " -q",
       DWQ + " --quantized-model {out}/mlx", OPEN.replace("/mlx", "/dwq")),
    lm("dwq, from the start", DWQ + " --group-size 32", OPEN.replace("/mlx", "/dwq")),
    lm("gptq", "gptq --model {model} --mlx-path {out}/mlx --num-samples 2 --sequence-length 96", OPEN),
    lm("dynamic_quant", "dynamic_quant --model {model} --mlx-path {out}/mlx", OPEN),
    lm("awq", "awq --model {model} --mlx-path {out}/mlx --num-samples 2 --sequence-length 96",
       refuses="mlx-m3 convert"),
    lm("evaluate", "evaluate --model {model} --tasks winogrande --limit 2", refuses="lm.eval|lm_eval"),
    lm("perplexity",
       "perplexity --model {model} --data-path {data} --sequence-length 96 --num-samples 2"),
    lm("benchmark", "benchmark --model {model} -p 64 -g 4 -n 1", says="Averages"),
    lm("manage", "manage --scan --pattern m3"),
    lm("share", "share --path {model} --tmpdir {out}", refuses="No hostfile"),
    lm("upload", "upload --path {model} --upload-repo someone/m3", refuses=NETWORK),
    vlm("generate", VLM_GENERATE),
    vlm("generate, text only", 'generate --model {model} --prompt "{prompt}" --max-tokens 6'),
    vlm("generate --kv-bits 8", VLM_GENERATE + " --kv-bits 8 --kv-group-size 32 --quantized-kv-start 0"),
    vlm("chat", "chat --model {model} --max-tokens 6", stdin="Hello there\n/exit\n"),
    vlm("chat_ui", "chat_ui --model {model}", refuses="gradio"),
    vlm("server", "server --model {model} --port {port}"),
    vlm("convert", VLM_CONVERT, VLM_OPEN),
    *(
        vlm(f"convert -q --q-mode {mode}", VLM_CONVERT + f" -q --q-mode {mode}", VLM_OPEN)
        for mode in ("affine", "mxfp4", "nvfp4", "mxfp8")
    ),
    *(
        vlm(f"convert --quant-predicate {recipe}", VLM_CONVERT + f" -q --quant-predicate {recipe}", VLM_OPEN)
        for recipe in (f"mixed_{bits}" for bits in ("2_6", "3_4", "3_5", "3_6", "3_8", "4_6", "4_8"))
    ),
    vlm("convert --quant-method awq", VLM_CONVERT + " -q --quant-method awq", VLM_OPEN, since=(0, 7)),
    vlm("convert --dequantize", VLM_CONVERT + " -q", DEQUANTIZE, VLM_OPEN.replace("/mlx", "/plain")),
    vlm("convert --mtp", VLM_CONVERT + " --mtp", VLM_OPEN, since=(0, 7)),
    vlm("moe_offload", "moe_offload --build {model} --out {out}/mlx", VLM_OPEN + " --expert-cache-gb 1",
        since=(0, 7)),
    vlm("moe_offload of its own layout", VLM_CONVERT + " -q",
        "moe_offload --build {out}/mlx --out {out}/store",
        VLM_OPEN.replace("/mlx", "/store") + " --expert-cache-gb 1", since=(0, 7)),
    vlm("decide", "decide --model {model} --state Warm --questions {questions}", since=(0, 7),
        refuses="does not support decision prediction"),
    vlm("train", "train --model {model} --data {data} --iters 2 --batch-size 2 --max-seq-length 160"
        " --output-path {out}/adapters", "generate --model {model} --adapter-path {out}/adapters " + SEEN,
        since=(0, 7)),
    vlm("lora", "lora --model-path {model} --dataset {data} --iters 2 --batch-size 1 --output-path {out}/a",
        before=(0, 7)),
    *(
        vlm(f"evals.{name}", f"evals.{name} --model {{model}} --max-samples 1", refuses=NETWORK)
        for name in ("math_vista", "mmmu", "mmstar", "ocrbench")
    ),
    vlm("split_mtp", "split_mtp --model {model} --output {out}/mtp", since=(0, 7), refuses="(?i)mtp"),
    *(
        vlm(name, f"{name} Hello --model {{model}}", since=(0, 7), refuses="checkpoint")
        for name in ("token_classification", "privacy_filter")
    ),
]  # fmt: skip


def forks(python: Path | str, files: Files, plugin: bool = True) -> Forks:
    return Forks(
        python,
        clean_variables()
        | {
            "HOME": str(files.directory / "home"),
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1",
            "HF_DATASETS_CACHE": str(files.directory / "cache"),
            "OPENBLAS_NUM_THREADS": "1",
            "MLX_M3_PLUGIN": "on" if plugin else "off",
        },
    )


def run(command: Command, made_by: Forks, files: Files, out: Path) -> str:
    """``works``, or the last line of what it said."""
    out.mkdir(parents=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    questions = json.dumps({"warm": {"question": "Is it warm?", "type": "boolean"}})
    places = dict(
        model=files.model, data=files.data, picture=files.picture, out=out, port=port, prompt=PROMPT
    )
    for number, line in enumerate(command.run):
        package, name, *options = [quoted or word for quoted, word in re.findall(r'"([^"]*)"|(\S+)', line)]
        arguments = [option.format(**places, questions=questions) for option in options]
        directory = out / f"run{number}"
        directory.mkdir()
        module, arguments = _entry(package, name, arguments)
        said_in = directory / "said.txt"
        running = made_by.start(["-m", module, *arguments], directory, input=command.stdin, log=said_in)
        answered = name == "server" and _answers(port, files.model, running)
        try:
            status = running.wait(SECONDS)
        except subprocess.TimeoutExpired:
            return f"no end after {SECONDS} seconds"
        said = said_in.read_text(errors="replace").replace(str(files.directory), "...")
        if name == "server":
            return WORKS if answered else _last_line(said)
        if offline := re.search(r"\S*OfflineModeIsEnabled: .*|.*\(OfflineModeIsEnabled\)", said):
            return re.sub(r".*ERROR - |\x1b\[\d+m", "", offline[0]).strip()
        if status != 0 or not re.search(command.says, said) or re.search(r"^Error", said, re.MULTILINE):
            return _last_line(said)
    return WORKS


def _entry(package: str, name: str, arguments: list[str]) -> tuple[str, list[str]]:
    """What ``python -m`` is given.  mlx-lm's own command line starts its parts, which have no other."""
    return ("mlx_lm", [name, *arguments]) if package == "mlx_lm" else (f"mlx_vlm.{name}", arguments)


def _answers(port: int, model: Path, server: Fork) -> bool:
    """Whether a server that was started completes a chat; stops it."""
    asked = {"model": str(model), "max_tokens": 4, "messages": [{"role": "user", "content": PROMPT}]}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions",
        json.dumps(asked).encode(),
        headers={"Content-Type": "application/json"},
    )
    try:
        while server.poll() is None:
            try:
                with urllib.request.urlopen(request, timeout=60) as answer:
                    return bool(json.load(answer)["choices"])
            except (urllib.error.HTTPError, TimeoutError):
                return False
            except urllib.error.URLError:
                time.sleep(0.2)
        return False
    finally:
        server.terminate()


def _last_line(said: str) -> str:
    lines = [line.strip() for line in said.splitlines() if line.strip() and "%|" not in line]
    return lines[-1][:300] if lines else "nothing said"


def release(python: Path | str, library: str) -> tuple[int, ...]:
    code = f"from importlib.metadata import version; print(version({library!r}))"
    found = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True).stdout
    return tuple(int(n) for n in re.findall(r"\d+", found)[:3])


def is_in(command: Command, found: tuple[int, ...]) -> bool:
    return command.since <= found and (not command.before or found < command.before)


def main(given: Iterable[str]) -> None:
    environments = dict(pair.split("=", 1) for pair in given)
    releases = {n: {lib: release(p, lib) for lib in ("mlx-lm", "mlx-vlm")} for n, p in environments.items()}
    results: dict[tuple[str, str, bool], str] = {}
    columns = [(name, plugin) for name in environments for plugin in (True, False)]
    with tempfile.TemporaryDirectory() as directory, ThreadPoolExecutor(2) as pool:
        files = Files(Path(directory))
        files.write()

        def measure(column: tuple[str, bool]) -> None:
            name, plugin = column
            process = forks(environments[name], files, plugin)
            for number, command in enumerate(COMMANDS):
                if is_in(command, releases[name][command.library]):
                    started = time.monotonic()
                    result = run(command, process, files, Path(directory) / f"{name}-{plugin}-{number}")
                    results[command.name, name, plugin] = result
                    seconds = time.monotonic() - started
                    print(name, plugin, command.name, f"{seconds:.0f} s", result, sep=" | ", file=sys.stderr)
            process.close()

        list(pool.map(measure, columns))
    print("\n".join(_table(list(environments), releases, results)))


def _table(
    names: list[str],
    releases: dict[str, dict[str, tuple[int, ...]]],
    results: dict[tuple[str, str, bool], str],
) -> Iterable[str]:
    yield "# Every stock command on M3\n"
    yield f"Run on {date.today()} by `make commands`, on the random checkpoint of `tests/checkpoints`."
    yield "Each command line is in `tests/end_to_end/commands.py`; what it writes is opened again."
    yield "Where a release does not have the command, the cell is empty.\n"
    for name, found in releases.items():
        versions = (f"{library} {'.'.join(map(str, numbers))}" for library, numbers in found.items())
        yield f"- {name}: {', '.join(versions)}"
    yield ""
    notes: list[str] = []

    def cell(command: Command, name: str, plugin: bool) -> str:
        result = results.get((command.name, name, plugin))
        if result is None:
            return ""
        if result == WORKS:
            return WORKS
        if result not in notes:
            notes.append(result)
        return f"no [{notes.index(result) + 1}]"

    columns = [(name, plugin) for name in names for plugin in (True, False)]
    yield "| command | " + " | ".join(f"{n}, {'with us' if p else 'without'}" for n, p in columns) + " |"
    yield "|---" * (len(columns) + 1) + "|"
    for command in COMMANDS:
        yield f"| `{command.name}` | " + " | ".join(cell(command, *column) for column in columns) + " |"
    yield "\nWhat those say that do not work:\n"
    for number, note in enumerate(notes, 1):
        yield f"{number}. `{note.replace('`', chr(39))}`"


if __name__ == "__main__":
    if pattern := os.environ.get("ONLY"):
        COMMANDS = [command for command in COMMANDS if re.search(pattern, command.name)]
    main(sys.argv[1:])
