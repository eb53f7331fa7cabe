"""Recipes: small TOML files that say how each part of a converted M3 is stored.

    summary = "4 bits, and 8 in the router"

    [default]
    bits = 4
    group_size = 64

    [[rule]]
    parts = ["router"]
    bits = 8
    group_size = 64

The last rule that fits a matrix decides.  ``docs/recipes.md`` explains every key.
"""

import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from ...model.config import TextConfig
from ...weights.names import layer_of
from ...weights.quantization import AFFINE_BITS, AFFINE_GROUP_SIZES, MICROSCALING
from ..common import did_you_mean, read_text
from ..parameters import component_of, text_shapes
from ..precision import Quantization

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# Mode -> bits and group sizes.
_MODES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "affine": (AFFINE_BITS, AFFINE_GROUP_SIZES),
    **{mode: ((bits,), (group_size,)) for mode, (bits, group_size) in MICROSCALING.items()},
}
_AFFINE_GROUP_SIZE = 64
_DTYPES = ("bfloat16", "float16", "float32", "keep")
_PLAN_KEYS = {"method", "base_bits", "target_bpw", "cap_bpw", "raise_down_proj", "raise_experts_to"}

# A part's name in recipes -> its name in ``mlx-m3 inspect``, and its projections.
_MLP = ("gate_proj", "up_proj", "down_proj")
_PARTS = {
    "embeddings": ("embeddings", ()),
    "lm_head": ("lm_head", ()),
    "attention": ("attention", ("q_proj", "k_proj", "v_proj", "o_proj")),
    "indexer": ("indexer", ("index_q_proj", "index_k_proj")),
    "router": ("router", ()),
    "dense_mlp": ("dense MLP", _MLP),
    "experts": ("routed experts", _MLP),
    "shared_expert": ("shared expert", _MLP),
}
_PART_OF_COMPONENT = {component: part for part, (component, _) in _PARTS.items()}
# The tower, the projector and the patch merge, which are never quantized.
VISION = "vision"
PARTS = (
    *_PARTS,
    *(f"{part}.{projection}" for part, (_, projections) in _PARTS.items() for projection in projections),
    VISION,
)


class RecipeError(ValueError):
    """A recipe that cannot be followed; the message names its file."""


# --- the matrices that recipes are about ---


@dataclass(frozen=True)
class Matrix:
    """A weight of the text model that may be quantized; for routed experts all of a layer's.

    Attributes:
        module: path of its module, published and without a prefix.
        part: a recipe's name for where it belongs.  layer: None outside of the layers.
        experts: how many; 0 for a matrix without an expert axis.
        outputs, inputs: the shape of one.
    """

    module: str
    part: str
    layer: int | None
    experts: int
    outputs: int
    inputs: int

    @property
    def size(self) -> int:
        return max(self.experts, 1) * self.outputs * self.inputs

    @property
    def projection(self) -> str:
        return self.module.rpartition(".")[2]

    def is_one_of(self, parts: Iterable[str]) -> bool:
        return any(part in (self.part, f"{self.part}.{self.projection}") for part in parts)


def matrices_of(config: TextConfig, *, indexers: bool = True) -> list[Matrix]:
    """All of them, in the order of a forward pass."""
    found = []
    for name, shape in text_shapes(config, indexers=indexers).items():
        module = name.removesuffix(".weight")
        part = _PART_OF_COMPONENT.get(component_of(name))
        if module != name and len(shape) > 1 and part is not None:
            *experts, outputs, inputs = shape
            found.append(Matrix(module, part, layer_of(name), sum(experts), outputs, inputs))
    return found


# --- recipes ---


@dataclass(frozen=True)
class Rule:
    """``parts`` of the model, on some ``layers`` or (None) on all, are stored like ``spec``."""

    parts: tuple[str, ...]
    layers: frozenset[int] | None
    spec: Quantization

    def fits(self, matrix: Matrix) -> bool:
        return matrix.is_one_of(self.parts) and (self.layers is None or matrix.layer in self.layers)


@dataclass(frozen=True)
class Recipe:
    """What a recipe's file says.

    Attributes:
        bit_targets: the table ``[plan]``; where there is one, :mod:`.allocation` sets the bits.
        text: the file's content.
    """

    name: str
    summary: str
    default: Quantization
    rules: tuple[Rule, ...] = ()
    bit_targets: Mapping[str, Any] = field(default_factory=dict)
    text: str = ""

    def spec(self, matrix: Matrix) -> Quantization:
        chosen = next((rule.spec for rule in reversed(self.rules) if rule.fits(matrix)), self.default)
        if chosen.bits is not None and matrix.inputs % chosen.group_size:
            raise RecipeError(
                f"{self.name}: {matrix.module} has {matrix.inputs} inputs, which is not a multiple of the "
                f"group size {chosen.group_size}; choose another group_size"
            )
        return chosen


def recipe_names() -> list[str]:
    return sorted(_built_in())


@cache
def _built_in() -> dict[str, str]:
    """Name -> TOML of the recipes that come with the package."""
    folder = Path(__file__).with_name("recipes")
    texts = {file.stem: file.read_text(encoding="utf-8") for file in folder.glob("*.toml")}
    oq = tomllib.loads(texts.pop("oq"))
    for name, level in oq["levels"].items():
        lines = "\n".join(f"{key} = {json.dumps(value)}" for key, value in level.items())
        texts[name] = oq["template"].format(**level, level=lines)
    return texts


def load_recipe(name_or_path: str, config: TextConfig) -> Recipe:
    """A recipe that comes with the package, by its name, or one in a file, for a model of this config."""
    if name_or_path in _built_in():
        return parse_recipe(name_or_path, _built_in()[name_or_path], config)
    path = Path(name_or_path).expanduser()
    if not path.is_file():
        names = recipe_names()
        meant = did_you_mean(name_or_path, names)
        raise RecipeError(f"no recipe {name_or_path}{meant}: give a file, or one of {', '.join(names)}")
    return parse_recipe(path.stem, read_text(path), config, file=path)


def parse_recipe(name: str, text: str, config: TextConfig, file: Path | None = None) -> Recipe:
    """``file``: where ``text`` is from, for errors to name."""
    where = name if file is None else str(file)
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{where}: not valid TOML ({error})") from None
    _check_keys(where, content, {"summary", "default", "rule", "plan"})
    if not isinstance(content.get("default"), dict):
        raise RecipeError(f"{where}: the table [default] is missing; it says how most matrices are stored")
    rules, bit_targets = content.get("rule", []), content.get("plan", {})
    if not isinstance(rules, list) or not all(isinstance(rule, dict) for rule in rules):
        raise RecipeError(f"{where}: write each rule as [[rule]]")
    if not isinstance(bit_targets, dict):
        raise RecipeError(f"{where}: write the plan as a table, [plan]")
    _check_keys(f"{where}: [plan]", bit_targets, _PLAN_KEYS)
    return Recipe(
        name,
        str(content.get("summary", "")),
        _spec(f"{where}: [default]", content["default"]),
        tuple(_rule(f"{where}: rule {n}", rule, config) for n, rule in enumerate(rules, 1)),
        bit_targets,
        text,
    )


def _rule(where: str, content: dict[str, Any], config: TextConfig) -> Rule:
    parts = content.pop("parts", None)
    if not isinstance(parts, list) or not parts:
        raise RecipeError(f'{where}: parts are missing; write parts = ["attention", "experts.down_proj"]')
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        given = ", ".join(map(str, unknown)) + did_you_mean(str(unknown[0]), PARTS)
        raise RecipeError(f"{where}: unknown part {given}; the parts are {', '.join(PARTS)}")
    layers = content.pop("layers", None)
    spec = _spec(where, content)
    if spec.bits is not None and VISION in parts:
        raise RecipeError(f"{where}: the vision tower cannot be quantized; give it a dtype instead")
    return Rule(tuple(parts), None if layers is None else _layers(where, layers, config), spec)


def _layers(where: str, entries: Any, config: TextConfig) -> frozenset[int]:
    """``[0, 1, "3-57", -1]``: numbers, inclusive ranges, and numbers from the end."""
    count = config.num_hidden_layers
    chosen: set[int] = set()
    for entry in entries if isinstance(entries, list) else [entries]:
        try:
            first, _, last = entry.partition("-") if isinstance(entry, str) else (entry, "", "")
            numbers = range(int(first), int(last or first) + 1)
        except (ValueError, TypeError):
            raise RecipeError(f'{where}: invalid layer {entry!r}; write 3, -1 or "3-57"') from None
        if not numbers or not all(-count <= number < count for number in numbers):
            raise RecipeError(f"{where}: the model has {count} layers, and {entry} is not among them")
        chosen |= {number % count for number in numbers}
    return frozenset(chosen)


def _spec(where: str, content: dict[str, Any]) -> Quantization:
    _check_keys(where, content, {"bits", "group_size", "mode", "dtype"})
    if "dtype" in content:
        if content["dtype"] not in _DTYPES or len(content) > 1:
            raise RecipeError(f"{where}: dtype must be one of {', '.join(_DTYPES)}, without other keys")
        return Quantization(dtype=content["dtype"])
    mode = content.get("mode", "affine")
    if not isinstance(mode, str) or mode not in _MODES:
        raise RecipeError(f"{where}: mode must be one of {', '.join(_MODES)}, not {mode!r}")
    all_bits, group_sizes = _MODES[mode]
    bits = content.get("bits", all_bits[0] if len(all_bits) == 1 else None)
    group_size = content.get("group_size", _AFFINE_GROUP_SIZE if mode == "affine" else group_sizes[0])
    for key, value, known in (("bits", bits, all_bits), ("group_size", group_size, group_sizes)):
        if type(value) is not int or value not in known:
            raise RecipeError(
                f"{where}: {key} of {mode} must be {' or '.join(map(str, known))}, not {value!r}"
            )
    return Quantization(bits, group_size, mode)


def _check_keys(where: str, content: Mapping[str, Any], known: set[str]) -> None:
    unknown = sorted(content.keys() - known)
    if unknown:
        meant = did_you_mean(unknown[0], known)
        raise RecipeError(
            f"{where}: unknown key {', '.join(unknown)}{meant}; the keys are {', '.join(sorted(known))}"
        )
