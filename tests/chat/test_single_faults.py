"""A call with one fault is the original call or none, and never one with other arguments."""

import random
from collections import Counter
from collections.abc import Callable

from tests.chat.tool_faults import KINDS, faulty
from tests.chat.tool_replies import read

# Of the faults that leave one reading.
LEAST = 0.99


def test_single_faults(
    count: Callable[[int, int], int], fresh_seed: int, record_property: Callable[[str, object], None]
) -> None:
    rng = random.Random(fresh_seed)
    asked, found = Counter[str](), Counter[str]()
    for _ in range(count(2_000, 20_000)):
        made = faulty(rng)
        reply, _ = read([made.text], tools=made.tools)
        calls = [call.as_dict() for call in reply.calls]
        assert calls in ([], [made.call]), (made.kind, made.text, made.tools)
        if not calls:
            assert reply.content == made.text
        if made.forced:
            asked[made.kind] += 1
            found[made.kind] += bool(calls)
    shares = {kind: round(found[kind] / asked[kind], 4) for kind in KINDS if asked[kind]}
    record_property("shares", shares)
    print(shares)
    assert sum(found.values()) >= LEAST * sum(asked.values()), shares
