"""``mlx-m3 <command>``: arguments and printing only.

What a command needs is imported when it runs, so that ``--help`` works without mlx.
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any, NoReturn

from . import __version__
from .toolbox.common import Answer, did_you_mean, parse_acceptance, parse_count, parse_memories, parse_memory

_ON_DISK = "a directory, or a repository (name or URL) in the Hugging Face cache"
_ANYWHERE = "a directory, or a repository (name or URL) in the Hugging Face cache or on the Hub"
_SENSITIVITY = (
    "for recipes with a bit budget: a sensitivity map saved by an earlier conversion, or `position` "
    "(default: measured layer by layer)"
)
_WORKING_MEMORY = "how much memory to use, such as 8GB (default: a quarter of the machine's)"
_MACHINES = "memory of the machine, such as 256GB (default: this one's); for a pipeline, one size per rank"
_DRAFT = "also count decoding with a DSpark draft head (default: the one in the checkpoint's dspark/)"
_ACCEPTANCE = "how often a drafted token is accepted, or each of a block (default: 0.7)"
_PREFILL_STEP = "prompt tokens computed at a time (default: 2048)"
_EXIT_CODES = """exit codes:
  0    done, and the answer is yes
  1    done, and the answer is no: not active, not sound, does not fit
  2    not done: wrong arguments, or files that are missing, incomplete or unreadable
  130  interrupted

With --json, every result, list and error is one JSON value on stdout; an error is
{"error": {"kind": KIND, "message": ..., "exit_code": ...}}, where KIND is "usage", "input", "missing",
"interrupted" or "internal"."""
_JSON_IS_A_FLAG = "--json takes no value: it prints to stdout, so write --json > FILE"


class UsageError(Exception):
    """Wrong arguments."""

    def __init__(self, message: str, parser: argparse.ArgumentParser) -> None:
        super().__init__(message)
        self.with_usage = f"{parser.format_usage()}{parser.prog}: error: {message}"


class _Parser(argparse.ArgumentParser):
    """Raises errors instead of printing them."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, self)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command, print its answer, and return the exit code; see ``_EXIT_CODES``."""
    try:
        code = _main(sys.argv[1:] if arguments is None else list(arguments))
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # The reader, perhaps `head`, has seen enough.  Python would report it again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _main(arguments: Sequence[str]) -> int:
    def failed(kind: str, message: str, code: int = 2, text: str | None = None) -> int:
        if "--json" in arguments:
            _print_json({"error": {"kind": kind, "message": message, "exit_code": code}})
        else:
            print(text or f"mlx-m3: {message}", file=sys.stderr)
        return code

    try:
        args = _parse(arguments)
        answer: Answer = import_module(f"{__package__}.toolbox.{args.command}").command(args)
        _print_json(answer.content) if args.json else print("\n".join(answer.lines))
        return 0 if answer.yes else 1
    except UsageError as error:
        return failed("usage", str(error), text=error.with_usage)
    except BrokenPipeError:
        raise
    except KeyboardInterrupt as interruption:
        return failed("interrupted", "; ".join(["interrupted", *map(str, interruption.args)]), 130)
    except (OSError, ValueError) as error:
        return failed("input", str(error))
    except MemoryError as error:
        return failed("input", f"out of memory {error}".rstrip())
    except Exception as error:
        from .toolbox.doctor import what_to_install

        if isinstance(error, ImportError) and (to_install := what_to_install(error)):
            return failed("missing", to_install)
        if sys.flags.dev_mode:
            raise
        where = "`python -X dev -m mlx_m3_plugin ...` shows where"
        return failed("internal", f"{type(error).__name__}: {error} ({where})")


def _print_json(content: Any) -> None:
    print(json.dumps(content, indent=2, ensure_ascii=False, default=vars))


# --- parsing ---


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser, commands = _parser()
    if not arguments:
        arguments = ["--help"]
    name = next((argument for argument in arguments if not argument.startswith("-")), "")
    if name and name not in commands:
        parser.error(f"unknown command {name}{did_you_mean(name, commands)}: see mlx-m3 --help")
    try:
        args, rest = parser.parse_known_args(arguments)
    except UsageError as error:
        if "--json" in str(error):
            commands[name].error(f"{error}; {_JSON_IS_A_FLAG}")
        raise
    # Before Python 3.12 argparse leaves out positional arguments that come after an option.
    for positional in ("source", "destination"):
        if rest and not rest[0].startswith("-") and getattr(args, positional, "") is None:
            setattr(args, positional, rest.pop(0))
    if rest:
        commands[name].error(_unrecognized(rest, args, commands[name]))
    return args


def _unrecognized(rest: list[str], args: argparse.Namespace, command: argparse.ArgumentParser) -> str:
    message = f"unrecognized arguments: {' '.join(rest)}"
    options = re.findall(r"--[a-z-]+", command.format_help())
    for word in rest:
        if word.startswith("--"):
            message += did_you_mean(word.partition("=")[0], options)
        elif args.json:
            return f"{message}; {_JSON_IS_A_FLAG}"
    return message


def _parser() -> tuple[_Parser, Mapping[str, argparse.ArgumentParser]]:
    """The parser, and that of each command by name."""
    parser = _Parser(
        prog="mlx-m3",
        description="Tools for MiniMax-M3 with stock mlx-lm and mlx-vlm.",
        epilog=_EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"mlx-m3-plugin {__version__}")
    commands = parser.add_subparsers(metavar="command", required=True)

    def add_command(name: str, summary: str) -> Callable[..., argparse.Action]:
        command = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        command.set_defaults(command=name)
        return command.add_argument

    add = add_command("demo", "write M3-nano, a tiny trained M3, to try everything with")
    add("directory", metavar="DIR", help="where to write; must not exist or must be empty")
    add("--bits", type=int, metavar="B", help="bits per weight: 2, 3, 4, 5, 6 or 8 (default: 8)")

    add = add_command("doctor", "check whether M3 checkpoints run correctly here")
    add("--engine", action="store_true", help="check and time the Metal kernels of sparse attention instead")

    add = add_command("inspect", "show what a checkpoint is, what is wrong with it, and how to run it")
    add("checkpoint", metavar="PATH_OR_REPO", help=_ANYWHERE)
    add("--verify", action="store_true", help="read all shards and compare them with their checksums")
    add("--stock", action="store_true", help="also ask mlx-lm and mlx-vlm whether they open it without us")

    add = add_command("convert", "quantize a checkpoint by a recipe, in little memory")
    add("source", metavar="SRC", nargs="?", help=_ON_DISK)
    add("destination", metavar="DST", nargs="?", help="where to write; must not exist")
    add("--recipe", metavar="R", help="name of a recipe (see --list-recipes), or a TOML file")
    add("--list-recipes", action="store_true", help="list available recipes")
    add(
        "--keep-draft",
        action="store_true",
        help="write draft heads of any kind, bit for bit (default: quantize that in dspark/ by the recipe)",
    )
    add("--no-draft", action="store_true", help="leave the draft head out")
    add("--dry-run", action="store_true", help="show what would be written; reads only headers")
    add("--sensitivity", metavar="MAP", help=_SENSITIVITY)
    add("--text", metavar="FILE", help="calibration text for the map (default: a built-in sample)")
    add("--memory", type=parse_memory, metavar="SIZE", help=_WORKING_MEMORY)

    add = add_command("evaluate", "measure the quality of a checkpoint, with one layer in memory at a time")
    add("checkpoint", metavar="PATH_OR_REPO", help=_ON_DISK)
    add("--reference", metavar="SRC", help="checkpoint to compare with, usually the one it was made from")
    add("--text", metavar="FILE", help="text to evaluate on (default: a built-in sample)")
    add("--tokens", type=parse_count, metavar="N", help="how many of its tokens to use (default: all)")
    add("--context", type=parse_count, default=4096, metavar="N", help="tokens per window (default: 4096)")
    add("--plot", metavar="PNG", help="plot errors and the agreement of routers and indexers, by layer")
    add("--cache", metavar="DIR", help="where forward passes are kept (default: ~/.cache/mlx-m3)")
    add("--memory", type=parse_memory, metavar="SIZE", help=_WORKING_MEMORY)

    add = add_command("fit", "check whether a checkpoint fits a machine, and how much context")
    add("checkpoint", metavar="PATH_OR_REPO", help=_ANYWHERE)
    add("--memory", type=parse_memories, metavar="SIZE[,SIZE...]", help=_MACHINES)
    add("--context", type=parse_count, metavar="N", help="tokens to plan for (default: the most that fit)")
    add("--kv-bits", type=int, metavar="B", help="4 or 8, as in mlx_lm.generate")
    add("--prefill-step", type=parse_count, default=2048, metavar="N", help=_PREFILL_STEP)
    add("--bandwidth", type=float, metavar="GB/S", help="memory bandwidth of the machine")
    add("--draft", nargs="?", const="auto", metavar="DIR", help=_DRAFT)
    add("--acceptance", type=parse_acceptance, metavar="A[,A...]", help=_ACCEPTANCE)

    for command in commands.choices.values():
        command.add_argument("--json", action="store_true", help="print the result or the error as JSON")
    return parser, commands.choices


if __name__ == "__main__":
    sys.exit(main())
