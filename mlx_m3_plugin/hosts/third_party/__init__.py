"""Servers that others build on mlx-lm and mlx-vlm: one file for each, with the list of its patches."""
