"""``python ARGUMENTS`` in forks of one process that has imported what is slow to import.

For tests of what commands do.  How Python and the plugin start is for processes of their own: see
``test_ways_to_start.py``.  mlx-lm, mlx-vlm and MLX are imported by each fork anew, under its own variables:
the plugin reads them when it is first needed, and MLX starts threads, which no fork inherits.
"""

import importlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

SLOW = "numpy safetensors tokenizers transformers datasets huggingface_hub fastapi uvicorn requests PIL.Image"
OF_TRANSFORMERS = "AutoConfig AutoProcessor AutoTokenizer PreTrainedTokenizerFast ProcessorMixin"
# Read when a library is imported, so the same for all forks.
FIXED = ("PYTHON", "HF_", "TRANSFORMERS_")


class Fork:
    """One run; what tests use of ``subprocess.Popen``."""

    def __init__(self, forks: "Forks", directory: Path):
        self._forks, self._directory = forks, directory

    def poll(self) -> int | None:
        """The exit status, negative for a signal; None while it runs."""
        status = self._directory / "status"
        return int(status.read_text()) if status.exists() else None

    def wait(self, timeout: float = 300) -> int:
        deadline = time.monotonic() + timeout
        while (status := self.poll()) is None:
            self._forks.check()
            if time.monotonic() > deadline:
                self.kill()
                raise subprocess.TimeoutExpired("a fork", timeout)
            time.sleep(0.01)
        return status

    def said(self, name: str = "stdout") -> str:
        """Its output so far, where no log has it."""
        file = self._directory / name
        return file.read_text(errors="replace") if file.exists() else ""

    def terminate(self) -> None:
        self._forks.send("terminate", self._directory)

    def kill(self) -> None:
        self._forks.send("kill", self._directory)


class Forks:
    """Runs command lines of one interpreter.

    Args:
        variables: of all runs; those whose names begin with one of :data:`FIXED` can only be given here.
        flags: of the interpreter.
    """

    def __init__(self, python: Path | str, variables: Mapping[str, str], *flags: str):
        self._files = tempfile.TemporaryDirectory()
        self._variables = {"HF_DATASETS_CACHE": f"{self._files.name}/datasets", **variables}
        self._number = 0
        self._process = subprocess.Popen(
            [str(python), *flags, __file__],
            env=self._variables | {"OBJC_DISABLE_INITIALIZE_FORK_SAFETY": "YES"},
            stdin=subprocess.PIPE,
            text=True,
        )

    def start(
        self,
        arguments: Sequence[object],
        cwd: Path,
        env: Mapping[str, str] | None = None,
        input: str = "",
        log: Path | None = None,
    ) -> Fork:
        """``log``: where all output goes."""
        assert not any(name.startswith(FIXED) for name in env or {}), env
        self._number += 1
        directory = Path(self._files.name) / str(self._number)
        directory.mkdir()
        (directory / "stdin").write_text(input)
        stdin, *outputs = (str(directory / name) for name in ("stdin", "stdout", "stderr"))
        run = {
            "arguments": [str(argument) for argument in arguments],
            "cwd": str(cwd),
            "variables": self._variables | dict(env or {}),
            "files": [stdin, *([str(log)] * 2 if log else outputs)],
        }
        (directory / "run").write_text(json.dumps(run))
        self.send("start", directory)
        return Fork(self, directory)

    def run(
        self,
        arguments: Sequence[object],
        cwd: Path,
        env: Mapping[str, str] | None = None,
        input: str = "",
        timeout: float = 300,
    ) -> subprocess.CompletedProcess[str]:
        fork = self.start(arguments, cwd, env, input)
        status = fork.wait(timeout)
        return subprocess.CompletedProcess(list(arguments), status, fork.said(), fork.said("stderr"))

    def send(self, what: str, directory: Path) -> None:
        self.check()
        assert self._process.stdin is not None
        self._process.stdin.write(f"{what} {directory}\n")
        self._process.stdin.flush()

    def check(self) -> None:
        assert self._process.poll() is None, "the process that forks has ended"

    def close(self) -> None:
        """Ends what still runs."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._files.cleanup()


SIGNALS = {"terminate": signal.SIGTERM, "kill": signal.SIGKILL}


def serve() -> None:
    del sys.path[0]
    sys.modules["torch"] = None  # type: ignore[assignment]  # transformers would import it, for seconds
    for name in SLOW.split():
        with suppress(ModuleNotFoundError):  # of mlx-vlm, which need not be there
            importlib.import_module(name)
    for name in OF_TRANSFORMERS.split():
        getattr(importlib.import_module("transformers"), name)
    del sys.modules["torch"]
    assert not {"mlx", "mlx_lm", "mlx_vlm"} & sys.modules.keys()
    lines, children = sys.stdin.buffer.raw, {}
    while True:
        if select.select([0], [], [], 0.01 if children else None)[0]:
            line = lines.readline().decode()
            if not line:
                break
            what, directory = line.rstrip("\n").split(" ", 1)
            if what == "start":
                children[directory] = _fork(Path(directory))
            elif directory in children:
                os.kill(children[directory], SIGNALS[what])
        for directory, child in list(children.items()):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                del children[directory]
                (Path(directory) / "ended").write_text(str(os.waitstatus_to_exitcode(status)))
                (Path(directory) / "ended").rename(Path(directory) / "status")
    for child in children.values():
        os.kill(child, signal.SIGKILL)


def _fork(directory: Path) -> int:
    child = os.fork()
    if child == 0:
        _become(**json.loads((directory / "run").read_text()))
    return child


def _become(arguments: list[str], cwd: str, variables: dict[str, str], files: list[str]) -> None:
    status = 1
    try:
        os.chdir(cwd)
        os.environ.clear()
        os.environ.update(variables)
        for number, file in enumerate(files):
            flags = os.O_CREAT | os.O_WRONLY | os.O_APPEND if number else os.O_RDONLY
            os.dup2(os.open(file, flags), number)
        sys.stdin = os.fdopen(0)
        importlib.invalidate_caches()
        _run(*arguments)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            sys.stdout.flush()
            print(end.code, file=sys.stderr)
    except BaseException:
        import traceback

        # In a log of both, the error comes last, as in a terminal.
        sys.stdout.flush()
        traceback.print_exc()
    finally:
        with suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _run(first: str, *others: str) -> None:
    """As ``python FIRST OTHERS`` does."""
    if first == "-c":
        code, *arguments = others
        sys.argv, sys.path[:0] = ["-c", *arguments], [""]
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(code, "<string>", "exec"), vars(main))
    elif first == "-m":
        module, *arguments = others
        sys.argv, sys.path[:0] = [module, *arguments], [os.getcwd()]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[:0] = [first, *others], [os.path.dirname(os.path.abspath(first))]
        runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    serve()
