"""Ways in which mlx-vlm computes the logits of rows of tokens.

A way yields pieces ``(row, first position, logits [n, vocab])``.  Nothing here needs torch or
pytest, so the same ways run by hand in environments of older mlx-vlm, against saved logits.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_vlm.generate.ar import _extend_cache, _make_cache
from mlx_vlm.models.cache import make_prompt_cache

Rows = Sequence[np.ndarray]
Pieces = Iterator[tuple[int, int, np.ndarray]]
Way = Callable[[Any, Rows], Pieces]

# What stands in slots that hold no token: its content must not matter.
PADDING = 1
# Tokens of each row that a batch decodes after its prefill.
DECODED = 20
# Token counts of the pieces that a row is cut into, the rest as the last one.  The blocks hold 4 to
# 8 tokens, so most of these cut inside a block.
SPLITS = [(1,), (8, 8, 8), (3, 64), (75, 1, 1, 1), (13,) * 11]


def differences(pieces: Pieces, expected: Rows) -> dict[int, float]:
    """The largest one of each row, of which some are compared to their end."""
    largest: dict[int, float] = {}
    ends = set()
    for row, start, logits in pieces:
        wanted = expected[row][start : start + len(logits)]
        assert wanted.shape == logits.shape
        assert not np.isnan(logits).any(), f"row {row} from position {start}: NaN"
        largest[row] = max(largest.get(row, 0.0), float(np.abs(logits - wanted).max()))
        ends.add((row, start + len(logits)))
    assert any((row, len(expected[row])) in ends for row in largest)
    return largest


def feed(model: Any, tokens: np.ndarray, cache: Any = None, **keywords: Any) -> np.ndarray:
    """``[L]`` or ``[B, L]`` tokens to ``[B, L, vocab]`` logits."""
    ids = mx.array(np.atleast_2d(tokens))
    return np.array(model.language_model(ids, cache=cache, **keywords).logits)


def one_pass(model: Any, rows: Rows) -> Pieces:
    for n, row in enumerate(rows):
        yield n, 0, np.array(model(mx.array(row)[None]).logits[0])


def from_embeddings(model: Any, rows: Rows) -> Pieces:
    """As mlx-vlm's generation does, for prompts without pictures too."""
    embeddings = model.get_input_embeddings(mx.array(rows[0])[None]).inputs_embeds
    yield 0, 0, feed(model, rows[0], inputs_embeds=embeddings)[0]


def split(model: Any, rows: Rows, sizes: Sequence[int]) -> Pieces:
    row, cache, start = rows[0], make_prompt_cache(model.language_model), 0
    for piece in np.split(row, [cut for cut in np.cumsum(sizes) if cut < len(row)]):
        yield 0, start, feed(model, piece, cache)[0]
        start += len(piece)


def decode_after_prefill(model: Any, rows: Rows) -> Pieces:
    """From within every budget to far past it."""
    cache = make_prompt_cache(model.language_model)
    yield 0, 0, feed(model, rows[0][:11], cache)[0]
    yield from decode(model, cache, rows, {0: 11})


def trim(model: Any, rows: Rows, trimmed: int) -> Pieces:
    cache = make_prompt_cache(model.language_model)
    # The trimmed tokens are others than those that follow: nothing of them may stay behind.
    feed(model, np.concatenate([rows[0][:90], rows[1][:trimmed]]), cache)
    assert [entry.trim(trimmed) for entry in cache] == [trimmed] * len(cache)
    yield 0, 90, feed(model, rows[0][90:], cache)[0]


def saved_state(model: Any, rows: Rows) -> Pieces:
    """Restored without ``__init__``, as the prefix cache does it."""
    cache = make_prompt_cache(model.language_model)
    feed(model, rows[0][:77], cache)
    restored = []
    for entry in cache:
        clone = type(entry).__new__(type(entry))
        clone.state, clone.meta_state = copied(entry.state), entry.meta_state
        restored.append(clone)
    # The original goes on with other tokens: the copy may share nothing with it.
    feed(model, rows[1][:30], cache)
    yield 0, 77, feed(model, rows[0][77:], restored)[0]


def copied(state: Any) -> Any:
    if isinstance(state, (list, tuple)):
        return tuple(copied(part) for part in state)
    return None if state is None else mx.array(np.array(state))


def left_padded(model: Any, rows: Rows, n_pieces: int = 1) -> Pieces:
    """Prefill of a batch in equal pieces, then decoding."""
    prompts = [row[:-DECODED] for row in rows]
    padded, cache, start = *left_pad(model, prompts), 0
    for piece in np.array_split(padded, n_pieces, axis=1):
        yield from content_of(feed(model, piece, cache), start, prompts, padded.shape[1])
        start += piece.shape[1]
    yield from decode(model, cache, rows, ends(prompts))


def left_pad(model: Any, prompts: Rows) -> tuple[np.ndarray, Any]:
    """Padded tokens, and an empty cache that knows the padding."""
    longest = max(map(len, prompts))
    padding = [longest - len(prompt) for prompt in prompts]
    padded = np.stack(
        [np.pad(p, (n, 0), constant_values=PADDING) for p, n in zip(prompts, padding, strict=True)]
    )
    return padded, _make_cache(model.language_model, padding)


def content_of(logits: np.ndarray, start: int, prompts: Rows, width: int) -> Pieces:
    """The logits of tokens among slots ``start`` ... of left-padded prompts."""
    for n, (row, prompt) in enumerate(zip(logits, prompts, strict=True)):
        first = max(0, width - len(prompt) - start)
        if first < len(row):
            yield n, start + first - (width - len(prompt)), row[first:]


def ends(prompts: Rows) -> dict[int, int]:
    return {n: len(prompt) for n, prompt in enumerate(prompts)}


def decode(
    model: Any, cache: Any, rows: Rows, at: dict[int, int], steps: int | None = None, **keywords: Any
) -> Pieces:
    """One token of each row at a time.

    Args:
        at: row -> its next position, in the order of the batch; moved on.
    """
    for _ in range(min(len(rows[n]) - at[n] for n in at) if steps is None else steps):
        tokens = np.stack([rows[n][at[n]] for n in at])[:, None]
        for n, logits in zip(at, feed(model, tokens, cache, **keywords), strict=True):
            yield n, at[n], logits
            at[n] += 1


def right_padded(model: Any, rows: Rows) -> Pieces:
    """Prefill of a batch that a prefix cache has nothing for, in two pieces, then decoding."""
    prompts = [row[:-DECODED] for row in rows]
    cache = _make_cache(model.language_model, [0] * len(rows))
    yield from right_padded_prefill(model, cache, prompts, [0] * len(rows))
    yield from decode(model, cache, rows, ends(prompts))


def right_padded_after_prefixes(model: Any, rows: Rows) -> Pieces:
    """Mixed warm and cold rows: merged caches, so padding on both sides, then decoding."""
    prompts = [row[:-DECODED] for row in rows]
    known = [min(len(prompt) - 1, 40 * (n % 2) + 3 * n) for n, prompt in enumerate(prompts)]
    singles = []
    for prompt, length in zip(prompts, known, strict=True):
        single = make_prompt_cache(model.language_model)
        if length:
            feed(model, prompt[:length], single)
        singles.append(single)
    cache = [type(entries[0]).merge(list(entries)) for entries in zip(*singles, strict=True)]
    yield from right_padded_prefill(model, cache, prompts, known)
    yield from decode(model, cache, rows, ends(prompts))


def right_padded_prefill(model: Any, cache: Any, prompts: Rows, known: list[int]) -> Pieces:
    """Of what follows the known prefixes, as mlx-vlm's batches do it."""
    suffixes = [prompt[length:] for prompt, length in zip(prompts, known, strict=True)]
    lengths = [len(suffix) for suffix in suffixes]
    padding = [max(lengths) - length for length in lengths]
    padded = np.stack(
        [np.pad(s, (0, n), constant_values=PADDING) for s, n in zip(suffixes, padding, strict=True)]
    )
    for entry in cache:
        entry.prepare(right_padding=padding, lengths=lengths)
    logits = np.concatenate(
        [feed(model, piece, cache) for piece in np.array_split(padded, 2, axis=1)], axis=1
    )
    for n, length in enumerate(lengths):
        yield n, known[n], logits[n, :length]
    for entry in cache:
        entry.finalize()


def rows_leave_and_join(model: Any, rows: Rows) -> Pieces:
    longest, second, *started = np.argsort([-len(row) for row in rows]).tolist()
    prompts = [row[:-DECODED] for row in rows]
    padded, cache = left_pad(model, [prompts[n] for n in started])
    feed(model, padded, cache)
    at = {n: len(prompts[n]) for n in started}
    yield from decode(model, cache, rows, at, steps=5)

    # One that is longer than all others, which get more padding, and one that gets some itself.
    for n in (longest, second):
        single = make_prompt_cache(model.language_model)
        feed(model, prompts[n], single)
        cache = _extend_cache(cache, single)
        at[n] = len(prompts[n])
        yield from decode(model, cache, rows, at, steps=3)

    # The longest leaves, so that all others lose padding.
    staying = [place for place, n in enumerate(at) if n != longest]
    for entry in cache:
        entry.filter(mx.array(staying))
    del at[longest]
    yield from decode(model, cache, rows, at, steps=3)

    for place, n in enumerate(at):
        alone = [entry.extract(place) for entry in cache]
        yield from decode(model, alone, rows, {n: at[n]})


def saved_state_of_a_batch(model: Any, rows: Rows) -> Pieces:
    prompts = [row[:-DECODED] for row in rows]
    padded, cache = left_pad(model, prompts)
    feed(model, padded, cache)
    restored = _make_cache(model.language_model, [0] * len(rows))
    for clone, entry in zip(restored, cache, strict=True):
        clone.state, clone.meta_state = copied(entry.state), entry.meta_state
    yield from decode(model, restored, rows, ends(prompts))


def masked(model: Any, rows: Rows, side: str) -> Pieces:
    """Without a cache, with a trainer's mask: the third positional argument."""
    longest = max(map(len, rows))
    tokens, mask = np.full((2, len(rows), longest), PADDING)
    mask[:] = 0
    for n, row in enumerate(rows):
        where = slice(longest - len(row), None) if side == "left" else slice(0, len(row))
        tokens[n, where], mask[n, where] = row, 1
    logits = np.array(model(mx.array(tokens), None, mx.array(mask)).logits)
    for n in range(len(rows)):
        yield n, 0, logits[n][mask[n] == 1]


WAYS: dict[str, Way] = {
    "one pass": one_pass,
    "from embeddings": from_embeddings,
    **{f"split {'-'.join(map(str, sizes[:4]))}": partial(split, sizes=sizes) for sizes in SPLITS},
    "decode": decode_after_prefill,
    **{f"trim {n}": partial(trim, trimmed=n) for n in (1, 7, 40)},
    "saved state": saved_state,
    "left padded": left_padded,
    "left padded, in pieces": partial(left_padded, n_pieces=4),
    "right padded": right_padded,
    "right padded after prefixes": right_padded_after_prefixes,
    "rows leave and join": rows_leave_and_join,
    "saved state of a batch": saved_state_of_a_batch,
    "mask, padding on the left": partial(masked, side="left"),
    "mask, padding on the right": partial(masked, side="right"),
}
