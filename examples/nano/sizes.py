"""The sizes of M3-nano that more than its net needs to know; without torch."""

BLOCK, TOP_K = 8, 8
BUDGET = BLOCK * TOP_K
