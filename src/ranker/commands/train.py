"""``evenkeel train`` and ``evenkeel headroom``: the commands that take Hydra overrides."""

from __future__ import annotations

import argparse
import os
import sys

import hydra
from omegaconf import DictConfig

from ranker import cli, config, deferred, launched, meeting
from ranker.config_overrides import quoted, resumed_words, warm_start_word
from ranker.errors import UserError
from ranker.installation import conf_folder
from ranker.runs.run_folder import CHECKPOINT_VARIABLE, RUN_DIR_VARIABLE

config.register()

HEADROOM = """Find how many times the base learning rate a model and optimizer survive, with short runs.

    python scripts/stability.py model=large optim=clippy
    python scripts/stability.py model=large optim=adagrad,clippy hydra/launcher=joblib hydra.launcher.n_jobs=4

With --find-base-lr it finds 1x itself; --find-base-lr --help says more.
`evenkeel headroom` takes the same arguments. Overrides are those of train.py; comma-separated values are compared.
--vectorize K trains up to K runs of a round as one (docs/sweeps.md). They differ only in seed, rate or optimizer, and
share the order of rows of seed 0.
conf/hydra/sweeper/headroom.yaml lists the options of the search, such as headroom.seeds=5.
conf/hparams_search/headroom.yaml says how long a short run is (train.max_steps). Runs and report go to the folder
headroom, or to hydra.sweep.dir=DIR. A second call with the same folder runs only what is missing.
"""


@hydra.main(version_base="1.3", config_path=str(conf_folder()), config_name="config")
def _main(cfg: DictConfig) -> float | None:
    """Builds, trains and evaluates one run; returns the metric that a sweep maximises."""
    with cli.one_line_errors():
        if config.is_sweep():
            from ranker.sweeps.job import run_job

            return run_job(cfg)
        with cli.no_folder_of_a_mistake():
            config.check(cfg)
            deferred.defer()
            from ranker.run import run  # imported late: Lightning costs seconds that --help and --cfg need not wait for

            return run(cfg)


def train() -> None:
    """Trains a model, or several with ``-m``; ``sys.argv`` holds Hydra's arguments."""
    # The other processes of a distributed run are started from sys.argv[0], which must be a file that trains. The
    # console command is none, because it needs the word "train" before the overrides.
    if not sys.argv[0].endswith("train.py"):
        sys.argv[0] = __file__
    if {"--cfg", "-c", "--cfg=job", "-cjob"} & set(sys.argv) and "--resolve" not in sys.argv:
        sys.argv.append("--resolve")  # shows the learning rate and widths that will be used, not ${...}
    with cli.one_line_errors(outermost=True):
        words = [warm_start_word(word) for word in sys.argv[1:]]
        sys.argv[1:] = resumed_words(words, conf=conf_folder())
        ranks = _met()
    status = 1
    try:
        cli.run(_main)
        status = 0
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        raise
    finally:
        if ranks is not None:
            ranks.end(status)


def _met() -> meeting.Meeting | None:
    """Lets the ranks that a launcher has started agree on the run folder, before Hydra makes one; adds it to sys.argv.

    Ends a rank above 0 here, quietly, where rank 0 ends without a run.

    Raises:
        UserError: a sweep was asked for, or the ranks do not find each other.
    """
    found = launched.launch()
    if found is None or RUN_DIR_VARIABLE in os.environ:
        return None
    if found.size > 1 and {"-m", "--multirun"} & set(sys.argv):
        if found.rank:
            sys.exit(2)
        raise UserError(
            f"{found.program} has started {found.size} processes of one run, and -m is a sweep of many runs; leave "
            f"{found.program} out, or give each run its own {found.program}"
        )
    if found.rank:
        deferred.defer()
        import ranker.run  # noqa: F401  # while rank 0 reads the configuration
    try:
        ranks = meeting.meet()
        assert ranks is not None
        told = ranks.told() if found.rank else ranks.earlier
    except UserError:
        if found.rank > 1:  # rank 0 or 1 says it
            sys.exit(2)
        raise
    if isinstance(told, int):
        sys.exit(told)
    if isinstance(told, meeting.Told):
        os.environ[RUN_DIR_VARIABLE] = told.folder
        if told.checkpoint is not None:
            os.environ[CHECKPOINT_VARIABLE] = told.checkpoint
    folder = told.folder if isinstance(told, meeting.Told) else told
    if folder is not None:
        sys.argv += [f"hydra.run.dir={quoted(str(folder))}", "hydra.output_subdir=null"]
    return ranks


def headroom() -> int:
    """Searches for the largest stable learning rate, or for 1x: a multirun with the headroom sweeper."""
    given = sys.argv[1:]
    from ranker.commands import base_lr_command

    finds_base_lr = base_lr_command.OPTION in given
    given = [word for word in given if word != base_lr_command.OPTION]
    if any(word in ("-h", "--help") for word in given):
        print(base_lr_command.HELP if finds_base_lr else HEADROOM, end="")
        return 0
    long = "hydra.sweeper."
    given = _vectorized(given)
    words = [long + word.removeprefix("headroom.") if word.startswith("headroom.") else word for word in given]
    sys.argv[0] = __file__
    if finds_base_lr:
        return base_lr_command.find(words, lambda: cli.run(_main))
    sys.argv = [__file__, "-m", "hparams_search=headroom", *words]
    cli.run(_main)
    return 0


def _vectorized(words: list[str]) -> list[str]:
    """The words with ``--vectorize K`` as an override."""
    if not any(word.partition("=")[0] == "--vectorize" for word in words):
        return words
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--vectorize", type=int)
    options, others = parser.parse_known_args(words)
    return [*others, f"sweep.vectorize={options.vectorize}"]


if __name__ == "__main__":
    train()
