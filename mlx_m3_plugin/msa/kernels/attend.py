"""Sparse attention: the chosen blocks of each query, read where they lie in the cache.

Defined by ``attend`` in ``tests/msa/reference.py``; :mod:`..attend` is the plain form.

A *pair* is a query of one group and one of its blocks.  :data:`ATTEND` computes the attention of all heads
of the group to that block alone; :data:`MERGE` adds up the pairs of a query by their softmax sums.  A
threadgroup takes several pairs, and keeps K and V of a block in registers for as long as the block stays the
same.  Few queries share no blocks: each pair has its own threadgroup.  Of many queries the pairs are sorted
by block first, so that a block is read about once for all of its queries.
"""

import mlx.core as mx

from ..common import KeysValues, Offset, Padding, Quantized
from .launch import (
    HELPERS,
    MAX_THREADGROUP_BYTES,
    MAX_THREADS,
    PADDING,
    SIMDGROUP,
    Kernel,
    Template,
    cdiv,
    ints,
    per_row,
    scalar,
)

# From this many queries on pairs are sorted.
SORT_FROM = 8
# Threadgroups for sorted pairs: three for each core of the largest GPU.  More would read more of K and V.
SORTED_GROUPS = 240
# Fragments of eight keys (and of eight channels of V) that a simdgroup holds, by bytes of an element.
HELD_FRAGMENTS = {2: 2, 4: 1}
MERGE_SIMDGROUPS = 8

_HEADER = (
    HELPERS
    + """
// The tokens of one row and group.  pair(): two neighbouring channels, the first of them even.
template <typename T, typename P>
struct Tokens {
  P start;
  int64_t slot_step, channel_step;
  metal::vec<T, 2> pair(int slot, int channel) const {
    P x = start + slot * slot_step + channel * channel_step;
    return metal::vec<T, 2>(x[0], x[channel_step]);
  }
};
template <typename T, typename P>
METAL_FUNC Tokens<T, P> tokens(P start, int64_t slot_step, int64_t channel_step) {
  return Tokens<T, P>{start, slot_step, channel_step};
}

// The same of affine quantized arrays; a word holds 32 / BITS channels, the first in the lowest bits.
template <int BITS, int GROUP, typename W, typename S>
struct QuantizedTokens {
  Tokens<uint, W> words;
  Tokens<float, S> scales, biases;
  float2 pair(int slot, int channel) const {
    const uint word = words.start[slot * words.slot_step + channel * BITS / 32 * words.channel_step];
    const uint first = word >> (channel * BITS % 32), mask = (1u << BITS) - 1;
    const float scale = scales.start[slot * scales.slot_step + channel / GROUP * scales.channel_step];
    const float bias = biases.start[slot * biases.slot_step + channel / GROUP * biases.channel_step];
    return float2(scale * float(first & mask) + bias, scale * float((first >> BITS) & mask) + bias);
  }
};
template <int BITS, int GROUP, typename W, typename S>
METAL_FUNC QuantizedTokens<BITS, GROUP, W, S> quantized_tokens(
    Tokens<uint, W> words, Tokens<float, S> scales, Tokens<float, S> biases) {
  return QuantizedTokens<BITS, GROUP, W, S>{words, scales, biases};
}
"""
)


def _tokens(dtype: str, name: str) -> str:
    strides = f"{name}_strides"
    return f"tokens<{dtype}>({name} + (b * {strides}[0] + g * {strides}[1]), {strides}[2], {strides}[3])"


def _quantized_tokens(name: str) -> str:
    scales = ", ".join(_tokens("float", f"{name}_{part}") for part in ("scales", "biases"))
    return f"quantized_tokens<{name.upper()}_BITS, {name.upper()}_GROUP>({_tokens('uint', name)}, {scales})"


_ATTEND = """
    // Columns of a score matrix: the keys that all simdgroups hold, at least BLOCK.
    constexpr int KEYS = SIMDGROUPS * HELD * 8;
    constexpr int BLOCK_FRAGMENTS = (BLOCK + 7) / 8, ROWS = (HEADS + 7) / 8 * 8;
    const int n_pairs = sizes[0], pairs_per_group = sizes[1];
    const int G = block_ids_shape[1], L = block_ids_shape[2], k = block_ids_shape[3];
    const int thread_index = thread_index_in_threadgroup;
    const int lane = thread_index_in_simdgroup, simdgroup = simdgroup_index_in_threadgroup;
    const int r = row_in_fragment(lane), c = column_in_fragment(lane);
    threadgroup T query[ROWS * (D + PADDING)];
    threadgroup float weights[ROWS * (KEYS + PADDING)];
    // Our keys: fragment [i][d] is keys 8 (HELD simdgroup + i).., channels 8 d...
    simdgroup_matrix<KV, 8, 8> held_keys[HELD][D / 8];
    // Our channels of all values: fragment [n][i] is keys 8 n.., channels 8 (HELD_V simdgroup + i)...
    simdgroup_matrix<KV, 8, 8> held_values[BLOCK_FRAGMENTS][HELD_V];
    int held = -1;

    const int pair0 = threadgroup_position_in_grid.x * pairs_per_group;
    for (int p = pair0; p < min(pair0 + pairs_per_group, n_pairs); p++) {
      const int pair = SORTED ? int(order[p]) : p;
      const int l = pair / k % L, g = pair / k / L % G, b = pair / k / L / G;
      const int block = block_ids[b * block_ids_strides[0] + g * block_ids_strides[1]
          + l * block_ids_strides[2] + pair % k * block_ids_strides[3]];
      if (block < 0) {  // unused: MERGE won't read its output
        if (thread_index < HEADS) logsums[size_t(pair) * HEADS + thread_index] = -INFINITY;
        continue;
      }
      const int start = block * BLOCK, at = offset[b * offset_strides[0]] + l;

      if (held != (b * G + g) * sizes[2] + block) {
        held = (b * G + g) * sizes[2] + block;
        const int padding = left_padding[b * left_padding_strides[0]];
        const auto key_tokens = TOKENS(keys);
        const auto value_tokens = TOKENS(values);
        // No query is later than this.
        const int stop = min(BLOCK, offset[b * offset_strides[0]] + L - start);
        UNROLL for (int i = 0; i < HELD; i++) {
          const int key = (simdgroup * HELD + i) * 8 + r;
          UNROLL for (int d = 0; d < D / 8; d++) {
            metal::vec<KV, 2> two(KV(0));
            if (key < stop) two = key_tokens.pair(padding + start + key, d * 8 + c);
            set_elements(held_keys[i][d], two.x, two.y);
          }
        }
        UNROLL for (int n = 0; n < BLOCK_FRAGMENTS; n++) {
          const int key = n * 8 + r;
          UNROLL for (int i = 0; i < HELD_V; i++) {
            const int channel = (simdgroup * HELD_V + i) * 8 + c;
            metal::vec<KV, 2> two(KV(0));
            if (key < stop && channel < DV) two = value_tokens.pair(padding + start + key, channel);
            set_elements(held_values[n][i], two.x, two.y);
          }
        }
      }

      for (int e = thread_index; e < HEADS * D; e += SIMDGROUPS * 32)
        query[e / D * (D + PADDING) + e % D] = queries[b * queries_strides[0]
            + (g * HEADS + e / D) * queries_strides[1] + l * queries_strides[2] + e % D * queries_strides[3]];
      threadgroup_barrier(mem_flags::mem_threadgroup);

      // Scores of our keys, transposed: eight keys by eight heads in each fragment.
      for (int row0 = 0; row0 < ROWS; row0 += 8) {
        simdgroup_matrix<float, 8, 8> scores[HELD];
        UNROLL for (int i = 0; i < HELD; i++) set_elements(scores[i], 0.0f, 0.0f);
        UNROLL for (int d = 0; d < D / 8; d++) {
          simdgroup_matrix<T, 8, 8> eight_rows;
          simdgroup_load(eight_rows, query + row0 * (D + PADDING) + d * 8, D + PADDING, ulong2(0, 0), true);
          UNROLL for (int i = 0; i < HELD; i++)
            simdgroup_multiply_accumulate(scores[i], held_keys[i][d], eight_rows, scores[i]);
        }
        UNROLL for (int i = 0; i < HELD; i++) {
          const int key = (simdgroup * HELD + i) * 8 + r;
          const bool visible = key < BLOCK && start + key <= at;
          UNROLL for (int j = 0; j < 2; j++)
            weights[(row0 + c + j) * (KEYS + PADDING) + key] =
                visible ? scores[i].thread_elements()[j] * scale : -INFINITY;
        }
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);

      // A softmax over the block; the logarithm of its sum weighs the pair against the query's others.
      for (int row = simdgroup; row < HEADS; row += SIMDGROUPS) {
        threadgroup float* of_row = weights + row * (KEYS + PADDING);
        float largest = -INFINITY, sum = 0;
        for (int key = lane; key < KEYS; key += 32) largest = max(largest, of_row[key]);
        largest = simd_max(largest);
        for (int key = lane; key < KEYS; key += 32) {
          const float weight = largest == -INFINITY ? 0.0f : exp(of_row[key] - largest);
          of_row[key] = weight;
          sum += weight;
        }
        sum = simd_sum(sum);
        for (int key = lane; key < KEYS; key += 32) of_row[key] /= max(sum, 1.0f);
        if (lane == 0) logsums[size_t(pair) * HEADS + row] = largest + log(max(sum, 1.0f));
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);

      // Our channels of the output.
      for (int row0 = 0; row0 < ROWS; row0 += 8) {
        simdgroup_matrix<float, 8, 8> sums[HELD_V];
        UNROLL for (int i = 0; i < HELD_V; i++) set_elements(sums[i], 0.0f, 0.0f);
        UNROLL for (int n = 0; n < BLOCK_FRAGMENTS; n++) {
          simdgroup_matrix<float, 8, 8> eight_rows;
          simdgroup_load(eight_rows, weights + row0 * (KEYS + PADDING) + n * 8, KEYS + PADDING);
          UNROLL for (int i = 0; i < HELD_V; i++)
            simdgroup_multiply_accumulate(sums[i], eight_rows, held_values[n][i], sums[i]);
        }
        UNROLL for (int i = 0; i < HELD_V; i++)
          UNROLL for (int j = 0; j < 2; j++) {
            const int row = row0 + r, channel = (simdgroup * HELD_V + i) * 8 + c + j;
            if (row < HEADS && channel < DV)
              partials[(size_t(pair) * HEADS + row) * DV + channel] = sums[i].thread_elements()[j];
          }
      }
    }
"""


def _attend_kernel(name: str, kv_names: tuple[str, ...], tokens: dict[str, str]) -> Kernel:
    source = _ATTEND
    for array, text in tokens.items():
        source = source.replace(f"TOKENS({array})", text)
    inputs = ("queries", *kv_names, "block_ids", "order", "offset", "left_padding", "sizes", "scale")
    return Kernel(name, inputs, ("partials", "logsums"), source, _HEADER)


ATTEND = _attend_kernel(
    "attend_pairs", ("keys", "values"), {name: _tokens("KV", name) for name in ("keys", "values")}
)
ATTEND_QUANTIZED = _attend_kernel(
    "attend_pairs_quantized",
    ("keys", "keys_scales", "keys_biases", "values", "values_scales", "values_biases"),
    {name: _quantized_tokens(name) for name in ("keys", "values")},
)

MERGE = Kernel(
    "merge_pairs",
    ("partials", "logsums", "sizes"),
    ("out",),
    """
    const int G = sizes[0], L = sizes[1], k = sizes[2], n_rows = sizes[3];
    const int lane = thread_index_in_simdgroup;
    const int row = threadgroup_position_in_grid.x * SIMDGROUPS + simdgroup_index_in_threadgroup;
    if (row >= n_rows) return;
    // Row (b, g, head, l) of the output; pairs are ordered (b, g, l, k).
    const int l = row % L, head = row / L % HEADS, group = row / L / HEADS;
    const size_t first = (size_t(group) * L + l) * k * HEADS + head;

    // Thread i weighs pair i; k is at most 32.
    const float logsum = lane < k ? logsums[first + lane * HEADS] : -INFINITY;
    const float largest = simd_max(logsum);
    const float our_weight = logsum == -INFINITY ? 0.0f : exp(logsum - largest);
    const float total = simd_sum(our_weight);
    float sums[(DV + 31) / 32] = {0};
    for (int i = 0; i < k; i++) {
      const float weight = simd_shuffle(our_weight, ushort(i));
      if (weight == 0.0f) continue;  // nothing was written for an unused pair
      for (int j = 0; j < (DV + 31) / 32; j++)
        if (j * 32 + lane < DV) sums[j] += weight * partials[(first + i * HEADS) * DV + j * 32 + lane];
    }
    // The total is at least 1, but 0 for a padding query, which sees nothing.
    for (int j = 0; j < (DV + 31) / 32; j++)
      if (j * 32 + lane < DV) out[size_t(row) * DV + j * 32 + lane] = T(sums[j] / max(total, 1.0f));
    """,
)


def supports_attention(
    queries: mx.array, keys: KeysValues, values: KeysValues, *, block_size: int, k: int
) -> str | None:
    """Why :func:`attend_blocks` can't take these arrays; None if it can."""
    if queries.dtype not in (mx.bfloat16, mx.float16, mx.float32):
        return f"queries in {queries.dtype}"
    if isinstance(keys, Quantized) != isinstance(values, Quantized):
        return "only one of K and V is quantized"
    for name, x in (("K", keys), ("V", values)):
        dims = x.shape[-1]
        if dims % 8 or dims > 128:
            return f"head size {dims} of {name} is not a multiple of 8 up to 128"
        if isinstance(x, Quantized):
            if x.bits not in (4, 8):
                return f"{name} in {x.bits} bits"
        elif x.dtype != queries.dtype:
            return f"queries in {queries.dtype}, {name} in {x.dtype}"
    if k > SIMDGROUP:
        return f"{k} blocks for each query, more than {SIMDGROUP}"
    simdgroups, _ = _simdgroups(keys, values, block_size)
    heads = queries.shape[1] // keys.shape[1]
    if simdgroups * SIMDGROUP > MAX_THREADS:
        return f"blocks of {block_size} keys"
    if _threadgroup_bytes(queries, keys, block_size, simdgroups) > MAX_THREADGROUP_BYTES:
        return f"{heads} heads in a group"
    return None


def attend_blocks(
    queries: mx.array,
    keys: KeysValues,
    values: KeysValues,
    block_ids: mx.array,
    offset: Offset,
    left_padding: Padding,
    *,
    block_size: int,
    scale: float,
) -> mx.array:
    """As :func:`..attend.attend`, for K and V in the queries' dtype or quantized, with any strides.

    Returns:
        ``[B, H, L, Dv]`` in the dtype of ``queries``, summed in float32; 0 for padding queries.
        Needs ``4 * B * G * L * k * (H / G) * (Dv + 1)`` bytes between its two kernels.
    """
    batch, n_heads, length, dims = queries.shape
    groups, k = block_ids.shape[1], block_ids.shape[3]
    heads, value_dims, n_pairs = n_heads // groups, values.shape[-1], block_ids.size
    n_blocks = cdiv(keys.shape[2], block_size)
    simdgroups, held = _simdgroups(keys, values, block_size)
    is_sorted = length >= SORT_FROM
    order = _sorted_by_block(block_ids, n_blocks) if is_sorted else block_ids
    pairs_per_group = pairs_of_a_threadgroup(n_pairs, length)

    template: Template = [
        ("T", queries.dtype),
        ("KV", mx.float32 if isinstance(keys, Quantized) else keys.dtype),
        ("D", dims),
        ("DV", value_dims),
        ("BLOCK", block_size),
        ("HEADS", heads),
        ("SIMDGROUPS", simdgroups),
        ("HELD", held),
        ("HELD_V", cdiv(value_dims, 8 * simdgroups)),
        ("SORTED", is_sorted),
    ]
    kernel = ATTEND_QUANTIZED if isinstance(keys, Quantized) else ATTEND
    tokens = [*_arrays(keys), *_arrays(values)]
    if isinstance(keys, Quantized) and isinstance(values, Quantized):
        for name, x in (("KEYS", keys), ("VALUES", values)):
            template += [(f"{name}_BITS", x.bits), (f"{name}_GROUP", x.group_size)]
    sizes = ints(n_pairs, pairs_per_group, n_blocks)
    positions = [per_row(offset, batch), per_row(left_padding, batch)]
    partials, logsums = kernel(
        [queries, *tokens, block_ids, order, *positions, sizes, scalar(scale)],
        template,
        (cdiv(n_pairs, pairs_per_group), 1, 1),
        simdgroups * SIMDGROUP,
        [((n_pairs, heads, value_dims), mx.float32), ((n_pairs, heads), mx.float32)],
    )
    rows = batch * n_heads * length
    return MERGE(
        [partials, logsums, ints(groups, length, k, rows)],
        [("T", queries.dtype), ("DV", value_dims), ("HEADS", heads), ("SIMDGROUPS", MERGE_SIMDGROUPS)],
        (cdiv(rows, MERGE_SIMDGROUPS), 1, 1),
        MERGE_SIMDGROUPS * SIMDGROUP,
        [((batch, n_heads, length, value_dims), queries.dtype)],
    )[0]


def pairs_of_a_threadgroup(n_pairs: int, length: int) -> int:
    return max(1, n_pairs // SORTED_GROUPS) if length >= SORT_FROM else 1


def _arrays(x: KeysValues) -> tuple[mx.array, ...]:
    return x[:3] if isinstance(x, Quantized) else (x,)


def _sorted_by_block(block_ids: mx.array, n_blocks: int) -> mx.array:
    """Numbers of the pairs, those of a (row, group, block) together, the unused ones last."""
    batch, groups = block_ids.shape[:2]
    first = mx.arange(0, batch * groups * n_blocks, n_blocks).reshape(batch, groups, 1, 1)
    blocks = mx.where(block_ids < 0, batch * groups * n_blocks, block_ids + first)
    return mx.argsort(blocks.flatten())


def _simdgroups(keys: KeysValues, values: KeysValues, block_size: int) -> tuple[int, int]:
    """Simdgroups of a threadgroup, and the fragments of eight keys that each of them holds."""
    itemsize = 4 if isinstance(keys, Quantized) else keys.dtype.size
    fragments = HELD_FRAGMENTS[itemsize]
    simdgroups = max(cdiv(block_size, 8 * fragments), cdiv(values.shape[-1], 8 * fragments))
    return simdgroups, cdiv(block_size, 8 * simdgroups)


def _threadgroup_bytes(queries: mx.array, keys: KeysValues, block_size: int, simdgroups: int) -> int:
    rows = cdiv(queries.shape[1] // keys.shape[1], 8) * 8
    n_keys = cdiv(block_size, 8 * simdgroups) * simdgroups * 8
    return rows * ((queries.shape[3] + PADDING) * queries.dtype.size + (n_keys + PADDING) * 4)
