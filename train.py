"""Train a multitask ranker: ``python train.py model=large_dcn optim=clippy lr_mult=2``; ``--help`` lists the rest."""

from __future__ import annotations

import hydra
from omegaconf import DictConfig

from ranker import cli, config

config.register()


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> float | None:
    """Builds, trains and evaluates one run; returns the metric a sweep maximises."""
    with cli.one_line_errors():
        if config.is_sweep():
            from ranker.sweeps.job import run_job

            return run_job(cfg)
        config.check(cfg)
        from ranker.run import run  # imported late: Lightning costs seconds that --help and --cfg need not wait for

        return run(cfg)


if __name__ == "__main__":
    cli.run(main)
