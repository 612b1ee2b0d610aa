"""A signal ends a run within seconds, with its state in a checkpoint, the line to resume it and a status of failure."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest
from omegaconf.errors import OmegaConfBaseException

from ranker import cli, stop_signals
from support import (
    ROOT,
    TINY,
    TWO_RANKS,
    Finished,
    assert_equal,
    cpu_seconds,
    finished,
    metrics,
    newest_checkpoint,
    ranks_of,
    slowness,
    train_process,
    wait_for,
)

LONG = ("data.log.train_rows=2000000", "train.eval_every=0", "train.checkpoint_every=0")
SECONDS = 20  # the promise on an idle machine, where it takes 2 or 3 seconds


def slow(stage: str, folder: Path, seconds: float = 3) -> str:
    target = "slow_evaluation.SlowEvaluation"
    return f"+callbacks.slow={{_target_:{target},stage:{stage},seconds:{seconds},folder:'{folder}'}}"


def started(folder: Path, *overrides: str) -> subprocess.Popen[str]:
    return train_process(*TINY, *overrides, f"hydra.run.dir={folder}", path=ROOT / "tests", start_new_session=True)


def trained(folder: Path) -> bool:
    """Whether metrics.csv has the row of a step."""
    path = folder / "metrics.csv"
    return path.is_file() and path.read_text().count("\n") > 1


def ended(process: subprocess.Popen[str], number: int, *, status: int) -> str:
    """What a process that was sent a signal says on standard error."""
    start, limit = time.monotonic(), SECONDS * slowness(process.pid)
    _, errors = process.communicate()
    assert time.monotonic() - start < limit, errors
    assert process.returncode == status, errors
    assert "Traceback" not in errors
    assert errors.count("go on with: ") == 1, errors
    assert f"by {signal.Signals(number).name}; go on with: " in errors
    return errors


def assert_stopped(folder: Path) -> int:
    """Checks what a stopped run left, and returns the step of its checkpoint."""
    summary = finished(folder).summary
    assert summary["status"] == "failed"
    assert summary["reason"].startswith("interrupted at step ")
    step = newest_checkpoint(folder)["global_step"]
    assert summary["steps"] == step
    return step


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        pytest.param(signal.SIGUSR1, marks=pytest.mark.attack),
        pytest.param(signal.SIGHUP, marks=pytest.mark.attack),
    ],
)
def test_a_signal_in_training_leaves_a_checkpoint_and_adds_no_evaluation(tmp_path: Path, number: int) -> None:
    process = started(tmp_path, *LONG, "train.eval_every=100000", "train.log_every=1")
    wait_for(lambda: trained(tmp_path), process)
    process.send_signal(number)

    errors = ended(process, number, status=128 + number)

    assert f"resume={tmp_path}" in errors
    assert assert_stopped(tmp_path) > 0
    assert not any(name.startswith("val/") for row in metrics(tmp_path) for name in row)


@pytest.mark.attack
@pytest.mark.parametrize(("stage", "every"), [("validate", 0), ("validate", 100), ("test", 0), ("test", 8)])
def test_a_signal_in_an_evaluation_ends_it_and_the_resumed_run_ends_as_if_it_had_not_been(
    train_tiny: Callable[..., Finished], command_line: Callable[..., None], tmp_path: Path, stage: str, every: int
) -> None:
    settings = ("scale.eval_batch_size=64", f"train.checkpoint_every={every}", "train.log_every=1")
    whole = train_tiny(tmp_path / "whole", *settings)
    stopped = tmp_path / "stopped"
    process = started(stopped, *settings, slow(stage, tmp_path))
    wait_for((tmp_path / stage).exists, process)
    process.send_signal(signal.SIGTERM)

    ended(process, signal.SIGTERM, status=143)
    assert assert_stopped(stopped) == (8 if stage == "validate" else 24)
    values = [name for row in metrics(stopped) for name in row if name.startswith("val/")]
    assert stage == "test" or not values

    command_line(f"resume={stopped}", "trust=[slow_evaluation.SlowEvaluation]", f"hydra.run.dir={tmp_path / 'unused'}")
    assert finished(stopped).summary["metrics"] == whole.summary["metrics"]
    assert finished(stopped).summary["status"] == "completed"
    assert metrics(stopped) == metrics(whole.folder)
    if every:  # else the undisturbed run has none
        expected, got = newest_checkpoint(whole.folder), newest_checkpoint(stopped)
        for part in ("global_step", "state_dict", "optimizer_states", "train_auc_by_rank"):
            assert_equal(expected[part], got[part], part)


@pytest.mark.attack
@pytest.mark.parametrize("hit", [(0,), (1,), (0, 1)], ids=["rank 0", "rank 1", "both"])
@pytest.mark.parametrize("where", ["train", "validate", "test"])
def test_a_signal_to_any_rank_ends_both(tmp_path: Path, hit: tuple[int, ...], where: str) -> None:
    folder = tmp_path / "run"
    if where == "train":
        process = started(folder, *LONG, *TWO_RANKS)
        wait_for(lambda: trained(folder), process)
    else:
        every = "train.eval_every=4" if where == "validate" else "train.eval_every=0"
        settings = (every, "train.max_steps=8", "scale.eval_batch_size=64", slow(where, tmp_path))
        process = started(folder, *TWO_RANKS, *settings)
        wait_for((tmp_path / where).exists, process)
    ranks = ranks_of(process)
    for rank in hit:
        os.kill(ranks[rank], signal.SIGTERM)

    ended(process, signal.SIGTERM, status=143)

    step = assert_stopped(folder)
    assert where == "train" or step == (4 if where == "validate" else 8)
    assert not any(alive(pid) for pid in ranks)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


@pytest.mark.attack
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("seconds", [0.3, 1.0, 2.0])  # of CPU time, which a busy machine does not change much
def test_a_signal_while_starting_ends_in_one_line(tmp_path: Path, number: int, seconds: float) -> None:
    process = started(tmp_path, *LONG)  # it trains after three
    wait_for(lambda: cpu_seconds(process.pid) >= seconds, process)
    start, limit = time.monotonic(), SECONDS * slowness(process.pid)
    process.send_signal(number)
    _, errors = process.communicate()
    assert time.monotonic() - start < limit
    assert "Traceback" not in errors
    assert len(errors.strip().splitlines()) == 1, errors
    assert process.returncode in (128 + number, 1)


def stopped_in_a_library() -> None:
    """OmegaConf has done so while Hydra was imported."""
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    except BaseException as error:
        raise OmegaConfBaseException("object_type=None") from error


@pytest.mark.parametrize("inside", [nullcontext, cli.one_line_errors])
def test_an_error_that_a_library_makes_of_a_stop_is_the_stop(
    inside: Callable[[], AbstractContextManager[None]], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended, stop_signals.one_line(), inside():
        stopped_in_a_library()

    assert ended.value.code == 143
    assert capsys.readouterr().err == "stopped by SIGTERM before training began; nothing was lost\n"
    with pytest.raises(OmegaConfBaseException), stop_signals.one_line():
        raise OmegaConfBaseException("without a signal")


@pytest.mark.attack
@pytest.mark.parametrize("launcher", ["basic", "joblib"])
def test_a_signal_ends_a_sweep_which_the_same_command_goes_on_with(tmp_path: Path, launcher: str) -> None:
    sweep = ("-m", *TINY, "seed=0,1,2", "train.eval_every=0", "train.checkpoint_every=0", f"hydra.sweep.dir={tmp_path}")
    sweep = (*sweep, f"hydra/launcher={launcher}", *(("hydra.launcher.n_jobs=2",) if launcher == "joblib" else ()))
    sweep = (*sweep, "data.log.train_rows=2000000")
    process = train_process(*sweep)
    wait_for(lambda: any(map(trained, tmp_path.glob("*/"))), process)
    process.send_signal(signal.SIGTERM)

    _, errors = process.communicate()

    assert process.returncode == 143, errors
    assert "Traceback" not in errors
    assert "jobs did not end; run the same command to continue" in errors
    reasons = [finished(path.parent).summary["reason"] for path in tmp_path.glob("*/summary.json")]
    assert reasons
    assert all(reason.startswith("interrupted at step ") for reason in reasons)
    assert list(tmp_path.glob("*/checkpoints/*.ckpt"))


def test_an_ignored_signal_stays_ignored(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_signals.taken_over():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop_signals.received()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    ("number", "second"), [(signal.SIGINT, True), (signal.SIGTERM, False), (signal.SIGUSR1, False)]
)
def test_a_second_ctrl_c_is_offered_to_who_has_pressed_the_first(
    number: signal.Signals, second: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    with stop_signals.taken_over(), stop_signals.gentle_after_start():
        stop_signals.gently()
        os.kill(os.getpid(), number)

    said = capsys.readouterr().err
    assert said.count("stopping after this step") == 1
    assert ("Ctrl-C" in said) == second
    assert (number.name in said) != second


def test_the_second_ctrl_c_stops_at_once_and_handlers_are_given_back(capsys: pytest.CaptureFixture[str]) -> None:
    before = [signal.getsignal(number) for number in stop_signals.SIGNALS]
    with stop_signals.taken_over():
        stop_signals.gently()
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)  # a scheduler sends more than one
        assert stop_signals.received() == signal.SIGINT
        with pytest.raises(stop_signals.Stopped):
            os.kill(os.getpid(), signal.SIGINT)
    assert [signal.getsignal(number) for number in stop_signals.SIGNALS] == before
    assert capsys.readouterr().err.count("stopping after this step") == 1
