"""Hydra plugin ``hydra/sweeper=headroom``: searches for the largest stable learning rate, with any launcher.

Hydra finds sweepers only in the namespace package ``hydra_plugins``, and imports all of it at every start. This module
is therefore only the plugin class; ``ranker.sweeps.headroom_search`` has the code. Options: conf/hydra/sweeper.
"""

from pathlib import Path
from typing import Any

from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


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
        self._launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        """Runs the search for every combination of the comma-separated values on the command line."""
        from ranker.sweeps.headroom_search import Options, search

        assert self.config is not None
        assert self._launcher is not None
        return search(
            arguments,
            options=Options(**self._options),
            launcher=self._launcher,
            folder=Path(self.config.hydra.sweep.dir),
            validate=self.validate_batch_is_legal,
        )
