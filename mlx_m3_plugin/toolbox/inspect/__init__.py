"""``mlx-m3 inspect``: what a checkpoint is, what is wrong with it, and how to run it.

Reads headers and settings alone, so a checkpoint of 850 GB takes about a second.
"""

import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ...model.config import TextConfig, text_config_of
from ...weights import lacks_indexers, plan_layout
from ...weights.names import TEXT_PREFIX, is_vision
from ..checksums import Verification, Watch, verify
from ..memory import Memory, machine_memory, memory_for
from ..parameters import (
    NOT_IN_THE_TEXT_MODEL,
    Shapes,
    differences,
    quantized_modules,
    text_shapes,
    vision_shapes,
)
from ..source import CHAT_TEMPLATE_FILES, Source, open_source
from .layout import Component, Layout, Precision, StoredDtype, dtype_histogram, measure, recognise_layout

__all__ = ["Inspection", "inspect", "inspect_source"]

_MAX_TOKENS = "--max-tokens 4096"
_SAMPLING = "--temp 1.0 --top-p 0.95"


@dataclass(frozen=True)
class AttentionSummary:
    """Which layers select blocks of keys, and the context length.

    Attributes:
        layers: how many there are.  with_indexer: the numbers of the layers that select blocks.
        budget: tokens that a query of such a layer attends to, ``blocks`` of ``block_size``.
        context: the most tokens that the model supports.
        yarn: the config's YaRN entry, if any.
    """

    layers: int
    with_indexer: list[int]
    budget: int
    blocks: int
    block_size: int
    context: int
    yarn: dict[str, Any] | None


@dataclass
class Inspection:
    """The result of ``mlx-m3 inspect``.

    Attributes:
        components: None if the config or a format is not understood; then ``parameters``,
            ``attention`` and ``memory`` are None as well.
        opens: ``mlx-lm`` and ``mlx-vlm`` -> whether it opens there with this plugin.
        notes: what to know before using it.  problems: what is wrong with it, one line each.
        verified: None unless the files were compared with their checksums.
    """

    name: str
    model_type: str
    files: int
    tensors: int
    bytes: int
    layout: Layout
    dtypes: list[StoredDtype]
    vision: bool
    parameters: int | None = None
    components: list[Component] | None = None
    precisions: list[Precision] = field(default_factory=list)
    attention: AttentionSummary | None = None
    opens: dict[str, bool] = field(default_factory=lambda: {"mlx-lm": False, "mlx-vlm": False})
    memory: Memory | None = None
    commands: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    verified: Verification | None = None

    @property
    def is_sound(self) -> bool:
        return not self.problems

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "is_sound": self.is_sound}

    def verify(self, directory: Path, watch: Watch) -> None:
        """Read all shards in ``directory``, and add those that differ from their checksums to ``problems``.

        Raises:
            ValueError: there are no checksums.
        """
        self.verified = verify(directory, watch)
        self.problems += self.verified.problems


def inspect(path_or_repository: str | Path) -> Inspection:
    """Inspect a checkpoint on disk, or one on the Hub without downloading its weights.

    Raises:
        OSError: neither a directory, nor a repository in the cache or on the Hub.
        ValueError: not a MiniMax-M3 checkpoint.
    """
    return inspect_source(open_source(path_or_repository))


def inspect_source(source: Source) -> Inspection:
    """:func:`inspect` for a checkpoint whose headers are already read."""
    headers = source.headers
    config, config_problems = _read_text_config(source.config)
    layout = recognise_layout(headers.tensors, config)
    found = Inspection(
        name=source.name,
        model_type=source.config["model_type"],
        files=len(headers.files),
        tensors=len(headers.tensors),
        bytes=sum(tensor.nbytes for tensor in headers.tensors.values()),
        layout=layout,
        dtypes=dtype_histogram(headers),
        vision=layout.vision,
        problems=[*config_problems, *headers.problems],
    )
    if config is not None:
        _inspect_tensors(found, source, config)
    found.problems += source.problems + _tokenizer_problems(source)
    if source.model is None:
        found.notes.append(
            "the stock commands take only the main revision by name: for this one, give them the directory "
            "that `hf download` prints"
        )
    else:
        found.commands = stock_commands(
            source.model, mlx_lm=found.opens["mlx-lm"], mlx_vlm=found.opens["mlx-vlm"] and found.vision
        )
    return found


def _read_text_config(config: Mapping[str, Any]) -> tuple[TextConfig | None, list[str]]:
    try:
        # As the checkpoint says, without environment variables.
        return text_config_of(config), []
    except ValueError as error:
        return None, [f"config.json: {str(error).removeprefix('config: ')}"]


def _inspect_tensors(found: Inspection, source: Source, config: TextConfig) -> None:
    """Add what takes a config to know."""
    headers = source.headers
    try:
        plan = plan_layout(headers.tensors, config, "", vision=True)
        indexers = not lacks_indexers(plan, config)
        text = text_shapes(config, indexers=indexers)
    except ValueError as error:
        found.problems.append(str(error))
        return
    vision = _vision_shapes(found, source.config)
    quantized, problems = quantized_modules(plan, text | vision)
    found.components, found.precisions = measure(plan, quantized, headers)
    found.parameters = sum(component.parameters for component in found.components)
    found.attention = _attention(config, indexers)
    found.memory = memory_for(
        config,
        sum(part.bytes for part in found.components if part.name not in NOT_IN_THE_TEXT_MODEL),
        len(found.attention.with_indexer),
        machine_memory(),
    )
    found.notes += _notes(found.attention, config)
    found.problems += problems
    if headers.problems:
        # Tensors of damaged files would only be reported twice.
        return
    prefix = TEXT_PREFIX if source.config["model_type"] == "minimax_m3_vl" else ""
    in_text = differences({n: t for n, t in plan.items() if not is_vision(n)}, text, quantized, prefix)
    in_vision = differences({n: t for n, t in plan.items() if is_vision(n)}, vision, quantized)
    found.problems += in_text + in_vision
    text_is_whole = not (in_text or problems)
    found.opens = {"mlx-lm": text_is_whole, "mlx-vlm": text_is_whole and not in_vision}


def _vision_shapes(found: Inspection, config: Mapping[str, Any]) -> Shapes:
    if not found.vision:
        return {}
    try:
        return vision_shapes(config)
    except ValueError as error:
        found.problems.append(str(error))
        return {}


def _attention(config: TextConfig, indexers: bool) -> AttentionSummary:
    layers = range(config.num_hidden_layers)
    rope = config.rope_parameters
    is_yarn = "yarn" in (rope.get("rope_type"), rope.get("type"))
    return AttentionSummary(
        layers=config.num_hidden_layers,
        with_indexer=[layer for layer in layers if indexers and config.is_sparse_attention(layer)],
        budget=config.budget,
        blocks=config.index_topk_blocks,
        block_size=config.index_block_size,
        context=config.max_position_embeddings,
        yarn=dict(rope) if is_yarn else None,
    )


def _notes(attention: AttentionSummary, config: TextConfig) -> list[str]:
    if attention.with_indexer:
        return []
    has_sparse_layers = "minimax_m3_sparse" in config.layer_types
    why = "the checkpoint has no indexer" if has_sparse_layers else "the config has no sparse layers"
    return [
        f"{why}: every layer attends to all tokens, which differs from MiniMax-M3's training past "
        f"{config.budget:,} tokens"
    ]


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


# --- how to run it ---


def stock_commands(name: str, *, mlx_lm: bool, mlx_vlm: bool) -> list[str]:
    """Stock command lines of these libraries, with M3's recommended sampling, ready to paste."""
    model = f"--model {shlex.quote(name)}"
    lines = []
    if mlx_lm:
        lines += [
            f'mlx_lm.generate {model} --prompt "Hello" {_MAX_TOKENS} {_SAMPLING} --top-k 40',
            # It has no --top-k.
            f"mlx_lm.chat {model} {_MAX_TOKENS} {_SAMPLING}",
            f"mlx_lm.server {model} {_MAX_TOKENS} {_SAMPLING} --top-k 40",
        ]
    if mlx_vlm:
        sampling = _SAMPLING.replace("--temp ", "--temperature ") + " --top-k 40"
        if _is_before("mlx-vlm", (0, 7)):
            # mlx-vlm < 0.7 takes the others from generation_config.json only.
            sampling = "--temperature 1.0"
        question = '--image photo.jpg --prompt "What is this?"'
        lines.append(f"mlx_vlm.generate {model} {question} {_MAX_TOKENS} {sampling}")
    return lines


def _is_before(package: str, release: tuple[int, int]) -> bool:
    """Whether an older one is installed."""
    try:
        installed = version(package).split(".")
    except PackageNotFoundError:
        return False
    return tuple(int(part) for part in installed[:2]) < release
