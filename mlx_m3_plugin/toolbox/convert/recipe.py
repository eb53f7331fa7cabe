"""Recipes: small TOML files that say how each part of a converted M3 is stored.

    summary = "4 bits, and 8 in the router"

    [default]
    bits = 4
    group_size = 64

    [[rule]]
    parts = ["router"]
    bits = 8
    group_size = 64

Of several rules that fit a matrix, the last one decides.  ``docs/recipes.md`` tells the words.
"""

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from ...model.config import TextConfig
from ..precision import Quantization
from ..suggestions import did_you_mean
from ..text_files import read_text
from .matrices import PARTS, Matrix

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_GROUP_SIZES = {"affine": 64, "mxfp8": 32, "mxfp4": 32, "nvfp4": 16}
_BITS = {"affine": (2, 3, 4, 5, 6, 8), "mxfp8": (8,), "mxfp4": (4,), "nvfp4": (4,)}
_AFFINE_GROUP_SIZES = (32, 64, 128)
_DTYPES = ("bfloat16", "float16", "float32", "keep")
_PLAN_KEYS = {"method", "base_bits", "target_bpw", "cap_bpw", "raise_down_proj", "raise_experts_to"}


class RecipeError(ValueError):
    """A recipe that cannot be followed; the message names its file."""


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
        plan: for recipes whose bits are worked out to a budget; see :mod:`.allocation`.
        text: the file as it is.
    """

    name: str
    summary: str
    default: Quantization
    rules: tuple[Rule, ...] = ()
    plan: Mapping[str, Any] = field(default_factory=dict)
    text: str = ""

    def spec(self, matrix: Matrix) -> Quantization:
        chosen = next((rule.spec for rule in reversed(self.rules) if rule.fits(matrix)), self.default)
        if chosen.bits is not None and matrix.columns % chosen.group_size:
            raise RecipeError(
                f"{self.name}: {matrix.module} has {matrix.columns} inputs, which do not divide into groups "
                f"of {chosen.group_size}"
            )
        return chosen


def recipe_names() -> list[str]:
    """Of the recipes that come with the package."""
    folder = files(__package__) / "recipes"
    return sorted(
        entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml")
    )


def load_recipe(name_or_path: str, config: TextConfig) -> Recipe:
    """A recipe by its name, or from a file of one's own.

    Raises:
        RecipeError: there is none, or it does not fit a model of this config.
    """
    if name_or_path in recipe_names():
        text = (files(__package__) / "recipes" / f"{name_or_path}.toml").read_text(encoding="utf-8")
        return parse_recipe(name_or_path, text, config)
    path = Path(name_or_path).expanduser()
    if not path.is_file():
        meant = did_you_mean(name_or_path, recipe_names())
        raise RecipeError(
            f"{name_or_path} is no recipe{meant}: neither a file nor one of {', '.join(recipe_names())}"
        )
    return parse_recipe(path.stem, read_text(path), config, file=path)


def parse_recipe(name: str, text: str, config: TextConfig, file: Path | None = None) -> Recipe:
    """``file``: where ``text`` is from, for errors to name."""
    where = name if file is None else str(file)
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{where}: not TOML ({error})") from None
    _check_keys(where, content, {"summary", "default", "rule", "plan"})
    if not isinstance(content.get("default"), dict):
        raise RecipeError(f"{where}: there is no [default] to say how most matrices are stored")
    rules = content.get("rule", [])
    if not isinstance(rules, list) or not all(isinstance(rule, dict) for rule in rules):
        raise RecipeError(f"{where}: rules are written as [[rule]]")
    plan = content.get("plan", {})
    if not isinstance(plan, dict):
        raise RecipeError(f"{where}: a plan is written as [plan]")
    _check_keys(f"{where}: [plan]", plan, _PLAN_KEYS)
    return Recipe(
        name,
        str(content.get("summary", "")),
        _spec(f"{where}: [default]", content["default"]),
        tuple(_rule(f"{where}: rule {n}", rule, config) for n, rule in enumerate(rules, 1)),
        plan,
        text,
    )


def _rule(where: str, content: dict[str, Any], config: TextConfig) -> Rule:
    parts = content.pop("parts", None)
    if not isinstance(parts, list) or not parts:
        raise RecipeError(f'{where} names no parts, such as parts = ["attention", "experts.down_proj"]')
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        words = ", ".join(map(str, unknown)) + did_you_mean(str(unknown[0]), PARTS)
        raise RecipeError(f"{where}: M3 has no {words}; its parts are {', '.join(PARTS)}")
    layers = content.pop("layers", None)
    spec = _spec(where, content)
    if spec.bits is not None and any(part.startswith("vision") for part in parts):
        raise RecipeError(f"{where}: the vision tower is not quantized; give it a dtype")
    return Rule(tuple(parts), None if layers is None else _layers(where, layers, config), spec)


def _layers(where: str, entries: Any, config: TextConfig) -> frozenset[int]:
    """``[0, 1, "3-57", -1]``: numbers, ranges with both ends in them, and numbers from the end."""
    count = config.num_hidden_layers
    chosen: set[int] = set()
    for entry in entries if isinstance(entries, list) else [entries]:
        try:
            first, _, last = entry.partition("-") if isinstance(entry, str) else (entry, "", "")
            numbers = range(int(first), int(last or first) + 1)
        except (ValueError, TypeError):
            raise RecipeError(f'{where}: a layer is a number or a range like "3-57", not {entry!r}') from None
        if not numbers or not all(-count <= number < count for number in numbers):
            raise RecipeError(f"{where}: of {count} layers there is no {entry}")
        chosen |= {number % count for number in numbers}
    return frozenset(chosen)


def _spec(where: str, content: dict[str, Any]) -> Quantization:
    _check_keys(where, content, {"bits", "group_size", "mode", "dtype"})
    if "dtype" in content:
        if content["dtype"] not in _DTYPES or len(content) > 1:
            raise RecipeError(f"{where}: dtype stands alone and is one of {', '.join(_DTYPES)}")
        return Quantization(dtype=content["dtype"])
    mode = content.get("mode", "affine")
    if not isinstance(mode, str) or mode not in _BITS:
        raise RecipeError(f"{where}: mode is one of {', '.join(_BITS)}, not {mode!r}")
    bits = content.get("bits", _BITS[mode][0] if len(_BITS[mode]) == 1 else None)
    group_size = content.get("group_size", _GROUP_SIZES[mode])
    if type(bits) is not int or bits not in _BITS[mode]:
        raise RecipeError(f"{where}: {mode} has {_or(_BITS[mode])} bits, not {bits!r}")
    allowed = _AFFINE_GROUP_SIZES if mode == "affine" else (_GROUP_SIZES[mode],)
    if type(group_size) is not int or group_size not in allowed:
        raise RecipeError(f"{where}: {mode} has groups of {_or(allowed)}, not {group_size!r}")
    return Quantization(bits, group_size, mode)


def _or(numbers: Iterable[int]) -> str:
    return " or ".join(map(str, numbers))


def _check_keys(where: str, content: Mapping[str, Any], known: set[str]) -> None:
    unknown = sorted(content.keys() - known)
    if unknown:
        raise RecipeError(
            f"{where}: {', '.join(unknown)} is no word of a recipe{did_you_mean(unknown[0], known)}; "
            f"these are: {', '.join(sorted(known))}"
        )
