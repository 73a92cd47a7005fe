"""What a front believes that a replica has read."""

from __future__ import annotations

import random

from stallfree.replicas.prefixes import Prefixes, blocks_of


def test_a_block_is_known_by_all_before_it() -> None:
    blocks = blocks_of([1, 2, 3, 4, 5], 2)
    assert len(blocks) == 2
    assert blocks_of([1, 2, 3, 4], 2) == blocks
    assert blocks_of([1, 2, 9, 4], 2)[0] == blocks[0]
    assert blocks_of([9, 2, 3, 4], 2)[1] != blocks[1]
    assert blocks_of([1], 2) == []


def test_the_longest_common_beginning_counts() -> None:
    own = Prefixes(100)
    rng = random.Random(0)
    first = [rng.randrange(1000) for _ in range(64)]
    own.note(blocks_of(first, 8))
    assert own.num_known(blocks_of(first, 8)) == 8
    assert own.num_known(blocks_of([*first[:30], *first], 8)) == 3
    assert own.num_known(blocks_of(first[1:], 8)) == 0


def test_what_was_not_seen_for_longest_is_forgotten_from_its_end() -> None:
    own = Prefixes(6)
    one, two = blocks_of(range(8), 2), blocks_of(range(100, 108), 2)
    own.note(one)
    own.note(two)
    assert own.num_known(two) == 4
    assert own.num_known(one) == 2
    own.note(one)
    assert own.num_known(one) == 4
    assert own.num_known(two) == 2
