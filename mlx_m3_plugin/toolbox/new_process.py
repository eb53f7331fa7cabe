"""Python code in a process of its own."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def ask(
    code: str, *arguments: str, python: str = sys.executable, env: Mapping[str, str] | None = None
) -> tuple[Any, subprocess.CompletedProcess[str]]:
    """Run ``code``, and return its last line of output, which is JSON, with the finished process.

    None in place of the output where the process ends without it.

    Raises:
        OSError: ``python`` does not start.
    """
    # Not in the current directory: a checkout of the plugin there would be found without being installed.
    home = Path(python).parent
    command = [python, "-c", code, *arguments]
    run = subprocess.run(command, capture_output=True, text=True, env=env, cwd=home)
    try:
        return json.loads(run.stdout.strip().splitlines()[-1]), run
    except (IndexError, ValueError):
        return None, run
