"""Block scores: the best visible dot product of a query with any key of each block.

Defined by ``block_scores`` in ``tests/msa/reference.py`` (without forced blocks); :mod:`..select` is the
plain form.
"""

import mlx.core as mx

from ..common import Offset, Padding
from .launch import SIMDGROUP, Kernel, Template, cdiv, ints, per_row

# One query: a threadgroup takes one block and these rows; eight threads share a key.
FEW_ROWS = 4
FEW_SIMDGROUPS = 4
# More: a simdgroup holds this many fragments of eight (head, query) rows, and 16 simdgroups share the keys
# that a threadgroup reads.
ROW_FRAGMENTS = {2: 4, 4: 2}  # by bytes of an element: 64 registers in both
MANY_SIMDGROUPS = 16
STAGED_KEYS = 32
# Threadgroups: two for each core of the largest GPU.  More of them would read the queries more often.
MANY_GROUPS = 160

_INPUTS = ("index_queries", "index_keys", "offset", "left_padding", "sizes")

FEW = Kernel(
    "block_scores_few",
    _INPUTS,
    ("scores",),
    """
    constexpr int CHANNELS = D / 8;  // of a key, for each of its eight threads
    const int n_blocks = sizes[0];
    const int G = index_queries_shape[1], L = index_queries_shape[2], n_rows = G * L;
    const int lane = thread_index_in_simdgroup, simdgroup = simdgroup_index_in_threadgroup;
    const int block = threadgroup_position_in_grid.x, b = threadgroup_position_in_grid.z;
    const int row0 = threadgroup_position_in_grid.y * ROWS;
    const int first = offset[b * offset_strides[0]], padding = left_padding[b * left_padding_strides[0]];

    // Row i of this tile is query `at[i] - first` of one head.  Channel `8 * j + lane % 8` is ours.
    float query[ROWS][CHANNELS], best[ROWS];
    int at[ROWS], latest = -1;
    UNROLL for (int i = 0; i < ROWS; i++) {
      const int row = min(row0 + i, n_rows - 1), g = row % G, l = row / G;
      at[i] = first + l;
      latest = max(latest, at[i]);
      best[i] = -INFINITY;
      UNROLL for (int j = 0; j < CHANNELS; j++)
        query[i][j] = float(index_queries[b * index_queries_strides[0] + g * index_queries_strides[1]
            + l * index_queries_strides[2] + (8 * j + lane % 8) * index_queries_strides[3]]);
    }

    const int start = block * BLOCK, stop = min(start + BLOCK, latest + 1);
    const int channel_step = 8 * int(index_keys_strides[3]);
    for (int four = start + simdgroup * 4; four < stop; four += SIMDGROUPS * 4) {
      const int key = four + lane / 8;
      float sum[ROWS] = {0};
      if (key < stop) {
        const auto channels = index_keys + (b * index_keys_strides[0]
            + (padding + key) * index_keys_strides[2] + lane % 8 * index_keys_strides[3]);
        UNROLL for (int j = 0; j < CHANNELS; j++) {
          const float k = float(channels[j * channel_step]);
          UNROLL for (int i = 0; i < ROWS; i++) sum[i] += query[i][j] * k;
        }
      }
      UNROLL for (int i = 0; i < ROWS; i++) {
        for (int step = 1; step < 8; step *= 2) sum[i] += simd_shuffle_xor(sum[i], ushort(step));
        if (key < stop && key <= at[i]) best[i] = max(best[i], sum[i]);
      }
    }

    threadgroup float bests[ROWS * SIMDGROUPS];
    UNROLL for (int i = 0; i < ROWS; i++) {
      const float score = simd_max(best[i]);
      if (lane == 0) bests[i * SIMDGROUPS + simdgroup] = score;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    const int i = thread_index_in_threadgroup, row = row0 + i;
    if (i < ROWS && row < n_rows) {
      float score = bests[i * SIMDGROUPS];
      for (int j = 1; j < SIMDGROUPS; j++) score = max(score, bests[i * SIMDGROUPS + j]);
      scores[((b * G + row % G) * L + row / G) * n_blocks + block] = score;
    }
    """,
)

MANY = Kernel(
    "block_scores_many",
    _INPUTS,
    ("scores",),
    """
    const int n_blocks = sizes[0], blocks_per_group = sizes[1];
    const int G = index_queries_shape[1], L = index_queries_shape[2], n_rows = G * L;
    const int lane = thread_index_in_simdgroup, thread_index = thread_index_in_threadgroup;
    const int r = row_in_fragment(lane), c = column_in_fragment(lane);
    const int b = threadgroup_position_in_grid.z;
    const int first = offset[b * offset_strides[0]], padding = left_padding[b * left_padding_strides[0]];
    const int group_row = threadgroup_position_in_grid.y * SIMDGROUPS * FRAGMENTS * 8;
    const int row0 = group_row + simdgroup_index_in_threadgroup * FRAGMENTS * 8;
    const int latest = first + (min(group_row + SIMDGROUPS * FRAGMENTS * 8, n_rows) - 1) / G;
    threadgroup T staged[KEYS * (D + PADDING)];

    // Our query rows, transposed, for the whole run: fragment [d][f] is channels 8 d.. of rows 8 f...
    simdgroup_matrix<T, 8, 8> queries[D / 8][FRAGMENTS];
    UNROLL for (int f = 0; f < FRAGMENTS; f++)
      UNROLL for (int j = 0; j < 2; j++) {
        const int row = row0 + f * 8 + c + j, g = row % G, l = row / G;
        UNROLL for (int d = 0; d < D / 8; d++)
          queries[d][f].thread_elements()[j] = row < n_rows
              ? index_queries[b * index_queries_strides[0] + g * index_queries_strides[1]
                  + l * index_queries_strides[2] + (8 * d + r) * index_queries_strides[3]]
              : T(0);
      }

    const int block0 = threadgroup_position_in_grid.x * blocks_per_group;
    for (int block = block0; block < min(block0 + blocks_per_group, n_blocks); block++) {
      const int start = block * BLOCK, stop = min(start + BLOCK, latest + 1);
      const bool all_see_all = start + BLOCK - 1 <= first + row0 / G;
      float best[FRAGMENTS][2];
      UNROLL for (int f = 0; f < FRAGMENTS; f++) best[f][0] = best[f][1] = -INFINITY;

      for (int key0 = start; key0 < stop; key0 += KEYS) {
        threadgroup_barrier(mem_flags::mem_threadgroup);
        for (int i = thread_index; i < KEYS * D; i += SIMDGROUPS * 32) {
          const int key = key0 + i / D;
          staged[i / D * (D + PADDING) + i % D] = key < stop
              ? index_keys[b * index_keys_strides[0] + (padding + key) * index_keys_strides[2]
                  + i % D * index_keys_strides[3]]
              : T(0);
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);

        for (int n = 0; n < min(KEYS, stop - key0); n += 8) {
          // Scores, transposed: eight keys by eight rows in each fragment.
          simdgroup_matrix<float, 8, 8> sums[FRAGMENTS];
          UNROLL for (int f = 0; f < FRAGMENTS; f++) set_elements(sums[f], 0.0f, 0.0f);
          UNROLL for (int d = 0; d < D / 8; d++) {
            simdgroup_matrix<T, 8, 8> keys;
            simdgroup_load(keys, staged + n * (D + PADDING) + d * 8, D + PADDING);
            UNROLL for (int f = 0; f < FRAGMENTS; f++)
              simdgroup_multiply_accumulate(sums[f], keys, queries[d][f], sums[f]);
          }
          const int key = key0 + n + r;
          UNROLL for (int f = 0; f < FRAGMENTS; f++)
            UNROLL for (int j = 0; j < 2; j++)
              if (key < stop && (all_see_all || key <= first + (row0 + f * 8 + c + j) / G))
                best[f][j] = max(best[f][j], sums[f].thread_elements()[j]);
        }
      }

      UNROLL for (int f = 0; f < FRAGMENTS; f++)
        UNROLL for (int j = 0; j < 2; j++) {
          // The eight threads with this column differ in these bits of their number.
          float score = best[f][j];
          score = max(score, simd_shuffle_xor(score, ushort(2)));
          score = max(score, simd_shuffle_xor(score, ushort(4)));
          score = max(score, simd_shuffle_xor(score, ushort(16)));
          const int row = row0 + f * 8 + c + j;
          if (r == 0 && row < n_rows) scores[((b * G + row % G) * L + row / G) * n_blocks + block] = score;
        }
    }
    """,
)


def supports_scores(index_queries: mx.array, index_keys: mx.array) -> str | None:
    """Why :func:`block_scores` can't take these arrays; None if it can."""
    dims = index_queries.shape[3]
    if dims % 8 or dims > 128:
        return f"index head size {dims} is not a multiple of 8 up to 128"
    if index_queries.dtype != index_keys.dtype:
        return f"index queries in {index_queries.dtype}, index keys in {index_keys.dtype}"
    if index_queries.dtype not in (mx.bfloat16, mx.float16, mx.float32):
        return f"index queries in {index_queries.dtype}"
    return None


def block_scores(
    index_queries: mx.array,
    index_keys: mx.array,
    offset: Offset,
    left_padding: Padding,
    *,
    n_keys: int,
    block_size: int,
) -> mx.array:
    """The best visible dot product of each block, summed in float32 (paper, eq. 6).

    ``n_keys``: slots in use, the padding included; no query is later than the last of them.  The other
    arguments are those of :func:`..select.select_blocks`, queries and keys in the same dtype.

    Returns:
        ``[B, G, L, ceil(n_keys / block_size)]`` float32; -inf where no key of the block is visible.
    """
    batch, groups, length, dims = index_queries.shape
    n_blocks, rows = cdiv(n_keys, block_size), groups * length
    arrays = [index_queries, index_keys, per_row(offset, batch), per_row(left_padding, batch)]
    outputs = [((batch, groups, length, n_blocks), mx.float32)]
    template: Template = [("T", index_queries.dtype), ("D", dims), ("BLOCK", block_size)]
    if length == 1:
        template += [("ROWS", FEW_ROWS), ("SIMDGROUPS", FEW_SIMDGROUPS)]
        grid = (n_blocks, cdiv(rows, FEW_ROWS), batch)
        return FEW([*arrays, ints(n_blocks)], template, grid, FEW_SIMDGROUPS * SIMDGROUP, outputs)[0]

    fragments, simdgroups, tiles, blocks_per_group = tiling(batch, rows, n_blocks, index_queries.dtype.size)
    template += [("FRAGMENTS", fragments), ("SIMDGROUPS", simdgroups), ("KEYS", STAGED_KEYS)]
    grid = (cdiv(n_blocks, blocks_per_group), tiles, batch)
    sizes = ints(n_blocks, blocks_per_group)
    return MANY([*arrays, sizes], template, grid, simdgroups * SIMDGROUP, outputs)[0]


def tiling(batch: int, rows: int, n_blocks: int, itemsize: int) -> tuple[int, int, int, int]:
    """Row fragments of a simdgroup, simdgroups, tiles of rows, and blocks of a threadgroup."""
    fragments = ROW_FRAGMENTS[itemsize]
    simdgroups = min(MANY_SIMDGROUPS, cdiv(rows, fragments * 8))
    # Few rows make small threadgroups, and more of them: each has one block.
    tiles = cdiv(rows, simdgroups * fragments * 8)
    shares = cdiv(MANY_GROUPS * MANY_SIMDGROUPS, batch * tiles * simdgroups)
    return fragments, simdgroups, tiles, cdiv(n_blocks, shares)
