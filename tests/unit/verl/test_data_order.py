"""The order of rows: a bijection at every size, without bias, and the same for ever; mixtures that keep their proportions."""

import hashlib
import math
from collections import Counter

import numpy as np
import pytest

from agentlightning.verl.data_order import EpochOrder, MixtureOrder, RowSet, fair_schedule, permute, shares

_MASK = (1 << 64) - 1


def _by_hand(x, size, *key):
    """The swap-or-not shuffle of one index in Python's whole numbers."""
    digest = hashlib.blake2b("\0".join(map(str, key)).encode(), digest_size=16).digest()
    halves = [int.from_bytes(half, "little") for half in (digest[:8], digest[8:])]
    philox = np.random.Philox(key=np.array(halves, np.uint64))
    words = [int(word) for word in philox.random_raw(128)]
    for offset, word in zip(words[:64], words[64:], strict=True):
        partner = (offset - x) % size
        z = (max(x, partner) + word) & _MASK
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
        z ^= z >> 31
        x = partner if z >> 63 else x
    return x


@pytest.mark.parametrize("size", [1, 2, 3, 10, 1000, 10_000_000])
def test_the_shuffle_is_the_paper_s(size):
    index = np.unique(np.linspace(0, size - 1, 7, dtype=np.int64))
    assert permute(index, size, 5, 0, 2, 9).tolist() == [_by_hand(int(i), size, 5, 0, 2, 9) for i in index]


@pytest.mark.parametrize("size", [*range(1, 40), 64, 65, 255, 256, 257, 1000, 4099, 65_537])
def test_a_permutation_at_every_size(size):
    for epoch in range(3):
        assert np.array_equal(np.sort(permute(np.arange(size), size, 1, 0, epoch, 0)), np.arange(size))


def test_all_orders_of_four_are_equally_likely():
    draws, orders = 1200, math.factorial(4)
    counts = Counter(tuple(permute(np.arange(4), 4, seed, 0, 0, 0).tolist()) for seed in range(draws))
    chi_square = sum((counts[order] - draws / orders) ** 2 for order in counts) * orders / draws
    chi_square += (orders - len(counts)) * draws / orders
    assert abs(chi_square - (orders - 1)) < 4 * math.sqrt(2 * (orders - 1))


def test_a_large_order_has_no_trend_and_keeps_no_neighbours():
    size = 100_003
    place = permute(np.arange(size), size, 3, 0, 0, 0)
    for pairs in ((np.arange(size), place), (place[1:], place[:-1]), (place[2:], place[:-2])):
        assert abs(np.corrcoef(*pairs)[0, 1]) * math.sqrt(size) < 4
    assert np.count_nonzero(np.abs(np.diff(place)) == 1) < 15  # 2 expected
    other = permute(np.arange(size), size, 3, 0, 1, 0)
    assert np.count_nonzero(place == other) < 10  # 1 expected


def _order(counts, memory, limit, **more):
    edges = np.concatenate([[0], np.cumsum(counts)])
    return EpochOrder(RowSet(edges, np.array(memory)), seed=1, memory=limit, **({"shuffle": True} | more))


def test_blocks_that_cannot_be_held_together_are_shuffled_bucket_by_bucket():
    order = _order([10] * 8, [3] * 8, limit=6)
    for epoch in range(2):
        rows = order.rows(np.arange(80) + 80 * epoch)
        assert sorted(rows) == list(range(80))
        for bucket in rows.reshape(4, 20):
            blocks = sorted(set(bucket // 10))
            assert len(blocks) == 2
            assert list(bucket) != sorted(bucket)
            assert 0 < np.count_nonzero(bucket[:10] // 10 == blocks[0]) < 10  # the two are mixed
    assert list(order.rows(np.arange(80))) != list(order.rows(np.arange(80, 160)))
    assert [int(order.rows(np.array([p]))[0]) for p in range(70, 90)] == list(order.rows(np.arange(70, 90)))
    for position in (0, 33, 79, 81):
        bucket = order.rows(position // 20 * 20 + np.arange(20))
        assert {order.another(position, attempt) for attempt in range(1, 30)} <= set(bucket.tolist())


def test_blocks_that_fit_are_shuffled_as_one_and_a_block_too_large_is_one_bucket():
    assert list(_order([10, 30], [3, 3], 6).rows(np.arange(40))) == list(_order([40], [0], 6).rows(np.arange(40)))
    rows = _order([5, 7, 9], [9, 9, 9], limit=6).rows(np.arange(21))
    assert sorted(rows) == list(range(21))
    assert sum(np.diff(np.searchsorted([5, 12], rows, side="right")) != 0) == 2


def test_unshuffled_rows_stand_in_the_files_order():
    assert list(_order([3, 4], [9, 9], 1, shuffle=False).rows(np.arange(9))) == [0, 1, 2, 3, 4, 5, 6, 0, 1]


@pytest.mark.parametrize("weights", [[1], [1, 1], [3, 1], [5, 3, 2], [0.7, 0.2, 0.1], [1, 1, 1], [math.pi, math.e, 1, 0.05]])
def test_every_stretch_of_a_mixture_holds_the_weights_proportions(weights):
    counts = shares(weights)
    share = np.array(weights) / sum(weights)
    assert np.abs(counts / counts.sum() - share).max() < 1 / counts.sum()
    schedule = np.tile(fair_schedule(counts), 2)
    assert np.bincount(schedule).tolist() == (2 * counts).tolist()
    for source, count in enumerate(counts):
        ahead = np.cumsum(schedule == source) - count / counts.sum() * np.arange(1, len(schedule) + 1)
        assert np.abs(ahead).max() < 1  # of every stretch from the start, so less than two of any stretch


def test_exact_weights_get_the_shortest_exact_period():
    assert [shares(weights).tolist() for weights in ([3, 1], [0.7, 0.2, 0.1], [4])] == [[3, 1], [7, 2, 1], [1]]
    assert shares([math.pi, 1]).sum() == 4096


def test_each_source_of_a_mixture_goes_through_its_own_epochs():
    codes = np.array([0, 1, 0, 0, 1, 2, 0, 0, 0], dtype=np.uint16)
    edges, memory = np.array([0, 4, 9]), np.zeros(2)
    orders = [EpochOrder(RowSet(edges, memory, codes, code), shuffle=True, seed=1, stream=code) for code in (0, 1)]
    mixture = MixtureOrder(orders, [3, 1])
    rows = mixture.rows(np.arange(32))
    assert [int(mixture.rows(np.array([p]))[0]) for p in reversed(range(32))] == rows[::-1].tolist()
    first, second = rows[np.isin(rows, [0, 2, 3, 6, 7, 8])], rows[np.isin(rows, [1, 4])]
    assert (len(first), len(second)) == (24, 8)
    assert all(sorted(epoch) == [0, 2, 3, 6, 7, 8] for epoch in first.reshape(4, 6))
    assert all(sorted(epoch) == [1, 4] for epoch in second.reshape(4, 2))
    assert all(codes[mixture.another(p, 1)] == codes[rows[p]] for p in range(32))
