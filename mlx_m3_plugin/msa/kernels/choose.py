"""Selection: the k best blocks of each query of each group.

Defined by ``select_blocks`` in ``tests/msa/reference.py``; ``_choose`` in :mod:`..select` is the plain form.
"""

import mlx.core as mx

from ..common import Offset
from .launch import HELPERS, SIMDGROUP, Kernel, cdiv, ints, per_row

# One simdgroup for so many blocks of a query.
BLOCKS_PER_SIMDGROUP = 256
MAX_SIMDGROUPS = 8

CHOOSE = Kernel(
    "choose_blocks",
    ("scores", "offset", "sizes"),
    ("block_ids",),
    """
    const int G = sizes[0], L = sizes[1], n_blocks = sizes[2];
    const int local_blocks = sizes[3], init_blocks = sizes[4];
    const int row = threadgroup_position_in_grid.x;
    const int lane = thread_index_in_simdgroup, simdgroup = simdgroup_index_in_threadgroup;
    const int at = offset[row / (G * L) * offset_strides[0]] + row % L;
    const int own = at >= 0 ? at / BLOCK : -1;
    threadgroup float found_scores[SIMDGROUPS * K];
    threadgroup int found_ids[SIMDGROUPS * K];

    // Each thread keeps its K best, sorted; then the simdgroup takes the best of its threads, K times.
    float best[K];
    int ids[K];
    clear_best<K>(best, ids);
    for (int n = thread_index_in_threadgroup; n < n_blocks; n += SIMDGROUPS * 32) {
      const bool forced = n <= own && (n > own - local_blocks || n < init_blocks);
      insert_best<K>(best, ids, forced ? INFINITY : scores[size_t(row) * n_blocks + n], n);
    }
    for (int i = 0; i < K; i++) {
      const float score = simd_max(best[0]);
      const int winner = simd_min(best[0] == score ? lane : 32);
      if (lane == winner) {
        found_scores[simdgroup * K + i] = score;
        found_ids[simdgroup * K + i] = ids[0];
        remove_best<K>(best, ids);
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    // The first simdgroup takes the best of all simdgroups.
    if (simdgroup > 0) return;
    clear_best<K>(best, ids);
    for (int n = lane; n < SIMDGROUPS * K; n += 32) insert_best<K>(best, ids, found_scores[n], found_ids[n]);
    for (int i = 0; i < K; i++) {
      const float score = simd_max(best[0]);
      const int winner = simd_min(best[0] == score ? lane : 32);
      if (lane == winner) {
        block_ids[size_t(row) * K + i] = ids[0];
        remove_best<K>(best, ids);
      }
    }
    """,
    HELPERS
    + """
template <int K>
METAL_FUNC void clear_best(thread float* best, thread int* ids) {
  UNROLL for (int i = 0; i < K; i++) {
    best[i] = -INFINITY;
    ids[i] = -1;
  }
}

template <int K>
METAL_FUNC void insert_best(thread float* best, thread int* ids, float score, int id) {
  UNROLL for (int i = 0; i < K; i++)
    if (score > best[i]) {
      const float next_score = best[i];
      const int next_id = ids[i];
      best[i] = score;
      ids[i] = id;
      score = next_score;
      id = next_id;
    }
}

template <int K>
METAL_FUNC void remove_best(thread float* best, thread int* ids) {
  UNROLL for (int i = 0; i + 1 < K; i++) {
    best[i] = best[i + 1];
    ids[i] = ids[i + 1];
  }
  best[K - 1] = -INFINITY;
  ids[K - 1] = -1;
}
""",
)


def supports_choice(k: int) -> str | None:
    """Why :func:`choose_blocks` can't choose ``k`` blocks; None if it can."""
    return None if k <= SIMDGROUP else f"{k} blocks for each query, more than {SIMDGROUP}"


def choose_blocks(
    scores: mx.array, offset: Offset, *, block_size: int, k: int, local_blocks: int, init_blocks: int
) -> mx.array:
    """The ids of the best blocks (paper, eq. 7).

    ``scores``: ``[B, G, L, n_blocks]`` float32 from :func:`.scores.block_scores`, row contiguous.  The other
    arguments are those of :func:`..select.select_blocks`; ``k``: ids for each query.

    Returns:
        ``[B, G, L, k]`` int32 in no particular order; -1 marks an unused slot.
    """
    batch, groups, length, n_blocks = scores.shape
    simdgroups = min(MAX_SIMDGROUPS, cdiv(n_blocks, BLOCKS_PER_SIMDGROUP))
    sizes = ints(groups, length, n_blocks, local_blocks, init_blocks)
    return CHOOSE(
        [scores, per_row(offset, batch), sizes],
        [("BLOCK", block_size), ("K", k), ("SIMDGROUPS", simdgroups)],
        (batch * groups * length, 1, 1),
        simdgroups * SIMDGROUP,
        [((batch, groups, length, k), mx.int32)],
    )[0]
