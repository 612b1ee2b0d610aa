"""The journal of a sweep: states of jobs, time left, and durations in words."""

from __future__ import annotations

from pathlib import Path

from ranker.sweeps.journal import Account, Journal, duration


def test_the_account_is_the_latest_word_of_each_job(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.begin(4)
    journal.add(0, "done before", run=tmp_path)
    for job in (1, 2, 3):
        journal.add(job, "started", run=tmp_path)
    journal.add(1, "diverged", run=tmp_path)
    journal.add(2, "failed", run=tmp_path / "two", reason="no disk")
    with journal.path.open("a") as file:
        file.write('{"job": 3, "sta')  # a job in the middle of writing

    account = journal.read()

    assert (account.done, account.missing) == (3, 1)
    assert account.failures == [(str(tmp_path / "two"), "no disk")]
    line = account.line(account.began + 20)
    assert line == "sweep: 3 of 4 jobs done (1 diverged, 1 failed, 1 done before, 1 running, 10 s left)"


def test_jobs_done_before_do_not_make_the_rest_look_quick() -> None:
    account = Account(jobs=10, began=0.0, states=dict.fromkeys(range(5), "done before"))
    assert account.seconds_left(1.0) is None

    account.states[5] = "completed"
    assert account.seconds_left(60.0) == 240.0


def test_a_new_call_begins_a_new_account(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.begin(2)
    journal.add(0, "failed", run=tmp_path, reason="no disk")
    journal.begin(None)

    assert journal.read().states == {}


def test_durations_read_as_a_person_says_them() -> None:
    assert [duration(s) for s in (4.2, 700.0, 11_100.0)] == ["4 s", "12 min", "3 h 05 min"]
