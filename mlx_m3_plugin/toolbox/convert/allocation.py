"""Bits worked out to a budget: the levels of oMLX's oQ, with what chooses protected first.

In the order of ``docs/recipes.md``: the recipe's rules as they are, then embeddings and head, then
the rest of what is no expert, the most sensitive layers first, each step only if it fits.
"""

from collections.abc import Iterable, Sequence

from ..checkpoint import Checkpoint
from ..precision import Quantization
from .matrices import Matrix, matrices_of
from .plan import plan_conversion
from .recipe import Recipe, RecipeError
from .sensitivity import Scores

_WIDTHS = (2, 3, 4, 5, 6, 8)
# Shares of the highest score from which a layer's matrices are raised by how much.
_MOST_SENSITIVE, _SENSITIVE = 0.5, 0.2
_LEAST_BITS = 4
_RAISED = ("attention", "dense_mlp")


def work_out(checkpoint: Checkpoint, recipe: Recipe, scores: Scores) -> dict[str, Quantization]:
    """How each matrix is stored so that the whole takes the recipe's bits per weight.

    Raises:
        RecipeError: the plan has another method, or lacks a number; or a layer has no score.
    """
    if recipe.plan.get("method") != "oq":
        raise RecipeError(f'{recipe.name}: the one method of a [plan] is "oq"')
    missing = [key for key in ("base_bits", "target_bpw", "cap_bpw") if key not in recipe.plan]
    if missing:
        raise RecipeError(f"{recipe.name}: [plan] lacks {', '.join(missing)}")
    layers = checkpoint.text_config.num_hidden_layers
    if set(range(layers)) - set(scores):
        raise RecipeError(f"{recipe.name}: there is no sensitivity for every one of {layers} layers")
    return _Budget(checkpoint, recipe, scores).spend()


class _Budget:
    """Precisions so far, and what they cost."""

    def __init__(self, checkpoint: Checkpoint, recipe: Recipe, scores: Scores):
        self._plan = recipe.plan
        self._scores = scores
        self._matrices = matrices_of(checkpoint.text_config, indexers=checkpoint.indexers)
        self._specs = {matrix.module: recipe.spec(matrix) for matrix in self._matrices}
        plan = plan_conversion(checkpoint, recipe)
        self._parameters, self._bytes = plan.parameters, plan.nbytes
        # Of scales: as many bytes as a float of the source has.
        self._itemsize = {
            m.module: 4 if checkpoint.float_dtype(m.module).endswith("float32") else 2 for m in self._matrices
        }

    def spend(self) -> dict[str, Quantization]:
        target, cap = float(self._plan["target_bpw"]), float(self._plan["cap_bpw"])
        for part in ("lm_head", "embeddings"):
            self._raise(self._of([part]), 8, cap)
        if self._plan.get("raise_down_proj"):
            self._raise(self._of(["experts.down_proj"]), int(self._plan["base_bits"]) + 1, cap)
        for matrix in self._by_score(self._of(_RAISED)):
            self._raise([matrix], _LEAST_BITS, cap)
        for matrix in self._by_score(self._of(_RAISED)):
            self._raise_by_sensitivity(matrix, target)
        self._raise_experts(target)
        self._raise_toward_eight(target)
        return self._specs

    def _raise_by_sensitivity(self, matrix: Matrix, most: float) -> None:
        share = self._score(matrix) / (max(self._scores.values()) or 1)
        bits = self._bits(matrix)
        wanted = 8 if share >= _MOST_SENSITIVE else bits + (2 if share >= _SENSITIVE else 1)
        for width in reversed([w for w in _WIDTHS if bits < w <= _at_least(wanted)]):
            if self._raise([matrix], width, most):
                return

    def _raise_experts(self, most: float) -> None:
        bits = self._plan.get("raise_experts_to")
        if bits is None:
            return
        for projections in (["down_proj"], ["gate_proj", "up_proj"]):
            every = [self._of([f"experts.{projection}"]) for projection in projections]
            for together in sorted(zip(*every, strict=True), key=lambda pair: -self._score(pair[0])):
                self._raise(together, int(bits), most)

    def _raise_toward_eight(self, most: float) -> None:
        for width in _WIDTHS:
            for matrix in self._by_score(self._of(_RAISED)):
                self._raise([matrix], width, most)

    def _raise(self, matrices: Sequence[Matrix], bits: int, most: float) -> bool:
        """Give them more bits, if all of that fits into ``most`` bits per weight."""
        lower = [matrix for matrix in matrices if self._bits(matrix) < bits]
        raised = {m.module: Quantization(bits, self._specs[m.module].group_size) for m in lower}
        cost = sum(self._price(m, raised[m.module]) - self._price(m, self._specs[m.module]) for m in lower)
        if 8 * (self._bytes + cost) > most * self._parameters:
            return False
        self._bytes += cost
        self._specs |= raised
        return True

    def _price(self, matrix: Matrix, spec: Quantization) -> int:
        return spec.bytes_of(matrix.size, self._itemsize[matrix.module])

    def _bits(self, matrix: Matrix) -> int:
        # What is in floats has more than any.
        return self._specs[matrix.module].bits or 16

    def _score(self, matrix: Matrix) -> float:
        return 0.0 if matrix.layer is None else self._scores[matrix.layer]

    def _of(self, parts: Iterable[str]) -> list[Matrix]:
        wanted = tuple(parts)
        return [matrix for matrix in self._matrices if matrix.is_one_of(wanted)]

    def _by_score(self, matrices: list[Matrix]) -> list[Matrix]:
        return sorted(matrices, key=lambda matrix: -self._score(matrix))


def _at_least(bits: int) -> int:
    """The next width that there is."""
    return next((width for width in _WIDTHS if width >= bits), 8)
