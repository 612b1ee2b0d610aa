# Everything runs from .venv, which is made from constraints.txt on first use.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.evenkeel-installed
JOBS ?= 2
EXAMPLES := build/examples
SPARK := build/spark
TORCHREC := build/torchrec
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup train test test-slow test-attack test-gpu test-examples test-spark setup-torchrec test-torchrec check docs results-check wheel-check format lock clean

help:  ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-13s %s\n", $$1, $$2}'

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "evenkeel needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; try make PYTHON=python3.11")'
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (a few minutes the first time)"
	@# torch first and exactly: a range would let pip choose a build with gigabytes of CUDA packages
	@$(PY) -m pip install --quiet -c constraints.txt torch==$$(sed -n 's/^torch==//p' constraints.txt)
	@$(PY) -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

setup: $(STAMP)  ## make .venv and install the project with its tested versions

train: $(STAMP)  ## train on the synthetic stream; ARGS="model=small optim=adagrad" passes overrides
	@$(PY) train.py $(ARGS)

test: $(STAMP)  ## run the default tests (under 4 minutes on 2 cores)
	@# worksteal: neighbours run in one process, which makes their shared runs once, and none is idle at the end
	@OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) --dist worksteal -q $(ARGS)

test-slow: $(STAMP)  ## run the long tests too
	@OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) --dist worksteal -q -m "not gpu and not attack" $(ARGS)

test-attack: $(STAMP)  ## attack running jobs and their files, as docs/reliability.md says (up to an hour on 2 cores)
	@OMP_NUM_THREADS=1 $(PY) -m pytest -q -m attack $(ARGS)

test-gpu: $(STAMP)  ## run what only a GPU shows; two GPUs for NCCL
	@OMP_NUM_THREADS=1 $(PY) -m pytest -q -m gpu $(ARGS)

test-examples: $(STAMP)  ## run the examples for Hugging Face and torchrec too, in build/examples, an environment of their own
	@test -x $(EXAMPLES)/bin/python || $(PY) -m venv $(EXAMPLES)
	@# it sees the packages of .venv behind its own; in .venv, torchmetrics would import transformers at each start
	@$(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	  > $$($(EXAMPLES)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/project.pth
	@$(EXAMPLES)/bin/python -m pip install --quiet --no-deps -r examples/requirements.txt
	@PYTHONPATH=src OMP_NUM_THREADS=1 $(EXAMPLES)/bin/python -m pytest -q tests/optim/test_framework_examples.py $(ARGS)

test-spark: $(STAMP)  ## run the tests of prepare_data.py --engine spark in build/spark, an environment of their own (400 MB, Java 17)
	@test -x $(SPARK)/bin/python || $(PY) -m venv $(SPARK)
	@$(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	  > $$($(SPARK)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/project.pth
	@$(SPARK)/bin/python -m pip install --quiet --no-deps -r tests/requirements-spark.txt
	@PYTHONPATH=$(CURDIR)/src OMP_NUM_THREADS=1 $(SPARK)/bin/python -m pytest -q tests/ranker/data/test_spark.py $(ARGS)

setup-torchrec: $(STAMP)  ## make build/torchrec, an environment with torchrec for embeddings=torchrec (CPU)
	@test -x $(TORCHREC)/bin/python || $(PY) -m venv $(TORCHREC)
	@# it sees the packages of .venv behind its own; pip would install another torch with torchrec
	@$(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	  > $$($(TORCHREC)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/project.pth
	@$(TORCHREC)/bin/python -m pip install --quiet --no-deps -r examples/requirements-torchrec.txt

test-torchrec: setup-torchrec  ## run the tests of sharded tables, on one and two processes
	@PYTHONPATH=src OMP_NUM_THREADS=1 $(TORCHREC)/bin/python -m pytest -q tests/ranker/sharded $(ARGS)

check: $(STAMP)  ## lint, formatting, types, import contracts, the site of the docs
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy
	@$(VENV)/bin/lint-imports
	@$(MAKE) --no-print-directory docs

docs: $(STAMP)  ## build the site of the documentation into build/site; fails on a broken link or a page that is in no menu
	@# not --quiet: with it, --strict counts no warnings
	@mkdir -p build
	@NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict > build/docs.log 2>&1 || { cat build/docs.log; exit 1; }
	@echo "build/site/index.html"

results-check: $(STAMP)  ## compute every published table from the CSV files in results/; fails where a number differs
	@$(PY) scripts/reproduce.py check

wheel-check: $(STAMP)  ## build the wheel, install it into an empty environment in another folder and train 5 steps
	@$(PY) scripts/check_wheel.py

format: $(STAMP)  ## rewrite the code in the project's format
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

lock: $(STAMP)  ## write the versions installed now into constraints.txt
	@{ echo "# One tested set for everybody who uses make: pip install -c constraints.txt. Written by: make lock"; \
	  $(PY) -m pip freeze --exclude-editable | sed 's/+cpu$$//'; } > constraints.tmp && mv constraints.tmp constraints.txt

clean:  ## remove the environment and caches (runs are kept)
	@rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
