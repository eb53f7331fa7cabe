"""``mlx-m3 convert``: any M3 checkpoint to MLX's layout by a recipe, in little memory."""

from .plan import ConversionPlan, plan_conversion
from .recipe import Recipe, RecipeError, load_recipe, parse_recipe, recipe_names
from .run import Report, convert

__all__ = [
    "ConversionPlan",
    "Recipe",
    "RecipeError",
    "Report",
    "convert",
    "load_recipe",
    "parse_recipe",
    "plan_conversion",
    "recipe_names",
]
