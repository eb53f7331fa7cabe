"""``mlx-m3 <command>``: arguments and printing only."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from . import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    args = parser.parse_args(arguments)
    try:
        code = args.command(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # The reader, `head` perhaps, has seen enough.  Python would complain once more at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("mlx-m3: interrupted", file=sys.stderr)
        return 130
    except (OSError, ValueError) as error:
        print(f"mlx-m3: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mlx-m3", description="Tools for MiniMax-M3 on stock mlx-lm and mlx-vlm."
    )
    parser.add_argument("--version", action="version", version=f"mlx-m3-plugin {__version__}")
    commands = parser.add_subparsers(metavar="command", required=True)

    demo = commands.add_parser("demo", help="write a tiny M3 checkpoint with random weights")
    demo.add_argument("directory", metavar="DIR", help="where to write it; must not exist or be empty")
    demo.add_argument("--seed", type=int, default=0, help="seed of the random weights (default: 0)")
    demo.add_argument("--vision", action="store_true", help="with a vision tower, for mlx-vlm")
    demo.set_defaults(command=_demo)

    doctor = commands.add_parser("doctor", help="say whether the plugin is active here, and why not")
    doctor.set_defaults(command=_doctor)

    inspect = commands.add_parser(
        "inspect", help="say what a checkpoint is, what is wrong with it, how to run it"
    )
    inspect.add_argument("checkpoint", metavar="PATH_OR_REPO", help="a directory, or a repository on the Hub")
    inspect.set_defaults(command=_inspect)

    for command in (demo, doctor, inspect):
        command.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser


def _demo(args: argparse.Namespace) -> int:
    from .toolbox.demo import commands_to_try, write_demo

    report = write_demo(args.directory, args.seed, args.vision)
    if args.json:
        _print_json(asdict(report))
        return 0
    print(f"Wrote a random MiniMax-M3 of {report.parameters / 1e6:.1f} M parameters to {report.path}")
    print("\n".join(commands_to_try(report)))
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from .toolbox.doctor import diagnose

    diagnosis = diagnose()
    if args.json:
        _print_json(diagnosis.as_dict())
    else:
        print("\n".join(_doctor_lines(diagnosis.as_dict())))
    return 0 if diagnosis.active else 1


def _doctor_lines(diagnosis: dict[str, Any]) -> list[str]:
    def problem_of(file: dict[str, Any]) -> str:
        return f"  ({file['problem']})" if file["problem"] else ""

    files = [file["path"] + problem_of(file) for file in diagnosis["startup_files"]]
    modules = [f"{m['name']}: {m['source']}, {m['why']}\n    {m['path']}" for m in diagnosis["modules"]]
    versions = [f"{name} {version or 'not installed'}" for name, version in diagnosis["versions"].items()]
    sections = {
        "Versions": [f"Python {diagnosis['python']}", *versions],
        "Start-up files": files or ["none"],
        "Who serves": modules,
        "Extended": [f"{name}: {what}" for name, what in diagnosis["patches"].items()],
        "Errors": diagnosis["errors"],
        "What to do": diagnosis["advice"],
    }
    lines = [f"mlx-m3-plugin is {'active' if diagnosis['active'] else 'NOT ACTIVE'} in a fresh process"]
    for title, entries in sections.items():
        lines += [title, *(f"  {entry}" for entry in entries)] if entries else []
    return lines


def _inspect(args: argparse.Namespace) -> int:
    from .toolbox.inspect import inspect
    from .toolbox.inspect.text import lines_of

    found = inspect(args.checkpoint)
    if args.json:
        _print_json(found.as_dict())
    else:
        print("\n".join(lines_of(found)))
    return 0 if found.is_sound else 1


def _print_json(content: Any) -> None:
    print(json.dumps(content, indent=2, ensure_ascii=False))


if __name__ == "__main__":
    sys.exit(main())
