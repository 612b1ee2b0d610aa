from __future__ import annotations

import dataclasses

import pytest
import torch

from ranker.data.batch import Batch, Ragged


def some_batch(array_log):
    return array_log(20).read(3, 13)


def same(a: Batch, b: Batch) -> bool:
    names = ("dense_BF", "onehot_BC", "labels_BT", "mask_BT", "time_ms_B", "row_B")
    lists = [(a.ragged[n].values, b.ragged[n].values) for n in a.ragged]
    lists += [(a.ragged[n].offsets, b.ragged[n].offsets) for n in a.ragged]
    return all(torch.equal(getattr(a, n), getattr(b, n)) for n in names) and all(torch.equal(x, y) for x, y in lists)


def test_taking_all_rows_in_order_changes_nothing(array_log):
    batch = some_batch(array_log)
    assert same(batch.take(torch.arange(10)), batch)


def test_rows_are_taken_in_the_order_asked_for_and_may_repeat(array_log):
    batch = some_batch(array_log)
    taken = batch.take(torch.tensor([9, 0, 0, 5]))
    assert taken.row_B.tolist() == [12, 3, 3, 8]
    assert taken.ragged["tags"].offsets.tolist() == [0, 0, 0, 0, 2]
    assert taken.ragged["tags"].values.tolist() == [8, 8]
    assert len(batch.take(torch.tensor([], dtype=torch.int64))) == 0


def test_slices_put_together_give_the_whole(array_log):
    batch = some_batch(array_log)
    parts = [batch.slice(0, 4), batch.slice(4, 4), batch.slice(4, 10)]
    assert [len(part) for part in parts] == [4, 0, 6]
    assert same(Batch.concat(parts), batch)
    assert same(Batch.concat([batch]), batch)


def test_a_slice_does_not_copy_rows(array_log):
    batch = some_batch(array_log)
    part = batch.slice(2, 5)
    assert part.dense_BF.data_ptr() == batch.dense_BF[2:].data_ptr()
    assert (
        part.ragged["tags"].values.data_ptr()
        == batch.ragged["tags"].values[batch.ragged["tags"].offsets[2] :].data_ptr()
    )


def test_ragged_lists_are_taken_and_joined():
    lists = Ragged(torch.tensor([1, 2, 3, 4, 5, 6]), torch.tensor([0, 2, 2, 5, 6]))
    taken = lists.take(torch.tensor([2, 1, 0]))
    assert (taken.values.tolist(), taken.offsets.tolist()) == ([3, 4, 5, 1, 2], [0, 3, 3, 5])
    joined = Ragged.concat([taken, lists])
    assert joined.values.tolist() == [3, 4, 5, 1, 2, 1, 2, 3, 4, 5, 6]
    assert joined.offsets.tolist() == [0, 3, 3, 5, 7, 7, 10, 11]


def test_moving_a_batch_keeps_window_and_number_and_leaves_the_opening(array_log):
    batch = some_batch(array_log)
    batch = dataclasses.replace(batch, window=4, number=9, opening=batch)
    moved = batch.to("meta")
    assert (moved.window, moved.number) == (4, 9)
    assert moved.ragged["tags"].offsets.device.type == moved.mask_BT.device.type == "meta"
    assert moved.opening.row_B.device.type == "cpu"


@pytest.mark.gpu
def test_a_pinned_batch_holds_the_same_rows(array_log):
    batch = some_batch(array_log)
    pinned = batch.pin_memory()
    assert pinned.dense_BF.is_pinned()
    assert pinned.ragged["tags"].values.is_pinned()
    assert same(pinned, batch)
    assert same(pinned.to("cuda", non_blocking=True).to("cpu"), batch)
