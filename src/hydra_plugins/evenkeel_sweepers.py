"""Hydra's sweeper plugins ``list`` and ``headroom``; their options are in conf/hydra/sweeper.

Hydra accepts sweepers from the namespace package ``hydra_plugins`` only, and every Hydra app in the environment imports
this module when it starts. It must therefore stay cheap: it imports nothing but Hydra, registers no configuration and
prints nothing. The work is done by ``ranker.sweeps``, which is imported when a sweep begins.
"""

from pathlib import Path
from typing import Any

from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf


def _launcher(hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> Launcher:
    return Plugins.instance().instantiate_launcher(
        hydra_context=hydra_context, task_function=task_function, config=config
    )


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
        self._launcher = _launcher(hydra_context, task_function, config)

    def sweep(self, arguments: list[str]) -> Any:
        """Launches the jobs in batches, as Hydra's default sweeper does."""
        from ranker.hydra_private import expand, parse
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


class HeadroomSweeper(Sweeper):
    """Launches rounds of short runs until the largest stable learning rate of each combination is bracketed.

    Args:
        options: as in ``ranker.sweeps.headroom_search.Options``.
    """

    def __init__(self, **options: Any) -> None:
        self._options = options
        self._launcher: Launcher | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Called by Hydra before the sweep."""
        self.hydra_context, self.config = hydra_context, config
        self._launcher = _launcher(hydra_context, task_function, config)

    def sweep(self, arguments: list[str]) -> Any:
        """Runs the search for every combination of the comma-separated values on the command line."""
        from ranker.sweeps.headroom_search import Options, search
        from ranker.sweeps.job_list import wants_groups

        assert self.config is not None
        assert self._launcher is not None
        config = self.config

        def before(jobs: list[list[str]], first: int) -> None:
            if wants_groups(config):
                from ranker.sweeps.vectorize import train_groups

                train_groups(config, jobs, first=first)

        return search(
            arguments,
            options=Options(**self._options),
            launcher=self._launcher,
            folder=Path(self.config.hydra.sweep.dir),
            validate=self.validate_batch_is_legal,
            before=before,
        )
