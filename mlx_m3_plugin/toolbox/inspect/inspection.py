"""What a checkpoint is, what is wrong with it, and how to run it: from headers and settings alone.

No tensor is read, so a checkpoint of 850 GB takes about a second.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ...model.config import TextConfig, text_config_of
from ...weights import lacks_indexers, plan_layout
from ...weights.names import TEXT_PREFIX, is_vision
from ..checkpoint import CHAT_TEMPLATE_FILES
from ..checksums import Verification, Watch, verify
from ..machine import machine_memory
from ..parameters import OTHER, Shapes, differences, text_shapes, vision_shapes
from . import running
from .describe import Component, Layout, Precision, StoredDtype, dtype_histogram, measure, recognise_layout
from .readers import Features, Reader, packs_shared_expert, who_opens
from .source import Source, open_source

# Components that mlx-lm leaves on disk.
_NOT_LOADED = ("vision tower", "projector", "patch merge", OTHER)


@dataclass(frozen=True)
class Attention:
    """Which layers choose blocks of keys, and how far any of them can look.

    Attributes:
        layers: how many there are.  with_indexer: the numbers of those that choose blocks.
        budget: tokens that a query of such a layer attends to, ``blocks`` of ``block_size``.
        context: tokens that the model knows.
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
    """Everything ``mlx-m3 inspect`` knows.

    Attributes:
        components: None when the config or a format leaves unclear what the tensors are; so are
            ``parameters``, ``attention`` and ``memory``.
        notes: what to know before using it.  problems: what is wrong with it, one line each.
        verified: None unless its files were compared with their checksums.
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
    attention: Attention | None = None
    readers: list[Reader] = field(default_factory=list)
    memory: running.Memory | None = None
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
        """Read all shards in ``directory``, and add those that differ from their checksums to the problems.

        Raises:
            ValueError: there are no checksums.
        """
        self.verified = verify(directory, watch)
        self.problems += self.verified.problems


def inspect(path_or_repository: str | Path) -> Inspection:
    """Look at a checkpoint on disk, or at one on the Hub without downloading its weights.

    Raises:
        OSError: it is neither a directory, nor a repository in the cache or on the Hub.
        ValueError: it is no MiniMax-M3 checkpoint.
    """
    return inspect_source(open_source(path_or_repository))


def inspect_source(source: Source) -> Inspection:
    """The same of one whose headers are there already."""
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
    features = None if config is None else _look_inside(found, source, config)
    found.problems += source.problems + _tokenizer_problems(source)
    found.readers = who_opens(source.config["model_type"], features)
    opens = {r.library: r.with_plugin.opens or r.without_plugin.opens for r in found.readers}
    if source.model is None:
        found.notes.append("the stock commands take a directory of it: the one that `hf download` prints")
    else:
        found.commands = running.commands(
            source.model, mlx_lm=opens["mlx-lm"], mlx_vlm=opens["mlx-vlm"] and found.vision
        )
    return found


def _read_text_config(config: Mapping[str, Any]) -> tuple[TextConfig | None, list[str]]:
    try:
        # Of the checkpoint, not of the environment.
        return text_config_of(config), []
    except ValueError as error:
        return None, [f"config.json: {str(error).removeprefix('config: ')}"]


def _look_inside(found: Inspection, source: Source, config: TextConfig) -> Features:
    """Fill in what takes a config to know."""
    headers = source.headers
    features = Features(
        layout=found.layout,
        config=source.config,
        has_sparse_layers="minimax_m3_sparse" in config.layer_types,
        packs_shared_expert=packs_shared_expert(config, source.config),
        all_files_named_model=all(file.startswith("model") for file in headers.files),
        files_are_whole=not headers.problems,
    )
    try:
        plan = plan_layout(headers.tensors, config, "", vision=True)
    except ValueError as error:
        found.problems.append(str(error))
        return replace(features, has_plan=False)
    indexers = not lacks_indexers(plan, config)
    text, vision = text_shapes(config, indexers=indexers), _vision_shapes(found, source.config)
    contents = measure(plan, text | vision, headers)
    found.components, found.precisions = contents.components, contents.precisions
    found.parameters = sum(component.parameters for component in contents.components)
    found.attention = _attention(config, indexers)
    found.memory = running.memory_for(
        config,
        sum(component.bytes for component in contents.components if component.name not in _NOT_LOADED),
        len(found.attention.with_indexer),
        machine_memory(),
    )
    found.notes += _notes(found, config)
    found.problems += contents.problems
    if headers.problems:
        # What is not in damaged files would only be told twice.
        return features
    prefix = TEXT_PREFIX if source.config["model_type"] == "minimax_m3_vl" else ""
    in_text = differences(
        {n: t for n, t in plan.items() if not is_vision(n)}, text, contents.quantized, prefix
    )
    in_vision = differences({n: t for n, t in plan.items() if is_vision(n)}, vision, contents.quantized)
    found.problems += in_text + in_vision
    return replace(features, text_is_whole=not (in_text or contents.problems), vision_is_whole=not in_vision)


def _vision_shapes(found: Inspection, config: Mapping[str, Any]) -> Shapes:
    if not found.vision:
        return {}
    try:
        return vision_shapes(config)
    except ValueError as error:
        found.problems.append(str(error))
        return {}


def _attention(config: TextConfig, indexers: bool) -> Attention:
    layers = range(config.num_hidden_layers)
    rope = config.rope_parameters
    is_yarn = "yarn" in (rope.get("rope_type"), rope.get("type"))
    return Attention(
        layers=config.num_hidden_layers,
        with_indexer=[layer for layer in layers if indexers and config.is_sparse_attention(layer)],
        budget=config.budget,
        blocks=config.index_topk_blocks,
        block_size=config.index_block_size,
        context=config.max_position_embeddings,
        yarn=dict(rope) if is_yarn else None,
    )


def _notes(found: Inspection, config: TextConfig) -> list[str]:
    notes = []
    if found.attention is not None and not found.attention.with_indexer:
        why = (
            "no indexer here"
            if "minimax_m3_sparse" in config.layer_types
            else "no sparse layers in its config"
        )
        notes.append(
            f"{why}: every layer attends to everything, which past {config.budget:,} tokens is not "
            "what MiniMax-M3 was trained with"
        )
    return notes


def _tokenizer_problems(source: Source) -> list[str]:
    problems = []
    if source.tokenizer_config is None:
        problems.append("tokenizer_config.json is absent: there is no tokenizer to run it with")
    elif source.tokenizer_config.get("tool_parser_type") == "json_tools":
        problems.append(
            "tokenizer_config.json: tool_parser_type is json_tools, which drops M3's tool calls; "
            "remove that entry, which an older mlx-lm has written"
        )
    if source.chat_template is None:
        problems.append(f"no chat template: neither {' nor '.join(CHAT_TEMPLATE_FILES)} is there")
    elif "<mm:think>" not in source.chat_template:
        problems.append("the chat template is not MiniMax-M3's: it has no <mm:think>")
    return problems
