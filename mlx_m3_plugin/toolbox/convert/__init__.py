"""``mlx-m3 convert``: any M3 checkpoint to MLX's layout by a recipe, in little memory."""

from .plan import Plan, plan_conversion
from .recipe import How, Recipe, RecipeError, load_recipe, parse_recipe, recipe_names
from .run import Report, convert
from .source import Source, open_checkpoint

__all__ = [
    "How",
    "Plan",
    "Recipe",
    "RecipeError",
    "Report",
    "Source",
    "convert",
    "load_recipe",
    "open_checkpoint",
    "parse_recipe",
    "plan_conversion",
    "recipe_names",
]
