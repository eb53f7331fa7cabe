"""``mlx-m3 <command>``: arguments and printing only."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import __version__

_HERE = "a directory, or a repository (its name or address) in the Hugging Face cache"
_ANYWHERE = "a directory, or a repository (its name or address) in the Hugging Face cache or on the Hub"


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
    except KeyboardInterrupt as interruption:
        print("; ".join(["mlx-m3: interrupted", *map(str, interruption.args)]), file=sys.stderr)
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

    demo = commands.add_parser("demo", help="write M3-nano, a tiny M3 that was trained, to try everything on")
    _add_demo_arguments(demo)

    doctor = commands.add_parser("doctor", help="say whether the plugin is active here, and why not")
    doctor.set_defaults(command=_doctor)

    inspect = commands.add_parser(
        "inspect", help="say what a checkpoint is, what is wrong with it, how to run it"
    )
    inspect.add_argument("checkpoint", metavar="PATH_OR_REPO", help=_ANYWHERE)
    inspect.set_defaults(command=_inspect)

    convert = commands.add_parser("convert", help="make a quantized checkpoint by a recipe, in little memory")
    _add_convert_arguments(convert)
    evaluate = commands.add_parser(
        "evaluate", help="measure how good a checkpoint is, with one layer of it in memory"
    )
    _add_evaluate_arguments(evaluate)

    fit = commands.add_parser("fit", help="say whether a checkpoint fits a machine, and at what context")
    _add_fit_arguments(fit)

    for command in (demo, doctor, inspect, convert, fit):
        command.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser


def _add_demo_arguments(demo: argparse.ArgumentParser) -> None:
    demo.add_argument(
        "directory", metavar="DIR", nargs="?", help="where to write; must not exist or be empty"
    )
    demo.add_argument("--bits", type=int, metavar="B", help="2, 3, 4, 5, 6 or 8 (default: 8)")
    demo.add_argument("--layout", metavar="L", help="in a layout that others publish; see --list-layouts")
    demo.add_argument("--list-layouts", action="store_true", help="tell the layouts that there are")
    demo.add_argument("--random", action="store_true", help="random weights, which say nothing sensible")
    demo.add_argument("--seed", type=int, metavar="N", help="with --random: of the weights (default: 0)")
    demo.add_argument("--vision", action="store_true", help="with --random: with a vision tower, for mlx-vlm")
    demo.set_defaults(command=_demo)


def _add_convert_arguments(convert: argparse.ArgumentParser) -> None:
    convert.add_argument("source", metavar="SRC", help=_HERE)
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
    evaluate.add_argument("--json", metavar="OUT", help="write everything as JSON; - is the terminal")
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
    from .toolbox.demo_command import demo_command, list_layouts

    if args.list_layouts:
        print("\n".join(list_layouts()))
        return 0
    if args.directory is None:
        raise ValueError("demo needs a DIR to write to")
    content, lines = demo_command(
        args.directory,
        bits=args.bits,
        layout=args.layout,
        random=args.random,
        seed=args.seed,
        vision=args.vision,
    )
    _print_json(content) if args.json else print("\n".join(lines))
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


def _convert(args: argparse.Namespace) -> int:
    from .toolbox.convert.command import convert_command, list_recipes

    if args.list_recipes:
        print("\n".join(list_recipes()))
        return 0
    if args.recipe is None or (args.destination is None and not args.dry_run):
        raise ValueError("convert needs a DST and a --recipe; `mlx-m3 convert SRC --list-recipes` tells them")
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
    if args.json == "-":
        _print_json(found)
        return 0
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print("\n".join(lines))
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


def _print_json(content: Any) -> None:
    print(json.dumps(content, indent=2, ensure_ascii=False))


if __name__ == "__main__":
    sys.exit(main())
