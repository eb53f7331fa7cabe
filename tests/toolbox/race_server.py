"""Runs ``mlx-m3`` commands beside each other: a race for each line of standard input, as JSON.

A race is a list of runs: ``{"arguments": [...], "output": FILE, "cache": DIR, "start": seconds,
"signal": number or null, "signal_after": seconds}``.  The answer is a line with their exit codes, negative
for a signal's.
"""

import json
import os
import signal
import sys
import time
import traceback
from typing import Any

# All that the commands import, before they are forked: a start takes milliseconds then.
from mlx_m3_plugin.cli import main
from mlx_m3_plugin.toolbox import convert, demo, evaluate
from mlx_m3_plugin.toolbox.convert import plan

COMMANDS = (demo, convert, evaluate)
SHARD_BYTES = 60_000
BROKEN = 70


def run(arguments: list[str]) -> int:
    # More than ten files of a tiny checkpoint.
    plan.SHARD_BYTES = SHARD_BYTES
    try:
        return main(arguments)
    except KeyboardInterrupt:
        raise
    except BaseException:
        traceback.print_exc()
        return BROKEN


def start(wanted: dict[str, Any]) -> int:
    output = os.open(wanted["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    if sys.platform != "linux":
        # Metal does not survive a fork.
        command = [sys.executable, __file__, *wanted["arguments"]]
        environment = os.environ | {"XDG_CACHE_HOME": wanted["cache"]}
        to_file = [(os.POSIX_SPAWN_DUP2, output, stream) for stream in (1, 2)]
        process = os.posix_spawn(sys.executable, command, environment, file_actions=to_file)
        os.close(output)
        return process
    # Not before the child can catch it.
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    process = os.fork()
    if process:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        os.close(output)
        return process
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ["XDG_CACHE_HOME"] = wanted["cache"]
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        code = run(wanted["arguments"])
        sys.stdout.flush()
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    except KeyboardInterrupt:
        # Before or after what the command itself catches.
        code = 130
    os._exit(code)


def race(runs: list[dict[str, Any]]) -> list[int]:
    events = [(one["start"], number, True) for number, one in enumerate(runs)]
    events += [
        (one["start"] + one["signal_after"], number, False)
        for number, one in enumerate(runs)
        if one["signal"] is not None
    ]
    begin, processes = time.monotonic(), {}
    for moment, number, is_start in sorted(events):
        time.sleep(max(0, begin + moment - time.monotonic()))
        if is_start:
            processes[number] = start(runs[number])
        else:
            # A process that has ended keeps its number until it is waited for.
            os.kill(processes[number], runs[number]["signal"])
    return [os.waitstatus_to_exitcode(os.waitpid(processes[n], 0)[1]) for n in range(len(runs))]


if __name__ == "__main__":
    if len(sys.argv) > 1:
        try:
            sys.exit(run(sys.argv[1:]))
        except KeyboardInterrupt:
            sys.exit(130)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for line in sys.stdin:
        print(json.dumps(race(json.loads(line))), flush=True)
