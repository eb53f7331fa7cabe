"""What mlx-lm and mlx-vlm compute otherwise than M3, without this plugin."""

from ..model.config import TextConfig


def wrong_past_the_budget(config: TextConfig, with_indexer: bool = True) -> dict[str, str]:
    """The libraries whose own M3 is not right past ``config.budget`` tokens, each with the reason.

    Of mlx-lm 0.32 and mlx-vlm 0.7; ``tests/upstream`` compares both with what the libraries do.

    Args:
        with_indexer: whether any layer selects blocks.
    """
    reasons = {}
    if with_indexer and config.index_init_blocks:
        reasons["mlx-lm"] = "it ignores sparse_init_block"
    if with_indexer and config.index_n_heads > 1:
        reasons["mlx-vlm"] = "it selects the same blocks for all groups of heads"
    return reasons
