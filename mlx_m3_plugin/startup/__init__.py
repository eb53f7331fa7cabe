"""How an installed package reaches stock mlx-lm and mlx-vlm.  Standard library only."""
