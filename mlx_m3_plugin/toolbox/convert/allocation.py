"""Bits for each matrix, so that the whole model has the bits per weight of a recipe: the levels of oMLX's oQ.

:mod:`.sensitivity` measures how much the output of each layer changes when its weights get fewer bits.
:func:`allocate_bits` gives bits to the most sensitive layers first, in the order of ``docs/recipes.md``.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from ...weights.quantization import AFFINE_BITS
from ..checkpoint import Checkpoint
from ..common import read_json_object
from ..new_directory import replace_text
from ..precision import Quantization
from .plan import ConversionPlan, plan_conversion
from .recipe import Matrix, Recipe, RecipeError, matrices_of

# Layer -> sensitivity: the squared error of its output with quantized weights, relative to the output,
# ``mean((out - out_q)^2) / max(mean(out^2), 1e-10)``, as in oQ.
Scores = Mapping[int, float]

# Scores relative to the highest, from which a layer's matrices get 8 bits, or two more bits.
_MOST_SENSITIVE, _SENSITIVE = 0.5, 0.2
_LEAST_BITS = 4
_RAISED = ("attention", "dense_mlp")


def allocate_bits(checkpoint: Checkpoint, recipe: Recipe, scores: Scores) -> dict[str, Quantization]:
    """Module path -> how it is stored, so that the whole has the recipe's bits per weight.

    Raises:
        RecipeError: the recipe's [plan] has another method or lacks a key, or a layer has no score.
    """
    targets = recipe.bit_targets
    if targets.get("method") != "oq":
        raise RecipeError(f'{recipe.name}: [plan] needs method = "oq", the only one')
    missing = [key for key in ("base_bits", "target_bpw", "cap_bpw") if key not in targets]
    if missing:
        raise RecipeError(f"{recipe.name}: [plan] lacks {', '.join(missing)}")
    layers = checkpoint.text_config.num_hidden_layers
    unknown = sorted(set(range(layers)) - set(scores))
    if unknown:
        raise RecipeError(
            f"{recipe.name}: the sensitivity map lacks {len(unknown)} of {layers} layers: {unknown[0]}, ..."
        )
    return _Allocation(plan_conversion(checkpoint, recipe), scores).run()


class _Allocation:
    """The quantization of each matrix so far, and the bytes of all."""

    def __init__(self, plan: ConversionPlan, scores: Scores):
        source, self._targets, self._scores = plan.source, plan.recipe.bit_targets, scores
        self._matrices = matrices_of(source.text_config, indexers=source.indexers)
        self._specs = {matrix.module: plan.recipe.spec(matrix) for matrix in self._matrices}
        self._parameters, self._bytes = plan.parameters, plan.nbytes
        # Bytes of a scale: as many as a float of the source has.
        self._itemsize = {m.module: source.float_dtype(m.module).size for m in self._matrices}

    def run(self) -> dict[str, Quantization]:
        target, cap = float(self._targets["target_bpw"]), float(self._targets["cap_bpw"])
        for part in ("lm_head", "embeddings"):
            self._raise(self._of([part]), 8, cap)
        if self._targets.get("raise_down_proj"):
            self._raise(self._of(["experts.down_proj"]), int(self._targets["base_bits"]) + 1, cap)
        raised = sorted(self._of(_RAISED), key=lambda matrix: -self._score(matrix))
        for matrix in raised:
            self._raise([matrix], _LEAST_BITS, cap)
        for matrix in raised:
            self._raise_by_sensitivity(matrix, target)
        if "raise_experts_to" in self._targets:
            self._raise_experts(int(self._targets["raise_experts_to"]), target)
        for bits in AFFINE_BITS:
            for matrix in raised:
                self._raise([matrix], bits, target)
        return self._specs

    def _raise_by_sensitivity(self, matrix: Matrix, most: float) -> None:
        relative = self._score(matrix) / (max(self._scores.values()) or 1)
        bits = self._bits(matrix)
        wanted = 8 if relative >= _MOST_SENSITIVE else bits + (2 if relative >= _SENSITIVE else 1)
        wanted = next((width for width in AFFINE_BITS if width >= wanted), 8)
        for width in reversed(AFFINE_BITS):
            if bits < width <= wanted and self._raise([matrix], width, most):
                return

    def _raise_experts(self, bits: int, most: float) -> None:
        for projections in (["down_proj"], ["gate_proj", "up_proj"]):
            by_layer = zip(*(self._of([f"experts.{projection}"]) for projection in projections), strict=True)
            for together in sorted(by_layer, key=lambda matrices: -self._score(matrices[0])):
                self._raise(together, bits, most)

    def _raise(self, matrices: Sequence[Matrix], bits: int, most: float) -> bool:
        """Give them more bits, if the model then has at most ``most`` bits per weight."""
        raised, size = {}, self._bytes
        for m in matrices:
            if self._bits(m) < bits:
                old, itemsize = self._specs[m.module], self._itemsize[m.module]
                raised[m.module] = new = Quantization(bits, old.group_size)
                size += new.bytes_of(m.size, itemsize) - old.bytes_of(m.size, itemsize)
        if 8 * size > most * self._parameters:
            return False
        self._bytes = size
        self._specs |= raised
        return True

    def _bits(self, matrix: Matrix) -> int:
        # Floats have more than any quantization.
        return self._specs[matrix.module].bits or 16

    def _score(self, matrix: Matrix) -> float:
        return 0.0 if matrix.layer is None else self._scores[matrix.layer]

    def _of(self, parts: Sequence[str]) -> list[Matrix]:
        return [matrix for matrix in self._matrices if matrix.is_one_of(parts)]


# --- scores of sensitivity ---


def scores_by_position(layers: int) -> dict[int, float]:
    """Without a measurement: the nearer to the first or last layer, the more sensitive."""
    return {n: 1 / (1 + min(n, layers - 1 - n)) for n in range(layers)}


def read_scores(file: Path) -> dict[int, float]:
    """A saved map.  Raises ValueError if the file holds something else."""
    try:
        content = read_json_object(file)
        return {int(layer): float(score) for layer, score in content["scores"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f'{file} is not a sensitivity map: {{"scores": {{"0": 0.01, ...}}}}') from None


def write_scores(file: Path, scores: Scores) -> None:
    content = {"scores": {str(layer): score for layer, score in sorted(scores.items())}}
    replace_text(file, json.dumps(content, indent=2) + "\n")
