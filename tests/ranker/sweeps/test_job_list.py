"""How many jobs of a sweep run at a time on this machine."""

from __future__ import annotations

from omegaconf import OmegaConf

from ranker.runs.provenance import cores
from ranker.sweeps.job_list import is_parallel, jobs_at_a_time


def test_jobs_that_share_a_machine_are_counted_and_others_are_not() -> None:
    def launcher(name: str, **options: int):
        return OmegaConf.create({"_target_": f"somewhere.{name}", **options})

    assert jobs_at_a_time(launcher("JoblibLauncher", n_jobs=8), jobs=3) == 3
    assert jobs_at_a_time(launcher("JoblibLauncher", n_jobs=2), jobs=None) == 2
    assert jobs_at_a_time(launcher("JoblibLauncher", n_jobs=-1), jobs=None) == cores()
    assert jobs_at_a_time(launcher("LocalLauncher"), jobs=5) == 5
    assert jobs_at_a_time(launcher("SlurmLauncher"), jobs=5) is None
    assert not is_parallel(launcher("BasicLauncher"))
