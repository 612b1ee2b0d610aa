"""Hydra plugin ``hydra/sweeper=list hydra.sweeper.jobs=FILE``: launches the jobs of a file, with any launcher.

Hydra finds sweepers only in the namespace package ``hydra_plugins``, and imports all of it at every start. This module
is therefore only the plugin class; ``ranker.sweeps.job_list`` has the code.
"""

# No "from __future__ import annotations": Hydra executes plugins before they are in sys.modules, where dataclasses
# would look up annotations that are strings.
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import MISSING, DictConfig, OmegaConf


@dataclass
class ListSweeperConf:
    """Options of the sweeper.

    Attributes:
        jobs: a YAML or JSON file with a list of lists of overrides.
        max_batch_size: number of jobs passed to the launcher at once; null for all.
        params: overrides common to all jobs, in addition to those of the command line.
    """

    _target_: str = "hydra_plugins.evenkeel_list_sweeper.ListSweeper"
    jobs: str = MISSING
    max_batch_size: int | None = None
    params: dict[str, str] | None = None


ConfigStore.instance().store(group="hydra/sweeper", name="list", node=ListSweeperConf, provider="evenkeel")


class ListSweeper(Sweeper):
    """Launches the jobs of a file.

    Overrides of the command line are common to all jobs. If one has several values (``seed=0,1``), each job runs with
    each value.

    Args:
        jobs: the file.
        max_batch_size: number of jobs passed to the launcher at once; None for all.
        params: overrides common to all jobs, in addition to those of the command line.
    """

    def __init__(self, jobs: str, max_batch_size: int | None = None, params: dict[str, str] | None = None) -> None:
        self._jobs, self._max_batch_size, self._params = jobs, max_batch_size, params or {}
        self._launcher: Launcher | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Called by Hydra before the sweep."""
        self.hydra_context, self.config = hydra_context, config
        self._launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        """Launches the jobs in batches, as Hydra's default sweeper does."""
        from ranker.sweeps.hydra_private import expand, parse
        from ranker.sweeps.job_list import combine, read_jobs

        assert self.config is not None
        assert self.hydra_context is not None
        assert self._launcher is not None
        common = [*(f"{key}={value}" for key, value in self._params.items()), *arguments]
        jobs = combine(expand(parse(common, self.hydra_context.config_loader)), read_jobs(self._jobs))
        folder = Path(self.config.hydra.sweep.dir)
        folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(self.config, folder / "multirun.yaml")
        size = self._max_batch_size or len(jobs)
        returns = []
        for first in range(0, len(jobs), size):
            batch = jobs[first : first + size]
            self.validate_batch_is_legal(batch)
            returns.append(self._launcher.launch(batch, initial_job_idx=first))
            for result in returns[-1]:
                _ = result.return_value  # raises the error of the job, if it failed
        return returns
