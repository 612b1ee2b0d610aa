"""Sketches are exact while they are small, within their bounds later, and the same however the rows are cut."""

from __future__ import annotations

import numpy as np
import polars as pl
import pyarrow as pa
import pytest

from ranker.data.column_profile import ColumnProfile
from ranker.data.hashing import splitmix64
from ranker.data.sketches import KEPT_HASHES, KEPT_VALUES, Distinct, Frequent, RowSample


def distinct_of(values: np.ndarray) -> Distinct:
    sketch = Distinct()
    for part in np.array_split(values, 7):
        sketch.add(splitmix64(part.astype(np.int64)))
    return sketch


def test_distinct_values_are_counted_exactly_and_then_within_a_few_percent():
    few = distinct_of(np.arange(20_000) % (KEPT_HASHES - 1))
    assert few.exact
    assert few.estimate == KEPT_HASHES - 1
    many = distinct_of(np.repeat(np.arange(200_000), 2))
    assert not many.exact
    assert many.estimate == pytest.approx(200_000, rel=0.06)  # four standard errors


def test_how_much_of_one_column_is_in_another_is_known_from_their_sketches():
    items, other = distinct_of(np.arange(50_000)), distinct_of(np.arange(1_000_000, 1_020_000))
    assert distinct_of(np.arange(10_000, 30_000)).contained_in(items) == 1.0
    assert other.contained_in(items) == 0.0
    assert distinct_of(np.arange(40_000, 60_000)).contained_in(items) == pytest.approx(0.5, abs=0.05)


def test_a_frequent_value_is_never_lost_among_many_rare_ones():
    sketch, rows = Frequent(), 0
    for start in range(0, 60_000, 3000):
        values = [*range(start, start + 3000), *[-1] * 300, *[-2] * 150]
        rows += len(values)
        sketch.add(pl.Series("value", values).value_counts(name="count"))
    (first, count), (second, other) = sketch.head(2)
    assert (first, second) == (-1, -2)
    assert 20 * 300 - rows / KEPT_VALUES <= count <= 20 * 300
    assert 20 * 150 - rows / KEPT_VALUES <= other <= 20 * 150


@pytest.mark.parametrize("cut", [100, 999, 10_000])
def test_a_sample_is_uniform_bounded_and_independent_of_how_the_rows_come(cut):
    sample = RowSample(500)
    for start in range(0, 10_000, cut):
        rows = np.arange(start, min(start + cut, 10_000))
        sample.add(pa.table({"x": rows}), rows)
        assert sum(table.num_rows for table in sample._tables) <= 1000 + cut
    found = sample.table()["x"].to_numpy()
    assert len(found) == 500
    expected = np.sort(np.argsort(splitmix64(np.arange(10_000)))[:500])
    np.testing.assert_array_equal(found, expected)


def test_a_profile_counts_nulls_nans_texts_and_lists_over_all_chunks():
    numbers = ColumnProfile("x")
    for part in ([1.5, None, float("nan")], [float("inf"), -2.0, 1.5]):
        numbers.add(pa.array(part))
    assert (numbers.rows, numbers.nulls, numbers.nans, numbers.known) == (6, 1, 2, 3)
    assert (numbers.low, numbers.high, numbers.whole, numbers.distinct.estimate) == (-2.0, 1.5, False, 2)
    texts = ColumnProfile("t")
    texts.add(pa.array([" 7", "1,250", "yes", "No", "abc", "1e2", None]))
    assert (texts.numbers, texts.grouped, texts.booleans) == (2, 1, 2)
    assert (texts.low, texts.high) == (7.0, 100.0)
    lists = ColumnProfile("l")
    lists.add(pa.chunked_array([[[1, 2, 2], None], [[], [3]]]))
    assert (lists.kind, lists.longest, lists.distinct.estimate, lists.nulls) == ("list", 3, 3, 1)
    assert lists.frequent.head(1) == [(2, 2)]
    coded = ColumnProfile("d")
    coded.add(pa.array(["a", None, "b", "a"]).dictionary_encode())
    assert (coded.kind, coded.distinct.estimate, coded.frequent.head(1)) == ("string", 2, [("a", 2)])


def test_a_number_is_one_value_as_an_integer_and_as_a_float():
    one, other = ColumnProfile("a"), ColumnProfile("b")
    one.add(pa.array([1, 2, 3]))
    other.add(pa.array([1.0, 2.0, 3.0]))
    assert one.distinct.contained_in(other.distinct) == 1.0
