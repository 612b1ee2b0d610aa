"""stability.py --find-base-lr writes 1x of a log beside it, and the next run of the log takes it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from made_logs import write_raw_kuairand
from ranker.commands.base_lr_command import _folder, _write
from ranker.commands.data_commands import inspect
from ranker.data.base_lr import read_base_lr, write_base_lr
from ranker.errors import UserError
from support import ROOT


def searched(folder: Path, source: str, *, data: str = "parquet", survivors: tuple[bool, ...] = (True, False)) -> Path:
    """What a search leaves: headroom.json and the folder of a run."""
    run = folder / "run"
    run.mkdir(parents=True)
    cfg = {
        "data": {"name": data, "source": source},
        "scale": {"name": "laptop", "batch_size": 64},
        "model": {"name": "small"},
    }
    (run / "config.yaml").write_text(yaml.safe_dump(cfg))
    (run / "summary.json").write_text(json.dumps({"base_lr": 0.1}))
    runs = [
        {"rate": rate, "seed": seed, "survived": kept, "auc": 0.7 if kept else None, "reason": "", "run": str(run)}
        for rate, kept in zip((1.0, 4.0), survivors, strict=True)
        for seed in range(2)
    ]
    (folder / "headroom.json").write_text(json.dumps({"entries": [{"runs": runs}]}))
    return folder


def test_1x_is_written_beside_the_log_and_other_scales_stay(tmp_path, capsys):
    log = tmp_path / "log"
    log.mkdir()
    write_base_lr(str(log), "paper", 0.3, note="by hand")
    assert _write(searched(tmp_path / "search", str(log))) == 0
    assert read_base_lr(str(log), "laptop") == 0.4
    assert read_base_lr(str(log), "paper") == 0.3
    told = capsys.readouterr().out
    assert "1x is 0.4: 2 of 2 runs are lost there" in told
    assert f"{log / 'base_lr.yaml'}: read by" in told


def test_where_nothing_can_be_written_the_option_is_said(tmp_path, capsys):
    assert _write(searched(tmp_path / "a", "s3://bucket/log")) == 0
    assert capsys.readouterr().out.endswith("set it with data.base_lr.laptop=0.4\n")
    assert _write(searched(tmp_path / "b", str(tmp_path), data="kuairand")) == 0
    assert not (tmp_path / "base_lr.yaml").exists()


def test_searches_of_two_logs_do_not_mix():
    assert _folder(["data=parquet", "data.source=/logs/shop"]) == Path("base_lr/shop")
    assert _folder(["data=parquet", "data.source=/logs/shop", "hydra.sweep.dir='x y'"]) == Path("x y")
    assert _folder([]) == Path("base_lr/synthetic")


@pytest.mark.parametrize("text", ["- 1", "laptop: -1", "laptop: high", "laptop: .nan", "{"])
def test_a_broken_file_is_an_error_that_names_it(tmp_path, text):
    (tmp_path / "base_lr.yaml").write_text(text)
    with pytest.raises(UserError, match=r"base_lr\.yaml"):
        read_base_lr(str(tmp_path), "laptop")


def test_the_configuration_takes_the_rate_of_the_log(tmp_path, command_line, capsys):
    (tmp_path / "base_lr.yaml").write_text("laptop: 0.25\n")
    command_line("data=parquet", f"data.source={tmp_path}", "lr_mult=2", "--cfg", "job")
    cfg = yaml.safe_load(capsys.readouterr().out)
    assert cfg["data"]["base_lr"] == {"laptop": 0.25, "paper": 0.1}
    assert cfg["lr"] == 0.5


@pytest.mark.slow
def test_a_search_on_an_own_log_ends_in_a_rate_that_the_next_run_uses(tmp_path):
    raw = write_raw_kuairand(tmp_path / "kr", rows=4000)
    assert inspect([str(raw), "--propose", str(raw / "schema.yaml")]) == 0
    short = ["data=parquet", f"data.source={raw}", "scale.batch_size=64", "train.max_steps=40", "trainer=cpu"]
    options = ["headroom.seeds=1", "headroom.highest=16", "train.warmup_steps=5", "++model.widths.small.laptop=[8,8]"]
    command = [sys.executable, str(ROOT / "scripts" / "stability.py"), "--find-base-lr", *short, *options]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    rate = read_base_lr(str(raw), "laptop")
    assert f"1x is {rate:g}" in done.stdout
    train = [sys.executable, str(ROOT / "train.py"), *short, "logger=csv", f"hydra.run.dir={tmp_path / 'run'}"]
    subprocess.run(train, cwd=tmp_path, check=True, capture_output=True)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["base_lr"] == rate
