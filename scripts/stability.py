"""One number before the long run: how many times the base learning rate a model and optimizer survive.

    python scripts/stability.py model=large optim=clippy
    python scripts/stability.py model=large optim=adagrad,clippy hydra/launcher=joblib hydra.launcher.n_jobs=4

Overrides are those of train.py; values with commas are compared. conf/hydra/sweeper/headroom.yaml lists the options of
the search, such as headroom.seeds=5; conf/hparams_search/headroom.yaml says what a short run is (train.max_steps).
Runs and report go to the folder headroom, or to hydra.sweep.dir=DIR; a second call there does only what is missing.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

TRAIN = Path(__file__).resolve().parents[1] / "train.py"


def arguments(given: list[str]) -> list[str]:
    """The command line as train.py takes it: a multirun with this search as its sweeper."""
    long = "hydra.sweeper."
    words = [long + word.removeprefix("headroom.") if word.startswith("headroom.") else word for word in given]
    return ["-m", "hparams_search=headroom", *words]


if __name__ == "__main__":
    if any(word in ("-h", "--help") for word in sys.argv[1:]):
        print(__doc__)
        sys.exit(0)
    # As train.py itself: DDP starts that file again in its other processes, with the overrides of a job.
    sys.argv = [str(TRAIN), *arguments(sys.argv[1:])]
    try:
        runpy.run_path(str(TRAIN), run_name="__main__")
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command does what is missing")
