"""Every stock command on M3 works, or says why it does not; ``docs/commands.md`` has the table."""

import random
import re
import sys
from collections.abc import Callable
from pathlib import Path

from tests.end_to_end.commands import COMMANDS, WORKS, Files, forks, is_in, release, run


def test_stock_commands(tmp_path: Path, count: Callable[[int, int], int], fresh_seed: int) -> None:
    releases = {library: release(sys.executable, library) for library in ("mlx-lm", "mlx-vlm")}
    there = [command for command in COMMANDS if is_in(command, releases[command.library])]
    files = Files(tmp_path)
    files.write()
    process = forks(sys.executable, files)
    for number in random.Random(fresh_seed).sample(range(len(there)), count(3, len(there))):
        command = there[number]
        result = run(command, process, files, tmp_path / f"run{number}")
        expected = f"^{WORKS}$" if not command.refuses else command.refuses
        assert re.search(expected, result), f"{command.name}: {result}"
    process.close()
