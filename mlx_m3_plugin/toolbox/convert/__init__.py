"""``mlx-m3 convert``: any M3 checkpoint to MLX's layout by a recipe, in little memory."""

from ..checkpoint import Checkpoint, open_checkpoint
from ..precision import Quantization
from .plan import Plan, plan_conversion
from .recipe import Recipe, RecipeError, load_recipe, parse_recipe, recipe_names
from .run import Report, convert

__all__ = [
    "Checkpoint",
    "Plan",
    "Quantization",
    "Recipe",
    "RecipeError",
    "Report",
    "convert",
    "load_recipe",
    "open_checkpoint",
    "parse_recipe",
    "plan_conversion",
    "recipe_names",
]
