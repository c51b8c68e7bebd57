"""Who gets what of a cell, and who is to blame when a worker ends: the rules, without a process."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashmem_bench.errors import UsageError
from flashmem_bench.executors.pieces import Fault, Pieces
from flashmem_bench.limits import Limits
from flashmem_bench.session import Request

DIED = Fault("ended by SIGKILL")


def too_long(*indices: int) -> Fault:
    return Fault("took longer than 1 s", frozenset(indices))


def samples(count: int) -> list:
    return [SimpleNamespace(sample_id=f"s{index}", session_id=None) for index in range(count)]


def pieces_of(count: int, workers: int = 2, size: int = 1) -> Pieces:
    batches = [list(range(start, min(start + size, count))) for start in range(0, count, size)]
    return Pieces.of(batches, range(count), samples(count), workers, size > 1)


@given(st.integers(1, 60), st.integers(1, 4), st.integers(1, 5), st.sets(st.integers(0, 59)))
def test_every_missing_sample_is_in_one_piece_and_batches_stay_whole(count, workers, size, done):
    batches = [list(range(start, min(start + size, count))) for start in range(0, count, size)]
    wanted = set(range(count)) - done
    pieces = Pieces.of(batches, wanted, samples(count), workers, size > 1)
    taken = [pieces.take() for _ in range(pieces.waiting)]
    assert pieces.take() is None
    assert sorted(index for piece in taken for index in piece.wanted) == sorted(wanted)
    assert all(batch in batches for piece in taken for batch in piece.batches)
    assert [len(piece.wanted) for piece in taken] == sorted((len(piece.wanted) for piece in taken), reverse=True)


@settings(max_examples=200)
@given(st.integers(0, 2**32), st.integers(1, 24), st.integers(1, 4), st.integers(1, 4))
def test_whatever_ends_the_workers_the_guilty_fail_and_nobody_else(seed, count, workers, size):
    """Workers meet killers, hanging samples and accidents in a random order until nothing is left."""
    dice = random.Random(seed)
    hang, kill = ({index for index in range(count) if dice.random() < 0.15} for _ in range(2))
    accidents = 2
    pieces, failed, answered = pieces_of(count, workers, size), [], []
    for _ in range(50 * count):
        piece = pieces.take()
        if piece is None:
            break
        todo = [index for batch in piece.batches for index in batch if index in piece.wanted]
        while todo:
            begun, todo = todo[:size], todo[size:]
            accident = accidents > 0 and dice.random() < 0.05
            accidents -= accident
            if set(begun) & hang:
                failed += pieces.give_back(piece, begun, too_long(*begun))
                break
            if set(begun) & kill or accident:
                failed += pieces.give_back(piece, begun, DIED)
                break
            for index in begun:
                assert pieces.finished(index)
            answered += begun
    assert not pieces.left and sorted(failed + answered) == list(range(count))
    assert hang | kill <= set(failed)
    # A sample that was under way beside one that kills and then meets an accident alone fails: nobody can tell it from
    # one that kills. Each accident finds one such sample at most.
    assert len(set(failed) - hang - kill) <= 2


def test_a_sample_that_was_finished_before_its_worker_was_stopped_is_not_to_blame():
    pieces = pieces_of(3, workers=1)
    piece = pieces.take()
    while piece and 1 not in piece.wanted:
        piece = pieces.take()
    pieces.finished(1)
    later = next(iter({0, 2}))
    assert pieces.give_back(piece, [later], too_long(1)) == []
    assert later in pieces.left and any(later in p.wanted for p in (pieces.take(), pieces.take()) if p)


def test_a_sample_that_dies_has_a_second_chance_and_one_that_is_too_slow_has_none():
    pieces = pieces_of(1, workers=1)
    piece = pieces.take()
    assert pieces.give_back(piece, [0], DIED) == []
    again = pieces.take()
    assert again.alone and again.wanted == {0}
    assert pieces.give_back(again, [0], DIED) == [0]
    assert pieces_of(1).give_back(piece, [0], too_long(0)) == [0]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"sample_timeout": 0.0}, "--sample-timeout must be a number above 0"),
        ({"cell_timeout": float("inf")}, "--cell-timeout must be a number above 0"),
        ({"worker_memory": -1.0}, "--worker-memory must be a number above 0"),
        ({"fail_on_error": 1.5}, "--fail-on-error must be a share from 0 to 1"),
        ({"fail_on_error": float("nan")}, "--fail-on-error must be a share from 0 to 1"),
    ],
)
def test_limits_that_mean_nothing_are_refused(given, said):
    with pytest.raises(UsageError, match=said):
        Limits(**given)


def test_what_a_share_of_failures_means():
    assert not Limits().exceeded(10, 10) and Limits(fail_on_error=0.0).exceeded(1, 10)
    tenth = Limits(fail_on_error=0.1)
    assert not tenth.exceeded(1, 10) and tenth.exceeded(2, 10)
    assert not Limits(fail_on_error=0.5).need_a_process and Limits(cell_timeout=1.0).need_a_process
    with pytest.raises(UsageError, match="--workers must be 1 or more"):
        Request(("hops",), ("vanilla",), workers=0)
