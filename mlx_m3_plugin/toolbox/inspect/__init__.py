"""``mlx-m3 inspect``: what a checkpoint is, what is wrong with it, and how to run it.

Reads headers and settings alone, so a checkpoint of 850 GB takes about a second.
"""

import textwrap
from argparse import Namespace
from collections.abc import Iterable
from contextlib import suppress
from functools import partial
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

from ...chat.prompt import takes_effort
from ...model.config import TextConfig, uncut_lists
from ...model.memory import Memory, is_mac, machine_memory, memory_for
from ...startup.settings import EFFORTS, EXPERT_MEMORY, checked
from ...weights.check import ranges_of, shorten
from ...weights.headers import DRAFT_FOLDER, INDEX, dtypes_not_read
from ...weights.names import unused_in_words
from ..checkpoint import (
    CHAT_TEMPLATE_FILES,
    M3,
    Checkpoint,
    Source,
    draft_in_words,
    locate,
    model_name,
    open_source,
    read_checkpoint,
    read_text_config,
)
from ..checksums import verify
from ..common import Answer, bytes_bar, component_table, size_in_words, tokens_in_words
from ..draft_head import open_draft_head
from ..parameters import NOT_IN_THE_TEXT_MODEL
from ..stock import stock_commands, why_not_opened, why_these_options, wrong_past_the_budget
from .layout import dtype_histogram, measure, recognise_layout

_COLUMNS = 100
# Paths and tensor names are not broken.
_wrap = partial(textwrap.wrap, width=_COLUMNS, break_long_words=False, break_on_hyphens=False)
_MOST_PROBLEMS = 20


class Inspection(SimpleNamespace):
    """The result of ``mlx-m3 inspect``.

    Attributes:
        model: which of MiniMax's models it is, None if the config is not understood.
        efforts: what the chat template takes as reasoning effort, empty if it takes none.
        draft: where a draft head is; None if there is none.
        drafter: of the one in ``dspark/``, which mlx-vlm runs, its ``bytes``, ``block``: the most tokens that
            it drafts in a round, and ``target_layers``: whose output it reads; None where it is not on disk.
        components, precisions: see :func:`~.layout.measure`.  If the config or a format is not understood,
            ``components``, ``parameters``, ``attention`` and ``memory`` are None.
        attention: see :func:`_attention`.
        opens: ``mlx-lm`` and ``mlx-vlm`` -> whether it opens there with this plugin.
        wrong_without_plugin: library -> why its answers are not right past ``attention.budget`` tokens
            without this plugin, where it opens the checkpoint.
        fails_without_plugin: library -> what it says when it loads the checkpoint without this plugin, empty
            if it opens; None if it was not asked.
        notes: what to know before using it.  problems: what is wrong with it, one line each.
        verified: None unless the files were compared with their checksums.
    """


def command(args: Namespace) -> Answer:
    found = inspect(args.checkpoint)
    directory = locate(args.checkpoint).on_disk() if args.stock or args.verify else Path()
    if args.stock:
        said = {library: why_not_opened(library, directory)[0] for library in found.opens}
        found.fails_without_plugin = said
    if args.verify:
        found.verified = verify(directory, bytes_bar)
        found.problems += found.verified.problems
    is_sound = not found.problems
    return Answer({**vars(found), "is_sound": is_sound}, lines_of(found), is_sound)


def inspect(path_or_repository: str | Path) -> Inspection:
    """Inspect a checkpoint on disk, or one on the Hub without downloading its weights.

    Raises:
        OSError: neither a directory, nor a repository in the cache or on the Hub.
        ValueError: not a MiniMax-M3 checkpoint.
    """
    source = open_source(path_or_repository)
    headers, config, problems = source.headers, None, [*source.headers.problems]
    try:
        config = read_text_config(source.config)
    except ValueError as error:
        problems.insert(0, str(error))
    layout = recognise_layout(headers.tensors, config)
    found = Inspection(
        name=source.name,
        model_type=source.config["model_type"],
        files=len(headers.files),
        tensors=len(headers.tensors),
        bytes=headers.nbytes,
        layout=layout,
        dtypes=dtype_histogram(headers),
        vision=layout.vision,
        model=None if config is None else model_name(config),
        efforts=[*EFFORTS] if takes_effort(source.chat_template or "") else [],
        draft=draft_in_words(source.draft_folders, headers.tensors),
        drafter=None,
        parameters=None,
        components=None,
        precisions=[],
        attention=None,
        opens={"mlx-lm": False, "mlx-vlm": False},
        wrong_without_plugin={},
        fails_without_plugin=None,
        memory=None,
        commands=[],
        notes=_notes(source),
        problems=problems,
        verified=None,
    )
    try:
        if source.folder is not None and DRAFT_FOLDER in source.draft_folders:
            head = open_draft_head(source.folder / DRAFT_FOLDER)
            found.drafter = SimpleNamespace(
                bytes=head.nbytes, block=head.block, target_layers=head.target_layers
            )
    except (OSError, ValueError) as error:
        problems.append(str(error))
    if config is not None:
        try:
            checkpoint = read_checkpoint(source, config)
        except ValueError as error:
            problems.append(str(error))
        else:
            _inspect_tensors(found, checkpoint)
    problems += source.problems + _tokenizer_problems(source)
    if source.model is None:
        found.notes.append(
            "the stock commands take only the main revision by name: for this one, give them the directory "
            "that `hf download` prints"
        )
    else:
        found.commands = stock_commands(
            source.model,
            mlx_lm=found.opens["mlx-lm"],
            mlx_vlm=found.opens["mlx-vlm"] and found.vision,
            model_name=found.model or M3,
            takes_effort=bool(found.efforts),
        )
    return found


def _notes(source: Source) -> list[str]:
    headers, notes = source.headers, unused_in_words(source.headers.tensors)
    others = (folder for folder in source.draft_folders if folder != DRAFT_FOLDER)
    notes += [f"{folder}/ holds a draft head, which is not used" for folder in others]
    if headers.unlisted:
        files = ", ".join(shorten(headers.unlisted, 3))
        notes.append(f"{INDEX} does not list {files}: mlx-lm loads what is in there, mlx-vlm does not")
    # What is wrong with the config is reported where it is read.
    with suppress(ValueError):
        if uncut := uncut_lists(source.config):
            more = f"the config describes more layers than num_hidden_layers: of {', '.join(uncut)}"
            notes.append(f"{more}, the first entries count")
    return notes


def _inspect_tensors(found: Inspection, checkpoint: Checkpoint) -> None:
    headers, config, with_indexer = checkpoint.headers, checkpoint.text_config, checkpoint.with_indexer
    found.components, found.precisions = measure(checkpoint.plan, checkpoint.quantized, headers)
    found.parameters = sum(component.parameters for component in found.components)
    found.attention = _attention(config, with_indexer)
    found.wrong_without_plugin = wrong_past_the_budget(config, bool(with_indexer))
    weights = sum(part.bytes for part in found.components if part.name not in NOT_IN_THE_TEXT_MODEL)
    found.memory = memory_for(config, weights, len(with_indexer), machine_memory())
    if not with_indexer:
        has_sparse_layers = "minimax_m3_sparse" in config.layer_types
        why = "the checkpoint has no indexer" if has_sparse_layers else "the config has no sparse layers"
        found.notes.append(
            f"{why}: every layer attends to all tokens, which differs from MiniMax-M3's training past "
            f"{config.budget:,} tokens"
        )
    unread = dtypes_not_read(headers)
    found.problems += checkpoint.of_quantization + ([unread] if unread else [])
    if headers.problems:
        # Tensors of damaged files would only be reported twice.
        return
    found.problems += checkpoint.of_text + checkpoint.of_vision
    text_is_whole = not (checkpoint.of_text or checkpoint.of_quantization)
    found.opens = {
        "mlx-lm": text_is_whole and not unread,
        # It reads such dtypes by itself.
        "mlx-vlm": text_is_whole and not checkpoint.of_vision,
    }


def _attention(config: TextConfig, with_indexer: list[int]) -> SimpleNamespace:
    """Which layers select blocks of keys, and the context length.

    Returns:
        layers: how many there are.  with_indexer: the numbers of the layers that select blocks.
        budget: tokens that a query of such a layer attends to, ``blocks`` of ``block_size``.
        initial, local: how many of these blocks are always the first ones, and those up to the query.
        context: the most tokens that the model supports.
        yarn: the config's YaRN entry, if any.
    """
    rope = config.rope_parameters
    return SimpleNamespace(
        layers=config.num_hidden_layers,
        with_indexer=with_indexer,
        budget=config.budget,
        blocks=config.index_topk_blocks,
        block_size=config.index_block_size,
        initial=config.index_init_blocks,
        local=config.index_local_blocks,
        context=config.max_position_embeddings,
        yarn=dict(rope) if "yarn" in (rope.get("rope_type"), rope.get("type")) else None,
    )


def _tokenizer_problems(source: Source) -> list[str]:
    problems = []
    if source.tokenizer_config is None:
        problems.append("tokenizer_config.json is missing: the model cannot run without a tokenizer")
    elif source.tokenizer_config.get("tool_parser_type") == "json_tools":
        problems.append(
            "tokenizer_config.json: tool_parser_type is json_tools, with which M3's tool calls are lost; "
            "remove the entry (an older mlx-lm wrote it)"
        )
    if source.chat_template is None:
        problems.append(f"no chat template: there is neither {' nor '.join(CHAT_TEMPLATE_FILES)}")
    elif "<mm:think>" not in source.chat_template:
        problems.append("the chat template is not MiniMax-M3's: it has no <mm:think>")
    return problems


# --- as text ---


def lines_of(found: Inspection) -> list[str]:
    lines = [found.name]
    for label, fact in _facts(found).items():
        lines += _wrap(fact, initial_indent=f"  {label:14}", subsequent_indent=" " * 16)
    if found.components:
        rows = [
            (part.name, part.parameters, part.bytes, ", ".join(part.stored_as).replace("affine ", ""))
            for part in found.components
        ]
        lines += ["", *component_table(rows, _COLUMNS)]
    sections = {"Memory": [], "Notes": found.notes, "Checksums": []}
    if found.memory is not None:
        sections["Memory"] = memory_lines(found.memory) + _experts_on_disk()
    if (verified := found.verified) is not None:
        result = "they differ, see the problems" if verified.problems else "all match"
        read = f"{_files(verified.files)}, {size_in_words(verified.bytes)}, read and compared"
        sections["Checksums"] = [f"{read}: {result}"]
    sections["Problems"] = shorten(found.problems, _MOST_PROBLEMS) or ["none"]
    for title, entries in sections.items():
        lines += ["", title, *_indented(entries)] if entries else []
    if found.commands:
        why = _indented(why_these_options(bool(found.efforts)))
        lines += ["", "To run it", *map(_command, found.commands), *why]
    return lines


def _facts(found: Inspection) -> dict[str, str]:
    """Label -> what it is, in words."""
    stored = (f"{d.dtype} {d.tensors:,} tensors, {size_in_words(d.bytes)}" for d in found.dtypes)
    size = f"{found.bytes:,} bytes ({size_in_words(found.bytes)})"
    facts = {
        "model": found.model or "unknown",
        "model type": found.model_type,
        "layout": "; ".join(found.layout.in_words()),
        "opens in": _opens(found.opens),
        **_without_plugin(found),
        "stored as": "; ".join(stored),
        "size": f"{found.tensors:,} tensors in {_files(found.files)}, {size}",
        "quantization": _quantization(found),
        "vision": "yes" if found.vision else "none",
    }
    if found.attention is not None:
        facts |= _attention_in_words(found.attention)
    if found.efforts:
        facts["effort"] = f"{', '.join(found.efforts)} (reasoning_effort of the chat template)"
    if (drafter := found.drafter) is not None:
        layers = ", ".join(map(str, drafter.target_layers))
        facts["draft head"] = (
            f"{DRAFT_FOLDER}/, for mlx-vlm's --draft-model: {size_in_words(drafter.bytes)}, up to "
            f"{tokens_in_words(drafter.block)} a round, after layers {layers}"
        )
    elif found.draft is not None:
        is_used = f"{DRAFT_FOLDER}/" in found.draft
        facts["draft head"] = f"{found.draft}, " + ("for mlx-vlm's --draft-model" if is_used else "not used")
    return facts


def _opens(opens: dict[str, bool]) -> str:
    yes, no = (" and ".join(name for name in opens if opens[name] == answer) for answer in (True, False))
    parts = [f"{yes}, with this plugin"] if yes else []
    parts += [f"not in {no}: see the problems below"] if no else []
    return "; ".join(parts)


def _without_plugin(found: Inspection) -> dict[str, str]:
    fails, wrong = found.fails_without_plugin, found.wrong_without_plugin
    not_right = f"not right past {found.attention.budget:,} tokens" if wrong else ""
    if fails is None:
        libraries = " and ".join(f"{library} ({why})" for library, why in wrong.items())
        said = f"{not_right} without the plugin, where it opens: {libraries}"
        return {"without it": said} if wrong else {}
    verdicts = {}
    for library, why in fails.items():
        verdict = f"opens, {not_right} ({wrong[library]})" if library in wrong else "opens"
        if why:
            verdict = f"does not open ({textwrap.shorten(why, _COLUMNS // 2, placeholder=' ...')})"
        verdicts[f"{library} alone"] = verdict
    return verdicts


def _files(count: int) -> str:
    return f"{count:,} {'file' if count == 1 else 'files'}"


def _quantization(found: Inspection) -> str:
    if found.components is None:
        parts = found.layout.foreign_parts
        return f"unknown ({', '.join(parts)})" if parts else "unknown"
    quantized, floats = (
        ", ".join(
            f"{p} {_count(p.parameters)}" for p in found.precisions if (p.group_size is None) == is_float
        )
        for is_float in (False, True)
    )
    return f"{quantized}; not quantized: {floats}" if quantized else f"none: {floats}"


def _attention_in_words(attention: SimpleNamespace) -> dict[str, str]:
    sparse, layers = attention.with_indexer, attention.layers
    indexer = f"{len(sparse)} of {layers} layers" + (f" ({', '.join(ranges_of(sparse))})" if sparse else "")
    budget = f"{attention.budget:,} tokens, {attention.blocks} blocks of {attention.block_size}"
    budget += f", always {attention.initial} initial and {attention.local} local" if attention.initial else ""
    context = f"{attention.context:,} tokens"
    if attention.yarn is not None:
        factor, original = map(attention.yarn.get, ("factor", "original_max_position_embeddings"))
        context += f", by YaRN ({factor} x {original})"
    return {"indexer": indexer, "block budget": budget, "context": context}


def memory_lines(memory: Memory) -> list[str]:
    kv_8 = "--kv-bits 8" + ("" if memory.kv_group_size == 64 else f" --kv-group-size {memory.kv_group_size}")
    lines = [f"context costs {memory.per_token:,} bytes per token, {memory.per_token_kv_8:,} with {kv_8}"]
    if memory.machine is None:
        return lines
    here = f"{size_in_words(memory.weights)} of weights, {size_in_words(memory.machine)} of memory here"
    if not memory.context_kv_8:
        return [*lines, f"does not fit this machine: {here}"]
    lines.append(
        f"{here}, {size_in_words(memory.reserve)} of it reserved for the system: "
        f"{memory.context:,} tokens fit, {memory.context_kv_8:,} with {kv_8}"
    )
    if is_mac() and memory.wired_limit_mb is not None:
        lines.append(
            f"to let the GPU use that much: sudo sysctl iogpu.wired_limit_mb={memory.wired_limit_mb}"
        )
    return lines


def _experts_on_disk() -> list[str]:
    memory = checked("expert_memory")
    size = memory if isinstance(memory, str) else size_in_words(memory)
    return [f"{EXPERT_MEMORY} is set ({size}): routed experts that do not fit stay on disk"] if memory else []


def _command(command: str) -> str:
    """On two lines if one is too long, still ready to paste."""
    line = f"  {command}"
    return line if len(line) <= _COLUMNS else line.replace(" --max-tokens", " \\\n    --max-tokens")


def _count(count: int) -> str:
    return next(
        (f"{count / n:,.3f} {unit}" for n, unit in ((10**9, "B"), (10**6, "M")) if count >= n), f"{count:,}"
    )


def _indented(entries: Iterable[str]) -> list[str]:
    each = (_wrap(entry, initial_indent="  ", subsequent_indent="    ") for entry in entries)
    return list(chain.from_iterable(each))
