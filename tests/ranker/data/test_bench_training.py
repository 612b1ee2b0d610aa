from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch

from ranker.data.columns import Task
from ranker.data.parquet_log import ParquetLog
from ranker.data.schema import CategoricalFeature, DenseFeature, Schema


@pytest.fixture
def bench(load_script):
    return load_script("bench_training")


@pytest.fixture
def peers(load_script):
    return load_script("training_peers")


SCHEMA = Schema(
    name="made_up",
    time_column="t",
    dense=(DenseFeature(name="price", scale=0.5, transform="log1p"),),
    categorical=(
        CategoricalFeature(name="country", vocabulary=("fr", "de")),
        CategoricalFeature(name="slot", num_embeddings=7),
        CategoricalFeature(name="tags", kind="multi_hot", table="slot"),
        CategoricalFeature(name="last", column="tags", kind="sequence", num_embeddings=4, max_length=2),
    ),
    tasks=(
        Task(name="click"),
        Task(name="long", column="watch", at_least=5.0),
        Task(name="watch", type="regression", transform="log1p"),
    ),
)


def padded(ragged):
    lists = [
        ragged.values[start:end].tolist() for start, end in zip(ragged.offsets[:-1], ragged.offsets[1:], strict=True)
    ]
    return [ids + [0] * (max(map(len, lists)) - len(ids)) for ids in lists]


def test_the_other_libraries_get_the_values_that_our_loader_gives(peers, write_log):
    root = write_log({0: 20, 1: 17, 2: 5}, schema=SCHEMA)
    rows = peers.read_rows(root, None)
    ours = ParquetLog(str(root)).read(0, 37)
    assert list(rows.features) == ["price", "country", "slot", "tags", "last"]
    np.testing.assert_allclose(rows.dense["price"], ours.dense_BF[:, 0].numpy(), rtol=1e-6)
    assert np.stack([rows.ids["country"], rows.ids["slot"]], axis=1).tolist() == ours.onehot_BC.tolist()
    assert rows.lists["tags"].tolist() == padded(ours.ragged["tags"])
    assert rows.lists["last"].tolist() == padded(ours.ragged["last"])
    np.testing.assert_allclose(rows.labels, ours.labels_BT.numpy(), rtol=1e-6)
    assert rows.table({"name": "tags", "table": "slot"}) == ("slot", 8)
    assert len(peers.read_rows(root, 24).labels) == 24


def test_a_list_column_whose_longest_comes_late_is_padded_to_it(peers, write_log):
    root = write_log({0: 1, 1: 3, 2: 5}, schema=SCHEMA)  # lists of 0, then of 1, 2 and 3 ids
    rows = peers.read_rows(root, None)
    assert rows.lists["tags"].tolist() == padded(ParquetLog(str(root)).read(0, 4).ragged["tags"])


def test_a_training_loop_is_timed_without_its_first_steps_and_ended(peers, monkeypatch):
    weight = torch.nn.Parameter(torch.zeros(1))
    weight.grad = torch.ones(1)
    optimizer = torch.optim.SGD([weight], lr=1.0)
    seconds = iter(range(100))
    monkeypatch.setattr(peers.time, "perf_counter", lambda: float(next(seconds)))
    clock = peers.Clock(optimizer, steps=8)
    for _ in range(7):
        optimizer.step()
    with pytest.raises(peers.Enough):
        optimizer.step()
    assert weight.item() == -8
    rows = peers.Rows({}, labels=np.zeros((31, 1), np.float32))
    assert clock.measured(rows, 4) == {"examples": 31 - 20, "seconds": 3.0}
    assert peers.Clock(torch.optim.SGD([weight], lr=1.0), steps=None).steps == 0


def test_a_log_is_repeated_later_and_later_to_the_rows_asked_for(load_script, write_log, tmp_path):
    root, long = write_log({0: 20, 1: 17, 2: 5}, schema=SCHEMA), tmp_path / "long"
    load_script("repeat_log").main([str(root), str(long), "--rows", "90"])
    short, log = ParquetLog(str(root)), ParquetLog(str(long))
    assert (log.train_rows, log.num_rows) == (90, 95)
    every, once = log.read(0, 95), short.read(0, 42)
    assert bool((every.time_ms_B.diff() >= 0).all())
    repeated = torch.cat([torch.arange(37), torch.arange(37), torch.arange(16), torch.arange(37, 42)])
    assert torch.equal(every.onehot_BC, once.onehot_BC[repeated])
    assert torch.equal(every.labels_BT, once.labels_BT[repeated])


def test_ratios_take_the_faster_and_the_leaner_peer_within_a_round(bench):
    def done(ours, one, other):
        return {
            name: bench.Measured(*values, waited=0.01, parameters=1, version="1")
            for name, values in {"evenkeel": ours, "a": one, "b": other}.items()
        }

    rounds = [done((30.0, 4.0), (10.0, 8.0), (5.0, 10.0)), done((12.0, 4.0), (6.0, 10.0), (4.0, 8.0))]
    speed, peak, waited = bench.ratios("mmoe", rounds)
    assert (speed.value, speed.ok) == (2.5, True)
    assert (peak.value, peak.ok) == (0.5, True)
    assert (waited.value, waited.ok) == (0.01, True)
    assert not bench.ratios("mmoe", [done((19.0, 6.0), (10.0, 8.0), (5.0, 10.0))])[0].ok
    assert not bench.ratios("mmoe", [done((19.0, 6.0), (10.0, 8.0), (5.0, 10.0))])[1].ok


def test_a_process_gives_what_it_printed_and_its_peak(bench):
    printed, peak = bench.run([sys.executable, "-c", "print('done')"], threads=1)
    assert printed == "done\n"
    assert 2**20 < peak < 2**40
    with pytest.raises(RuntimeError, match=r"failed: ValueError: no such column"):
        bench.run([sys.executable, "-c", "raise ValueError('no such column')"], threads=1)


@pytest.mark.parametrize(
    ("library", "option"),
    [
        ("evenkeel", "--evenkeel-python"),
        ("deepctr-torch", "--deepctr-python"),
        ("torch-rechub", "--rechub-python"),
    ],
)
def test_a_library_that_is_missing_is_said_before_anything_is_measured(
    bench, capsys, tmp_path, monkeypatch, library, option
):
    missing, run = str(tmp_path / "python"), bench.run
    monkeypatch.setattr(bench, "run", lambda command, **given: run(command, **given) if command[0] == missing else None)
    assert bench.main(["--source", str(tmp_path), option, missing]) == 1
    assert capsys.readouterr().err == (
        f"error: no {library} for {missing}: install it there, or name another with {option}\n"
    )


@pytest.mark.slow
def test_a_missed_target_is_the_exit_status(bench, capsys, write_log, tmp_path, monkeypatch):
    speeds = {"evenkeel": 15.0, "deepctr-torch": 10.0, "torch-rechub": 5.0}

    def measured(library):
        return bench.Measured(speeds[library], 1.0 if library == "evenkeel" else 4.0, 0.0, 7, "1")

    monkeypatch.setattr(bench, "check_installed", lambda *given: None)
    monkeypatch.setattr(bench, "train_evenkeel", lambda *given: measured("evenkeel"))
    monkeypatch.setattr(bench, "train_peer", lambda library, *given: measured(library))
    source = str(write_log({0: 20, 1: 5}))
    arguments = ["--source", source, "--rows", "0", "--models", "mmoe", "--rounds"]
    arguments += ["1", "--json", str(tmp_path / "lines.json")]
    assert bench.main(arguments) == 1
    monkeypatch.setattr(bench, "products_alone", lambda *given: 100.0)  # measured once is enough: it takes seconds
    speeds["evenkeel"] = 20.0
    assert bench.main(arguments) == 0
    lines = json.loads((tmp_path / "lines.json").read_text())
    assert set(lines[0]) == {"name", "value", "unit", "target", "ok"}
    assert "mmoe: speed / faster peer" in capsys.readouterr().out


def test_the_floor_counts_every_matrix_product_of_a_step_and_nothing_else(load_script):
    floor = load_script("training_floor")
    net = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.ReLU(), torch.nn.Linear(7, 3))
    with floor.Products() as products:
        net(torch.randn(11, 5)).sum().backward()
    # Forward and the weights' gradient of both layers, the input's gradient of the second.
    assert products.flops == 2 * 11 * (2 * 5 * 7 + 3 * 7 * 3)
    assert len(products.calls) == 5
    for function, operands, out in products.calls:
        assert function(*operands, out=out).isfinite().all()


def test_an_operand_of_the_floor_lies_in_memory_as_the_step_had_it(load_script):
    floor = load_script("training_floor")
    tensor = torch.randn(6, 4).t()
    alike = floor._alike(tensor)
    assert (alike.shape, alike.stride()) == (tensor.shape, tensor.stride())
