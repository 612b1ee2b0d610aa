"""What a large table costs when it is sharded: memory of a process, time of a step."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from support import ROOT

pytest.importorskip("torchrec", reason="make test-torchrec installs it and runs this")
SMALL, LARGE = 100_000, 4_000_000


def measured(rows: int, *words: str) -> dict[str, float]:
    command = [sys.executable, str(ROOT / "scripts" / "bench" / "bench_sharded.py"), f"--rows={rows}", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_ranks_share_the_memory_and_a_step_does_not_know_the_size_of_the_table() -> None:
    local = [measured(rows, "--local") for rows in (SMALL, LARGE)]
    ranks = [measured(rows) for rows in (SMALL, LARGE)]
    rowwise = [measured(rows, "--optimizer=rowwise_adagrad") for rows in (SMALL, LARGE)]

    def grown(found: list[dict[str, float]]) -> float:
        return found[1]["peak_mib"] - found[0]["peak_mib"]

    assert grown(local) > 400  # 4e6 * 16 * 4 bytes, and accumulators
    assert grown(ranks) < 0.6 * grown(local)
    assert grown(rowwise) < 0.4 * grown(local)
    assert ranks[1]["step_cpu_ms"] < 2 * ranks[0]["step_cpu_ms"]  # of a table of forty times the rows
