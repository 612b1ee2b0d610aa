"""Going back restores every row to the bit, whatever marks were dropped meanwhile, and keeps touched rows only."""

from __future__ import annotations

import gc
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ranker.training.row_journal import Mark, RowJournal

ROWS, WIDTH = 12, 4
Tables = list[dict[str, Tensor]]


def made(rowwise: bool = False) -> Tables:
    shape = (ROWS,) if rowwise else (ROWS, WIDTH)
    return [{"weight": torch.rand(ROWS, WIDTH), "sum": torch.rand(*shape)} for _ in "ab"]


def journal_of(own: Tables) -> RowJournal:
    return RowJournal([partial(dict, table) for table in own], [ROWS] * len(own))


def state(own: Tables) -> list[Tensor]:
    return [x.clone() for table in own for x in table.values()]


def same(own: Tables, known: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(state(own), known, strict=True))


def train(journal: RowJournal, own: Tables, rows: list[list[int]]) -> None:
    for number, (table, used) in enumerate(zip(own, rows, strict=True)):
        place = torch.tensor(used, dtype=torch.int64)
        journal.note(number, place)
        table["weight"][place] += torch.rand(len(used), WIDTH)
        table["sum"][place] += 1


Step = st.lists(st.lists(st.integers(0, ROWS - 1), max_size=5), min_size=2, max_size=2)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(Step, st.booleans(), st.integers(0, 9)), min_size=1, max_size=12), st.booleans(), st.data())
def test_any_history_is_undone_and_any_row_of_it_known(
    history: list[tuple[list[list[int]], bool, int]], rowwise: bool, data: st.DataObject
) -> None:
    own = made(rowwise)
    journal = journal_of(own)
    known: dict[int, tuple[Mark, list[Tensor]]] = {}
    for step, (rows, marked, dropped) in enumerate(history):
        if marked or not known:
            known.pop(dropped, None)
            known[step] = journal.mark(), state(own)
        train(journal, own, rows)
        if data.draw(st.integers(0, 5)) == 0:
            back = data.draw(st.sampled_from(sorted(known)))
            journal.go_back(known[back][0])
            assert same(own, known[back][1])
            assert [s for s, (mark, _) in known.items() if mark.undone] == [s for s in known if s > back]
            known = {s: found for s, found in known.items() if s <= back}

    now = state(own)
    asked = torch.tensor(sorted(data.draw(st.sets(st.integers(0, ROWS - 1)))), dtype=torch.int64)
    for mark, then in known.values():
        for number in range(len(own)):
            found = journal.rows_at(mark, number, asked)
            assert torch.equal(found["weight"], then[2 * number][asked])
            assert torch.equal(found["sum"], then[2 * number + 1][asked])
    assert same(own, now)
    mark, then = known[data.draw(st.sampled_from(sorted(known)))]
    journal.put_back(mark, without=["weight"])
    assert same(own, [now[0], then[1], now[2], then[3]])
    journal.go_back(mark)
    assert same(own, then)


def test_memory_is_that_of_the_rows_used_once_each() -> None:
    own = made()
    journal = journal_of(own)
    train(journal, own, [[1, 2], [3]])
    assert journal.nbytes == 0  # nothing to go back to
    first = journal.mark()
    for _ in range(3):
        train(journal, own, [[1, 1, 2], []])
    row = 2 * 4 * WIDTH + 8
    assert journal.nbytes == 2 * ROWS + 2 * row
    second = journal.mark()
    train(journal, own, [[2, 3], [0]])
    assert journal.nbytes == 2 * ROWS + 5 * row
    del second
    gc.collect()
    third = journal.mark()
    assert journal.nbytes == 2 * ROWS + 4 * row  # row 2 is as it was at the first mark
    del first
    gc.collect()
    fourth = journal.mark()
    assert journal.nbytes == 2 * ROWS  # nobody can go back to before the third
    assert third is not fourth


def test_a_tensor_that_was_replaced_comes_back() -> None:
    own = made()
    journal = journal_of(own)
    mark, known = journal.mark(), state(own)
    train(journal, own, [[1], []])
    old, own[0]["sum"] = own[0]["sum"], torch.zeros(ROWS, WIDTH)
    train(journal, own, [[1, 2], []])
    found = journal.go_back(mark)
    assert found[0]["sum"] is old
    own[0] = found[0]
    assert same(own, known)
    later = journal.mark()
    journal.go_back(mark)
    with pytest.raises(KeyError):
        journal.go_back(later)
