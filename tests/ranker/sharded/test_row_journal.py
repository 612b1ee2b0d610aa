"""Going back restores every row to the bit, whatever marks were dropped meanwhile, and keeps touched rows only."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ranker.models.sharding import Shard
from ranker.training.row_journal import RowJournal

ROWS, WIDTH = 12, 4


def shards(rowwise: bool = False) -> list[Shard]:
    return [
        Shard(
            table=name,
            row=0,
            column=0,
            weight=torch.rand(ROWS, WIDTH),
            accumulator=torch.rand(ROWS) if rowwise else torch.rand(ROWS, WIDTH),
        )
        for name in ("a", "b")
    ]


def state(own: list[Shard]) -> list[torch.Tensor]:
    return [t.clone() for s in own for t in (s.weight, s.accumulator)]


def train(journal: RowJournal, own: list[Shard], rows: list[list[int]]) -> None:
    for number, (shard, used) in enumerate(zip(own, rows, strict=True)):
        place = torch.tensor(used, dtype=torch.int64)
        journal.note(number, place)
        shard.weight[place] += torch.rand(len(used), WIDTH)
        shard.accumulator[place] += 1


Step = st.lists(st.lists(st.integers(0, ROWS - 1), max_size=5), min_size=2, max_size=2)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(Step, st.booleans(), st.integers(0, 9)), min_size=1, max_size=12), st.booleans(), st.data())
def test_any_history_is_undone(history: list[tuple[list[list[int]], bool, int]], rowwise: bool, data) -> None:
    own = shards(rowwise)
    journal = RowJournal(own)
    known: dict[int, list[torch.Tensor]] = {}
    for step, (rows, marked, dropped) in enumerate(history):
        if marked or not known:
            kept = [s for s in journal.steps if s != dropped]
            journal.keep(kept)
            journal.mark(step)
            known[step] = state(own)
        train(journal, own, rows)
        if data.draw(st.integers(0, 5)) == 0:
            back = data.draw(st.sampled_from(journal.steps))
            journal.go_back(back)
            assert journal.steps[-1] == back
            assert all(torch.equal(x, y) for x, y in zip(state(own), known[back], strict=True))

    back = data.draw(st.sampled_from(journal.steps))
    journal.go_back(back)

    assert all(torch.equal(x, y) for x, y in zip(state(own), known[back], strict=True))


def test_memory_is_that_of_the_rows_used_once_each() -> None:
    own = shards()
    journal = RowJournal(own)
    train(journal, own, [[1, 2], [3]])
    assert journal.nbytes == 0  # nothing to go back to
    journal.mark(0)
    for _ in range(3):
        train(journal, own, [[1, 1, 2], []])
    row = 2 * 4 * WIDTH + 8
    assert journal.nbytes == 2 * ROWS + 2 * row
    journal.mark(1)
    train(journal, own, [[2, 3], [0]])
    assert journal.nbytes == 2 * ROWS + 5 * row
    journal.keep([0])
    assert journal.nbytes == 2 * ROWS + 4 * row  # row 2 is as it was at step 0


def test_a_lookup_that_trains_nothing_keeps_nothing_and_a_dropped_mark_is_no_place_to_go_back_to() -> None:
    own = shards()
    journal = RowJournal(own)
    journal.mark(3)
    with torch.no_grad():
        journal.note(0, torch.tensor([1]))
    assert journal.nbytes == 2 * ROWS
    journal.mark(5)
    journal.keep([5])
    with pytest.raises(KeyError):
        journal.go_back(3)
