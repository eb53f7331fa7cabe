"""``python -m MODULE ARGUMENTS`` in forks of one process that has imported what is slow to import.

    python -m tests.end_to_end.forks

reads a JSON object for each run from its input, ``{"module", "arguments", "directory", "input", "timeout"}``,
and answers with the exit status, or null after the timeout.  The output is in ``directory/said.txt``.
mlx-lm, mlx-vlm and MLX are imported by each fork anew: MLX starts threads, which no fork inherits.
"""

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

OURS = ("mlx", "tests", "__main__")
SLOW = "import sys, mlx_lm.generate, mlx_lm.server, datasets, mlx_vlm; print(*sys.modules)"


class Forks:
    """Runs modules in an environment, one at a time."""

    def __init__(self, python: Path | str, variables: dict[str, str], checkout: Path):
        self._variables = variables | {"PYTHONPATH": str(checkout)}
        self._process = subprocess.Popen(
            [str(python), "-m", __spec__.name if __spec__ else __name__],
            env=self._variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=checkout,
        )  # fmt: skip

    def start(self, module: str, arguments: list[str], directory: Path, **more: Any) -> None:
        run = {"module": module, "arguments": arguments, "directory": str(directory), **more}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(run) + "\n")
        self._process.stdin.flush()

    def status(self) -> int | None:
        """The exit status of what was started; waits for it.  None after its timeout."""
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)


def serve() -> None:
    for name in subprocess.run(
        [sys.executable, "-c", SLOW], stdout=subprocess.PIPE, text=True
    ).stdout.split():
        if not name.startswith(OURS):
            try:
                import_module(name)
            except Exception:  # parts of others, which import themselves when they are ready
                continue
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        run = json.loads(line)
        child = os.fork()
        if child == 0:
            _become(**run)
        answers.write(
            json.dumps(_wait(child, Path(run["directory"]) / "stop", run.get("timeout", 300))) + "\n"
        )
        answers.flush()


def _wait(child: int, stop: Path, seconds: float) -> int | None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not stop.exists():
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def _become(module: str, arguments: list[str], directory: str, input: str = "", **_: Any) -> None:
    status = 1
    try:
        os.chdir(directory)
        typed, said = Path("typed.txt"), os.open("said.txt", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        typed.write_text(input)
        os.dup2(os.open(typed, os.O_RDONLY), 0)
        os.dup2(said, 1)
        os.dup2(said, 2)
        sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w")
        sys.argv = [module, *arguments]
        # As ``python -m`` has it: here, not where this process was started.
        sys.path = [directory, *(p for p in sys.path if p not in ("", os.environ["PYTHONPATH"]))]
        sys.path.append(os.environ["PYTHONPATH"])
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        Path(directory, "ended").touch()
        os._exit(status)


if __name__ == "__main__":
    serve()
