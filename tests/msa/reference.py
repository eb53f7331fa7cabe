"""The definition of MSA, plain and slow: full scores, a mask, one call of SDPA.

It is the oracle of every faster path, so it favours being read over being quick.
"""

import mlx.core as mx


def select_blocks(
    index_queries: mx.array,
    index_keys: mx.array,
    query_positions: mx.array,
    key_positions: mx.array | None,
    *,
    block_size: int,
    topk_blocks: int,
    local_blocks: int = 1,
    init_blocks: int = 0,
) -> mx.array:
    """The key blocks that each query of each group attends to (paper, eq. 6 and 7).

    A block scores the largest dot product of the query with any of its visible keys.  The
    query's own block and the ``local_blocks - 1`` before it, and the first ``init_blocks``
    of the row, are always in and count among the ``topk_blocks``.

    Args:
        index_queries: ``[B, G, L, D]``, one head per KV group.
        index_keys: ``[B, 1, S, D]``, one head shared by all groups.
        query_positions: ``[B or 1, L]`` int32 content positions; negative for padding.
        key_positions: ``[B, S]`` int32 content positions: negative for padding, which stands
            before the row's tokens, then ``0, 1, 2, ...``.  None where slot ``s`` of every
            row holds position ``s``.
        block_size: keys per block.
        topk_blocks: the most blocks a query may attend to.
        local_blocks: blocks up to and with the query's own that are always in.
        init_blocks: blocks at the start of the row that are always in.

    Returns:
        ``[B, G, L, k]`` int32 block ids in no particular order, with
        ``k = min(topk_blocks, ceil(S / block_size))``; -1 marks an unused slot.
    """
    scores = block_scores(
        index_queries,
        index_keys,
        query_positions,
        key_positions,
        block_size=block_size,
        local_blocks=local_blocks,
        init_blocks=init_blocks,
    )
    k = min(topk_blocks, scores.shape[-1])
    ids = mx.argpartition(-scores, kth=k - 1, axis=-1)[..., :k]
    chosen = mx.take_along_axis(scores, ids, axis=-1)
    # Block ids are choices, not numbers to differentiate: MLX refuses a gradient of an index.
    return mx.stop_gradient(mx.where(chosen == -mx.inf, -1, ids.astype(mx.int32)))


def block_scores(
    index_queries: mx.array,
    index_keys: mx.array,
    query_positions: mx.array,
    key_positions: mx.array | None,
    *,
    block_size: int,
    local_blocks: int = 1,
    init_blocks: int = 0,
) -> mx.array:
    """What :func:`select_blocks` chooses by: ``[B, G, L, ceil(S / block_size)]`` float32.

    The largest dot product of each block; inf where a block is always in, -inf where nothing of
    it is visible.
    """
    n_keys = index_keys.shape[2]
    if key_positions is not None:
        index_keys = _in_content_order(index_keys, key_positions)
    n_blocks = -(-n_keys // block_size)

    # The raw dot product: a positive scale would not change any choice.
    scores = index_queries.astype(mx.float32) @ index_keys.astype(mx.float32).swapaxes(-1, -2)
    # Masked before pooling: a future key must not win a block for itself.
    visible = mx.arange(n_keys) <= query_positions[:, None, :, None]
    scores = mx.where(visible, scores, -mx.inf)
    tail = n_blocks * block_size - n_keys
    scores = mx.pad(scores, [(0, 0), (0, 0), (0, 0), (0, tail)], constant_values=-mx.inf)
    scores = mx.unflatten(scores, -1, (n_blocks, block_size)).max(axis=-1)

    block = mx.arange(n_blocks)
    own_block = query_positions[:, None, :, None] // block_size
    forced = ((block > own_block - local_blocks) | (block < init_blocks)) & (block <= own_block)
    return mx.where(forced, mx.inf, scores)


def attend(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    block_ids: mx.array,
    query_positions: mx.array,
    key_positions: mx.array | None,
    *,
    block_size: int,
    scale: float,
) -> mx.array:
    """Softmax attention of every query over the visible keys of its blocks (paper, eq. 8).

    Query head ``j`` belongs to group ``j // (H // G)`` and reads that group's K and V.

    Args:
        queries: ``[B, H, L, D]``.
        keys: ``[B, G, S, D]``.
        values: ``[B, G, S, Dv]``.
        block_ids: ``[B, G, L, k]`` int32 from :func:`select_blocks`; -1 is skipped.
        query_positions: as in :func:`select_blocks`.
        key_positions: as in :func:`select_blocks`.
        block_size: keys per block.
        scale: factor of the dot products, ``D ** -0.5`` in M3.

    Returns:
        ``[B, H, L, Dv]`` in the dtype of ``queries``.  Rows of padding queries are finite
        and without meaning.
    """
    batch, n_heads, length, _ = queries.shape
    n_groups, n_keys = keys.shape[1:3]

    keep = _block_membership(block_ids, -(-n_keys // block_size))
    keep = mx.repeat(keep, block_size, axis=-1)[..., :n_keys]
    query_at = query_positions[:, None, :, None]
    if key_positions is None:
        keep = keep & (mx.arange(n_keys) <= query_at)
    else:
        key_at = key_positions[:, None, None, :]
        # From content order back to the order of the cache slots.
        keep = mx.take_along_axis(keep, mx.maximum(key_at, 0), axis=-1)
        keep = keep & (key_at >= 0) & (key_at <= query_at)
    # A softmax over nothing is NaN, and a NaN in a padded row would spread through K and V.
    keep = keep | (query_at < 0)

    # One group at a time along the batch axis, so that its heads share one mask.
    grouped = (batch * n_groups, n_heads // n_groups, length, -1)
    out = mx.fast.scaled_dot_product_attention(
        queries.reshape(grouped),
        keys.flatten(0, 1)[:, None],
        values.flatten(0, 1)[:, None],
        scale=scale,
        mask=keep.flatten(0, 1)[:, None],
    )
    return out.reshape(batch, n_heads, length, -1)


def _in_content_order(index_keys: mx.array, key_positions: mx.array) -> mx.array:
    """Index keys ``[B, 1, S, D]`` moved so that slot ``c`` holds the key at position ``c``."""
    n_keys = index_keys.shape[2]
    padding = (key_positions < 0).sum(axis=-1, keepdims=True)
    # Slots past a row's last token repeat a key, which no query of that row is late enough to see.
    slots = mx.minimum(mx.arange(n_keys) + padding, n_keys - 1)
    return mx.take_along_axis(index_keys, slots[:, None, :, None], axis=2)


def _block_membership(block_ids: mx.array, n_blocks: int) -> mx.array:
    """``[B, G, L, n_blocks]`` bool from ids ``[B, G, L, k]``; -1 goes nowhere."""
    # One column more than there are blocks takes the unused slots.
    ids = mx.where(block_ids < 0, n_blocks, block_ids)
    member = mx.zeros((*ids.shape[:-1], n_blocks + 1), dtype=mx.bool_)
    return mx.put_along_axis(member, ids, mx.array(True), axis=-1)[..., :n_blocks]
