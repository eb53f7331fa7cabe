"""The only files that import mlx_vlm."""
