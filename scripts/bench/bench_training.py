"""Training end to end, beside other libraries: python scripts/bench/bench_training.py --source DIR [--json FILE].

The same log of KuaiRand's rows, the same shared bottom and the same MMoE (features, widths, embedding size, batch,
threads, Adagrad with dense gradients, as many parameters), each in a process of its own, in turns: ``train.py`` as a
user starts it, with its metrics, its divergence watch and its early signs; DeepCTR-Torch and torch-rechub as their
examples do (``training_peers.py``). A ratio takes the faster of them, and for memory the leaner. Beside them
stand the matrix products of the step alone (``training_floor.py`` in this folder): no library can be faster.

The log is KuaiRand's training days repeated to ``--rows`` rows (2,000,000; the published KuaiRand-Pure has 1.4
million), because memory depends on it: the others hold all of it, train.py a window. What is counted favours the
others: their time to read the files is left out, while train.py reads as it trains. Each process ends after
``--steps`` steps; memory is at its peak by then, and ``--steps 0`` trains on every row.

Install the others with ``pip install -e '.[bench]' requests`` (DeepCTR-Torch imports requests without saying so),
or each in an environment of its own, named by ``--deepctr-python`` and ``--rechub-python``. ``--evenkeel-python`` names
one for ``train.py``: where more than ``pip install -e .`` brings is installed, torchmetrics imports some of it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench_report import Line, report

ROOT = Path(__file__).resolve().parents[2]
# As in conf/scale/laptop.yaml, and the names of the two models in conf/model.
MODELS = {"shared_bottom": ("small", [64, 64]), "mmoe": ("moe", [256, 256, 256, 256])}
EXPERTS = 4
LR = 0.01
MIB = 2**20


@dataclass(frozen=True)
class Measured:
    """What one training showed.

    Attributes:
        speed: examples a second.
        peak: the process's largest resident memory, bytes.
        waited: share of the time spent waiting for data; nan where the library does not say.
        parameters: of the whole model.
        version: of the library.
    """

    speed: float
    peak: float
    waited: float
    parameters: int
    version: str


def run(command: Sequence[str], *, threads: int) -> tuple[str, float]:
    """Runs a process; what it printed, and its peak memory in bytes.

    This process must stay small: Linux counts the memory of the process that starts another to that one's peak.

    Raises:
        RuntimeError: it failed; the last line that it wrote says why.
    """
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, text=True, stdout=out, stderr=errors)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        errors.seek(0)
        if process.returncode:
            said = errors.read().strip().splitlines() or ["it said nothing"]
            raise RuntimeError(f"{' '.join(command[:3])} failed: {said[-1]}")
        return out.read(), usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def train_evenkeel(root: Path, model: str, given: argparse.Namespace) -> Measured:
    """``train.py`` with Adagrad, its data path, metrics and divergence watch; without evaluations on the way."""
    name, hidden = MODELS[model]
    widths = f"model.net.{'expert_hidden' if model == 'mmoe' else 'hidden'}={json.dumps(hidden)}"
    with tempfile.TemporaryDirectory() as folder:
        overrides = [
            "data=parquet",
            f"data.source={root}",
            f"data.base_lr.laptop={LR}",
            f"model={name}",
            widths.replace(" ", ""),
            "optim=adagrad",
            "trainer=cpu",
            "logger=none",
            "train.eval_every=0",
            "train.progressive=false",
            "train.checkpoint_every=0",
            f"train.threads={given.threads}",
            f"train.max_steps={given.steps or -1}",
            f"scale.batch_size={given.batch_size}",
            f"scale.eval_batch_size={given.batch_size}",  # the others do not evaluate: it should not set the peak
            f"hydra.run.dir={folder}",
        ]
        overrides += [f"model.net.experts={EXPERTS}"] if model == "mmoe" else []
        _, peak = run([given.evenkeel_python, "train.py", *overrides], threads=given.threads)
        summary = json.loads((Path(folder) / "summary.json").read_text(encoding="utf-8"))
    if summary["status"] != "completed":
        raise RuntimeError(f"train.py: {summary['status']}: {summary['reason']}")
    return Measured(
        speed=summary["examples_per_second"],
        peak=peak,
        waited=summary["data_wait_fraction"],
        parameters=sum(summary["parameters"].values()),
        version=summary["versions"]["evenkeel-ranker"],
    )


def train_peer(library: str, python: str, root: Path, model: str, given: argparse.Namespace) -> Measured:
    """Another library on the same rows."""
    command = [python, "scripts/bench/training_peers.py", library, "--root", str(root), "--model", model]
    command += ["--hidden", *map(str, MODELS[model][1]), "--experts", str(EXPERTS), "--lr", str(LR)]
    command += ["--batch-size", str(given.batch_size), "--threads", str(given.threads)]
    if given.steps:
        command += ["--steps", str(given.steps)]
    printed, peak = run(command, threads=given.threads)
    said = json.loads(printed.splitlines()[-1])
    speed = said["examples"] / said["seconds"]
    return Measured(speed, peak, float("nan"), said["parameters"], said["version"])


def compare(root: Path, model: str, peers: Mapping[str, str], given: argparse.Namespace) -> list[Line]:
    """All libraries (names and interpreters) in turns on one model; medians over rounds, of ratios within a round."""
    rounds: list[dict[str, Measured]] = []
    bounds = []
    for _ in range(given.rounds):
        bounds.append(products_alone(root, model, given))
        done = {"evenkeel": train_evenkeel(root, model, given)}
        for library, python in peers.items():
            done[library] = train_peer(library, python, root, model, given)
        rounds.append(done)
    lines = []
    for library, measured in rounds[0].items():
        name = f"{model}, {library} {measured.version}"
        lines.append(Line(name, statistics.median(done[library].speed for done in rounds), "examples/s"))
        lines.append(Line(f"{name}: peak memory", statistics.median(d[library].peak for d in rounds) / MIB, "MiB"))
        lines.append(Line(f"{name}: size", measured.parameters, "parameters"))
    bound = [b / max(d[library].speed for library in peers) for b, d in zip(bounds, rounds, strict=True)]
    return [
        *lines,
        Line(f"{model}: matrix products of a step alone", statistics.median(bounds), "examples/s"),
        *ratios(model, rounds),
        Line(f"{model}: what the matrix products alone allow / faster peer", statistics.median(bound), "x"),
    ]


def ratios(model: str, rounds: Sequence[dict[str, Measured]]) -> list[Line]:
    """What the targets are about."""
    faster, leaner, waited = [], [], []
    for done in rounds:
        others = [measured for library, measured in done.items() if library != "evenkeel"]
        faster.append(done["evenkeel"].speed / max(other.speed for other in others))
        leaner.append(done["evenkeel"].peak / min(other.peak for other in others))
        waited.append(done["evenkeel"].waited)
    speed, peak, wait = map(statistics.median, (faster, leaner, waited))
    return [
        Line(f"{model}: speed / faster peer", speed, "x", ">= 2", speed >= 2),
        Line(f"{model}: peak memory / leaner peer", peak, "x", "<= 0.5", peak <= 0.5),
        Line(f"{model}: data_wait_fraction", wait, "", "< 0.05", wait < 0.05),
    ]


def products_alone(root: Path, model: str, given: argparse.Namespace) -> float:
    """Examples a second of the step's matrix products and nothing else: no library is faster than that."""
    name, hidden = MODELS[model]
    widths = f"model.net.{'expert_hidden' if model == 'mmoe' else 'hidden'}={json.dumps(hidden)}"
    command = [sys.executable, "scripts/bench/training_floor.py", "--root", str(root), "--threads", str(given.threads)]
    command += [f"model={name}", widths.replace(" ", ""), f"scale.batch_size={given.batch_size}"]
    command += [f"model.net.experts={EXPERTS}"] if model == "mmoe" else []
    return float(json.loads(run(command, threads=given.threads)[0].splitlines()[-1])["examples_per_second"])


def check_installed(library: str, python: str) -> None:
    """Looks for a library before anything is measured.

    Raises:
        RuntimeError: the interpreter, or the library in its environment, is missing.
    """
    try:
        package = {"evenkeel": "evenkeel-ranker"}.get(library, library)  # as it is called where it is installed
        run([python, "-c", f"from importlib.metadata import version; version({package!r})"], threads=1)
    except (RuntimeError, OSError) as error:
        option = f"--{library.removesuffix('-torch').removeprefix('torch-')}-python"
        raise RuntimeError(f"no {library} for {python}: install it there, or name another with {option}") from error


@contextmanager
def prepared(source: Path, rows: int) -> Iterator[Path]:
    """KuaiRand prepared, if it is not yet, and repeated to so many rows, in a temporary folder."""
    root = source.resolve()
    with tempfile.TemporaryDirectory() as folder:
        if not (root / "schema.yaml").is_file():
            root = Path(folder) / "kuairand"
            run([sys.executable, "scripts/prepare_data.py", "kuairand", str(source.resolve()), str(root)], threads=2)
        if rows:
            long = Path(folder) / "long"
            run([sys.executable, "scripts/bench/repeat_log.py", str(root), str(long), "--rows", str(rows)], threads=2)
            root = long
        yield root


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints the table, and returns 1 where a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="published KuaiRand files, or a prepared folder")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rows", type=int, default=2_000_000, help="training rows of the log; 0: those of the source")
    parser.add_argument("--steps", type=int, default=150, help="end after so many steps; 0: every row")
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3, help="how often everything is measured")
    parser.add_argument("--evenkeel-python", default=sys.executable, help="interpreter that has evenkeel")
    parser.add_argument("--deepctr-python", default=sys.executable, help="interpreter that has deepctr-torch")
    parser.add_argument("--rechub-python", default=sys.executable, help="interpreter that has torch-rechub")
    parser.add_argument("--json", type=Path, help="also write the lines to this file")
    given = parser.parse_args(arguments)
    peers = {"deepctr-torch": given.deepctr_python, "torch-rechub": given.rechub_python}
    lines: list[Line] = []
    try:
        for library, python in {"evenkeel": given.evenkeel_python, **peers}.items():
            check_installed(library, python)
        with prepared(given.source, given.rows) as root:
            for model in given.models:
                lines += compare(root, model, peers, given)
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return report(lines, given.json)


if __name__ == "__main__":
    sys.exit(main())
