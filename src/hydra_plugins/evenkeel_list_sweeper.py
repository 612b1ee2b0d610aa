"""``hydra/sweeper=list hydra.sweeper.jobs=FILE``: launches the jobs of a file, with whichever launcher is configured.

Hydra takes sweepers from the namespace package ``hydra_plugins`` alone and imports all of it at every start, so this
module is no more than the plugin; what it does is in ``ranker.sweeps.jobs_file``.
"""

# No "from __future__ import annotations": Hydra runs plugins before they are in sys.modules, where dataclasses would
# look for what a written-out annotation means.
from dataclasses import dataclass
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.types import Override
from omegaconf import MISSING


@dataclass
class ListSweeperConf:
    """Options of the sweeper.

    Attributes:
        jobs: a YAML or JSON file with a list of lists of overrides.
        max_batch_size: hand at most so many jobs to the launcher at once; null for all.
        params: overrides common to all jobs, besides those of the command line.
    """

    _target_: str = "hydra_plugins.evenkeel_list_sweeper.ListSweeper"
    jobs: str = MISSING
    max_batch_size: int | None = None
    params: dict[str, str] | None = None


ConfigStore.instance().store(group="hydra/sweeper", name="list", node=ListSweeperConf, provider="evenkeel")


class ListSweeper(BasicSweeper):
    """Hydra's own sweeper with the jobs of a file in place of the product of comma-separated values.

    What the command line gives is common to all jobs; where it sweeps (``seed=0,1``), each job runs with each value.

    Args:
        jobs: the file.
        max_batch_size: as in Hydra's own sweeper.
        params: as in Hydra's own sweeper.
    """

    def __init__(self, jobs: str, max_batch_size: int | None = None, params: dict[str, str] | None = None) -> None:
        super().__init__(max_batch_size=max_batch_size, params=params)
        self._jobs = jobs

    def split_arguments(  # type: ignore[override]
        self, overrides: list[Override], max_batch_size: int | None
    ) -> list[list[list[str]]]:
        """The batches of jobs to launch."""
        from ranker.sweeps.jobs_file import combine, read_jobs

        common: list[list[Any]] = BasicSweeper.split_arguments(overrides, None)[0]
        jobs = combine(common, read_jobs(self._jobs))
        return list(self.split_overrides_to_chunks(jobs, max_batch_size))
