"""The headroom search with a fake launcher that only writes the summaries of runs."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hydra.core.utils import JobReturn
from omegaconf import OmegaConf

from ranker.errors import UserError
from ranker.sweeps.headroom_search import Options, search

OPTIONS = Options(lowest=0.125, highest=64, step=8, tolerance=1.5, points=1, seeds=2, confidence=0.9, min_auc=0.52)


class Launcher:
    """Runs survive up to the learning rate that their optimizer stands.

    Args:
        folder: where run folders go.
        limits: by optimizer, the largest rate that survives.
        fail: whether a run fails, by its values.
        stop_after: rounds after which the user interrupts.
    """

    def __init__(
        self,
        folder: Path,
        limits: Mapping[str, float],
        *,
        fail: Callable[[Mapping[str, str]], bool] = lambda values: False,
        stop_after: int = 1000,
    ) -> None:
        self.folder, self.limits, self.fail, self.stop_after = folder, limits, fail, stop_after
        self.rounds: list[list[Mapping[str, str]]] = []

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        if len(self.rounds) == self.stop_after:
            raise KeyboardInterrupt
        jobs = [dict(item.split("=", 1) for item in overrides) for overrides in job_overrides]
        assert initial_job_idx == sum(map(len, self.rounds))
        self.rounds.append(jobs)
        return [self._run(number + initial_job_idx, values) for number, values in enumerate(jobs)]

    def _run(self, number: int, values: Mapping[str, str]) -> JobReturn:
        folder = self.folder / str(number)
        folder.mkdir(parents=True)
        lives = float(values["lr_mult"]) <= self.limits[values["optim"]]
        status = "failed" if self.fail(values) else "completed" if lives else "diverged"
        metrics: dict[str, Any] = {"test/click/auc": 0.7 if lives else None}
        reason = {"failed": "OutOfMemory", "diverged": "lost"}.get(status, "")
        summary = {"status": status, "reason": reason, "metrics": metrics, "steps": 9}
        (folder / "summary.json").write_text(json.dumps(summary))
        return JobReturn(hydra_cfg=OmegaConf.create({"hydra": {"runtime": {"output_dir": str(folder)}}}))


def run(launcher: Launcher, *arguments: str, options: Options = OPTIONS) -> Any:
    return search(
        arguments,
        options=options,
        launcher=launcher,
        folder=launcher.folder,
        validate=lambda batch: None,  # type: ignore[arg-type]
    )


def test_two_optimizers_are_searched_in_the_same_rounds_and_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    launcher = Launcher(tmp_path, {"adagrad": 0.4, "clippy": 1000.0})

    adagrad, clippy = run(launcher, "model=small", "optim=adagrad,clippy")

    assert {(job["optim"], job["lr_mult"]) for job in launcher.rounds[1]} == {("adagrad", "0.125")}
    assert all(job["model"] == "small" for jobs in launcher.rounds for job in jobs)
    assert adagrad.found.low <= 0.4 < adagrad.found.high
    assert str(clippy.found) == ">= 64x"
    out = capsys.readouterr().out
    assert "lr headroom of optim=clippy: >= 64x" in out
    assert "beside the first" in out
    saved = json.loads((tmp_path / "headroom.json").read_text())
    assert [entry["label"] for entry in saved["entries"]] == ["optim=adagrad", "optim=clippy"]
    assert saved["entries"][0]["headroom"]["value"] == pytest.approx(adagrad.found.value)
    with (tmp_path / "headroom.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == sum(map(len, launcher.rounds))
    assert {row["outcome"] for row in rows} == {"survived", "lost"}
    assert (tmp_path / "headroom.png").stat().st_size > 10_000


def test_one_combination_needs_no_label_and_a_failed_run_is_said_and_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    launcher = Launcher(tmp_path, {"gc": 5.0}, fail=lambda values: values["seed"] == "1" and values["lr_mult"] == "8")

    (entry,) = run(launcher, "optim=gc")

    assert entry.found.low <= 5.0 < entry.found.high
    assert next(level.runs for level in entry.levels if level.rate == 8) == 1
    out = capsys.readouterr().out
    assert "1 runs failed and are not counted, the first: OutOfMemory" in out
    assert "lr headroom: " in out


def test_where_every_run_fails_nothing_is_claimed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (entry,) = run(Launcher(tmp_path, {"gc": 5.0}, fail=lambda values: True), "optim=gc")

    assert entry.found is None
    assert "lr headroom: not known, every run failed" in capsys.readouterr().out
    assert not (tmp_path / "headroom.png").exists()


def test_an_interrupted_search_reports_what_it_knows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    launcher = Launcher(tmp_path, {"gc": 5.0}, stop_after=1)

    with pytest.raises(KeyboardInterrupt):
        run(launcher, "optim=gc")

    assert "lr headroom: 2.83x [1x, 8x]" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "headroom.json").read_text())["entries"][0]["runs"]) == 6


@pytest.mark.parametrize(("override", "cure"), [("lr_mult=2", "headroom.highest"), ("seed=0,1", "headroom.seeds")])
def test_what_the_search_sets_itself_cannot_be_given(override: str, cure: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=cure):
        run(Launcher(tmp_path, {}), "optim=gc", override)
