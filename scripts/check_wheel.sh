#!/usr/bin/env bash
# Builds the wheel, installs it into an empty environment in another folder, and runs commands there.
# Needs no network: the dependencies come from the environment of $1 (default .venv), the wheel's own code does not.
set -euo pipefail
clone="$(cd "$(dirname "$0")/.." && pwd)"
python="${1:-$clone/.venv/bin/python}"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
export WANDB_MODE=offline OMP_NUM_THREADS=1
unset PYTHONPATH

# A build leaves files beside its sources, so it runs in a copy.
mkdir "$work/source"
cp -r "$clone"/{src,conf,pyproject.toml,setup.py,MANIFEST.in,README.md,LICENSE} "$work/source"
rm -rf "$work"/source/src/*.egg-info
"$python" -m pip wheel --quiet --no-build-isolation --no-deps --no-index --wheel-dir "$work" "$work/source"

# The dependencies are found behind the new environment's own packages. A .pth file of the old environment is not
# read there, so that its editable install of the clone is not found.
"$python" -m venv --without-pip "$work/env"
"$python" -m pip --python "$work/env/bin/python" install --quiet --no-deps --no-index "$work"/evenkeel_ranker-*.whl
own="$("$work/env/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
"$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > "$own/dependencies.pth"

mkdir "$work/elsewhere" && cd "$work/elsewhere"
"$work/env/bin/python" - "$own" << 'PYTHON'
import sys
from pathlib import Path

import optim
import ranker
from ranker.config import conf_folder

for found in (ranker.__file__, optim.__file__, conf_folder()):
    assert Path(found).is_relative_to(sys.argv[1]), f"{found} is not the wheel's"
PYTHON
"$work/env/bin/evenkeel" --help > /dev/null
"$work/env/bin/evenkeel" train model=small optim=clippy logger=csv trainer=cpu scale.batch_size=256 \
    data.log.train_rows=2048 data.log.eval_rows=512 data.window=2048 data.log.num_users=500 data.log.num_items=200 \
    train.max_steps=5 train.eval_every=0 train.checkpoint_every=5 train.threads=1 hydra.run.dir=run
grep -q '"status": "completed"' run/summary.json
grep -q '"steps": 5' run/summary.json
"$work/env/bin/evenkeel" report run
"$work/env/bin/evenkeel" compare run
"$work/env/bin/evenkeel" export run --min-auc 0 --min-calibration 0 --max-calibration 1e9 --min-positives 1000000
echo "the wheel works outside a clone"
