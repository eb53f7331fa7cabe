"""``mlx-m3 <command>``: arguments and printing only."""

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from . import __version__

_HERE = "a directory, or a repository (its name or address) in the Hugging Face cache"
_ANYWHERE = "a directory, or a repository (its name or address) in the Hugging Face cache or on the Hub"
_EXIT_CODES = """exit codes:
  0    done, and the answer is yes
  1    done, and the answer is no: not active, not sound, does not fit
  2    not done: wrong arguments, or files that are not there, not whole or not readable
  130  interrupted

With --json every answer, list and error is one JSON value on stdout; an error is
{"error": {"kind": "usage" | "input" | "interrupted" | "internal", "message": ..., "exit_code": ...}}."""


class UsageError(Exception):
    """Arguments that make no command, and how they are to be."""

    def __init__(self, message: str, parser: argparse.ArgumentParser) -> None:
        super().__init__(message)
        self.usage = f"{parser.format_usage()}{parser.prog}: error: {message}"


class _Parser(argparse.ArgumentParser):
    """Raises what argparse prints before it exits."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, self)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command, print its result, and return the exit code; see ``_EXIT_CODES``."""
    try:
        code = _main(sys.argv[1:] if arguments is None else list(arguments))
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # The reader, `head` perhaps, has seen enough.  Python would complain once more at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _main(arguments: Sequence[str]) -> int:
    def failed(kind: str, message: str, code: int = 2, in_words: str | None = None) -> int:
        if "--json" in arguments:
            _print_json({"error": {"kind": kind, "message": message, "exit_code": code}})
        else:
            print(in_words or f"mlx-m3: {message}", file=sys.stderr)
        return code

    try:
        args = _parse(arguments)
        return args.command(args)
    except UsageError as error:
        return failed("usage", str(error), in_words=error.usage)
    except BrokenPipeError:
        raise
    except KeyboardInterrupt as interruption:
        return failed("interrupted", "; ".join(["interrupted", *map(str, interruption.args)]), 130)
    except (OSError, ValueError) as error:
        return failed("input", str(error))
    except MemoryError as error:
        return failed("input", f"out of memory {error}".rstrip())
    except Exception as error:
        from .toolbox.missing import what_to_install

        if isinstance(error, ImportError) and (to_install := what_to_install(error)):
            return failed("missing", to_install)
        if sys.flags.dev_mode:
            raise
        where = "`python -X dev -m mlx_m3_plugin ...` shows where"
        return failed("internal", f"{type(error).__name__}: {error} ({where})")


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser, commands = _parser()
    if not arguments:
        arguments = ["--help"]
    name = next((argument for argument in arguments if not argument.startswith("-")), None)
    if name is not None and name not in commands:
        from .toolbox.suggestions import did_you_mean

        parser.error(f"there is no command {name}{did_you_mean(name, commands)}: see mlx-m3 --help")
    try:
        args, rest = parser.parse_known_args(arguments)
    except UsageError as error:
        if "--json" in str(error):
            commands[name or ""].error(f"{error}; {_JSON_IS_A_FLAG}")
        raise
    # Before Python 3.12 argparse does not take what comes after an option for these.
    for positional in ("source", "destination", "directory"):
        if rest and not rest[0].startswith("-") and getattr(args, positional, "") is None:
            setattr(args, positional, rest.pop(0))
    if rest:
        commands[name or ""].error(_unrecognized(rest, args, commands[name or ""]))
    return args


_JSON_IS_A_FLAG = "--json takes no value: it prints to stdout, so write --json > FILE"


def _unrecognized(rest: list[str], args: argparse.Namespace, command: argparse.ArgumentParser) -> str:
    from .toolbox.suggestions import did_you_mean

    message = f"unrecognized arguments: {' '.join(rest)}"
    options = re.findall(r"--[a-z-]+", command.format_help())
    for word in rest:
        if word.startswith("--"):
            message += did_you_mean(word.partition("=")[0], options)
        elif args.json:
            return f"{message}; {_JSON_IS_A_FLAG}"
    return message


def _parser() -> tuple[_Parser, Mapping[str, argparse.ArgumentParser]]:
    """And that of each command, by its name."""
    parser = _Parser(
        prog="mlx-m3",
        description="Tools for MiniMax-M3 on stock mlx-lm and mlx-vlm.",
        epilog=_EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"mlx-m3-plugin {__version__}")
    commands = parser.add_subparsers(metavar="command", required=True)

    demo = commands.add_parser("demo", help="write M3-nano, a tiny M3 that was trained, to try everything on")
    _add_demo_arguments(demo)

    doctor = commands.add_parser("doctor", help="say whether M3 checkpoints run right here, and what helps")
    doctor.set_defaults(command=_doctor)

    inspect = commands.add_parser(
        "inspect", help="say what a checkpoint is, what is wrong with it, how to run it"
    )
    inspect.add_argument("checkpoint", metavar="PATH_OR_REPO", help=_ANYWHERE)
    inspect.add_argument(
        "--verify", action="store_true", help="read all shards, and compare them with their checksums"
    )
    inspect.set_defaults(command=_inspect)

    convert = commands.add_parser("convert", help="make a quantized checkpoint by a recipe, in little memory")
    _add_convert_arguments(convert)
    evaluate = commands.add_parser(
        "evaluate", help="measure how good a checkpoint is, with one layer of it in memory"
    )
    _add_evaluate_arguments(evaluate)

    fit = commands.add_parser("fit", help="say whether a checkpoint fits a machine, and at what context")
    _add_fit_arguments(fit)

    for command in commands.choices.values():
        command.add_argument("--json", action="store_true", help="print the result, or the error, as JSON")
    return parser, commands.choices


def _add_demo_arguments(demo: argparse.ArgumentParser) -> None:
    demo.add_argument("directory", metavar="DIR", help="where to write; must not exist, or be empty")
    demo.add_argument("--bits", type=int, metavar="B", help="2, 3, 4, 5, 6 or 8 (default: 8)")
    demo.set_defaults(command=_demo)


def _add_convert_arguments(convert: argparse.ArgumentParser) -> None:
    convert.add_argument("source", metavar="SRC", nargs="?", help=_HERE)
    convert.add_argument("destination", metavar="DST", nargs="?", help="where to write; must not exist")
    convert.add_argument(
        "--recipe", metavar="R", help="a recipe's name, or a TOML file; `--list-recipes` tells them"
    )
    convert.add_argument("--list-recipes", action="store_true", help="tell the recipes that there are")
    convert.add_argument(
        "--dry-run", action="store_true", help="tell what would be written, from headers alone"
    )
    convert.add_argument(
        "--sensitivity",
        metavar="MAP",
        help="for recipes with a budget: a map that an earlier conversion saved, or `position` "
        "(default: measured, layer by layer)",
    )
    convert.add_argument("--text", metavar="FILE", help="what to measure by (default: a built-in sample)")
    _add_memory(convert)
    convert.set_defaults(command=_convert)


def _add_evaluate_arguments(evaluate: argparse.ArgumentParser) -> None:
    evaluate.add_argument("checkpoint", metavar="PATH_OR_REPO", help=_HERE)
    evaluate.add_argument("--reference", metavar="SRC", help="the checkpoint that it was made from")
    evaluate.add_argument("--text", metavar="FILE", help="what to read (default: a built-in sample)")
    evaluate.add_argument("--tokens", type=_tokens, metavar="N", help="how much of it (default: all)")
    evaluate.add_argument(
        "--context", type=_tokens, default=4096, metavar="N", help="tokens in a window (default: 4096)"
    )
    evaluate.add_argument("--plot", metavar="PNG", help="draw errors and choices by layer")
    evaluate.add_argument("--cache", metavar="DIR", help="where walks are kept (default: ~/.cache/mlx-m3)")
    _add_memory(evaluate)
    evaluate.set_defaults(command=_evaluate)


def _add_fit_arguments(fit: argparse.ArgumentParser) -> None:
    fit.add_argument("checkpoint", metavar="PATH_OR_REPO", help=_ANYWHERE)
    fit.add_argument(
        "--memory",
        type=_sizes,
        metavar="SIZE[,SIZE...]",
        help="of the machine, such as 256GB (default: of this one); several for a pipeline, by rank",
    )
    fit.add_argument("--context", type=_tokens, metavar="N", help="tokens to plan for (default: what fits)")
    fit.add_argument("--kv-bits", type=int, metavar="B", help="4 or 8, as in mlx_lm.generate")
    fit.add_argument(
        "--prefill-step", type=_tokens, default=2048, metavar="N", help="tokens at a time (default: 2048)"
    )
    fit.add_argument("--bandwidth", type=float, metavar="GB/S", help="of the machine's memory")
    fit.set_defaults(command=_fit)


def _add_memory(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--memory",
        type=_size,
        metavar="SIZE",
        help="that the work may take, such as 8GB (default: a quarter of the machine)",
    )


def _sizes(text: str) -> list[int]:
    return [_size(part) for part in text.split(",")]


def _size(text: str) -> int:
    from .toolbox.sizes import parse_memory

    return _argument(parse_memory, text)


def _tokens(text: str) -> int:
    from .toolbox.sizes import parse_count

    return _argument(parse_count, text)


def _argument(parse: Callable[[str], int], text: str) -> int:
    try:
        return parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _demo(args: argparse.Namespace) -> int:
    from .toolbox.demo import demo_command

    content, lines = demo_command(args.directory, args.bits)
    _print_json(content) if args.json else print("\n".join(lines))
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from .toolbox.doctor import diagnose, doctor_lines

    found = diagnose()
    _print_json(found.as_dict()) if args.json else print("\n".join(doctor_lines(found)))
    return 0 if found.ok else 1


def _inspect(args: argparse.Namespace) -> int:
    from .toolbox.inspect import inspect
    from .toolbox.inspect.text import lines_of
    from .toolbox.locate import locate_weights
    from .toolbox.progress import bytes_bar

    found = inspect(args.checkpoint)
    if args.verify:
        directory = locate_weights(args.checkpoint).directory
        assert directory is not None
        found.verify(directory, bytes_bar)
    if args.json:
        _print_json(found.as_dict())
    else:
        print("\n".join(lines_of(found)))
    return 0 if found.is_sound else 1


def _convert(args: argparse.Namespace) -> int:
    from .toolbox.convert.command import convert_command, list_recipes

    if args.list_recipes:
        return _print_list(list_recipes(), "summary", args.json)
    if args.source is None or args.recipe is None or (args.destination is None and not args.dry_run):
        raise ValueError("convert needs SRC, DST and --recipe; `mlx-m3 convert --list-recipes` tells recipes")
    content, lines = convert_command(
        args.source,
        args.destination,
        args.recipe,
        dry_run=args.dry_run,
        sensitivity=args.sensitivity,
        text_file=args.text,
        memory=args.memory,
    )
    _print_json(content) if args.json else print("\n".join(lines))
    return 0


def _evaluate(args: argparse.Namespace) -> int:
    from .toolbox.evaluate.command import evaluate_command

    found, lines = evaluate_command(
        args.checkpoint,
        args.reference,
        text_file=args.text,
        tokens=args.tokens,
        context=args.context,
        cache=args.cache,
        memory=args.memory,
        plot=args.plot,
    )
    _print_json(found) if args.json else print("\n".join(lines))
    return 0


def _fit(args: argparse.Namespace) -> int:
    from .toolbox.fit import fit, fit_lines
    from .toolbox.fit_pipeline import fit_pipeline, pipeline_lines
    from .toolbox.machine import machine_memory

    memories = args.memory or [machine_memory()]
    if memories == [None]:
        raise ValueError("how much memory is there? say so with --memory 256GB")
    options = {"context": args.context, "kv_bits": args.kv_bits, "prefill_step": args.prefill_step}
    if len(memories) > 1:
        if args.bandwidth is not None:
            raise ValueError("--bandwidth is for one machine")
        shared = fit_pipeline(args.checkpoint, memories, **options)
        _print_json(shared.as_dict()) if args.json else print("\n".join(pipeline_lines(shared)))
        return 0 if shared.fits else 1
    found = fit(args.checkpoint, memories[0], bandwidth=args.bandwidth, **options)
    _print_json(found.as_dict()) if args.json else print("\n".join(fit_lines(found)))
    return 0 if found.fits else 1


def _print_list(content: Mapping[str, str], what: str, as_json: bool) -> int:
    """Names, and of each its ``what``."""
    if as_json:
        _print_json([{"name": name, what: text} for name, text in content.items()])
    else:
        width = max(map(len, content))
        print("\n".join(f"{name.ljust(width)}  {text}" for name, text in content.items()))
    return 0


def _print_json(content: Any) -> None:
    print(json.dumps(content, indent=2, ensure_ascii=False))


if __name__ == "__main__":
    sys.exit(main())
