"""Builds the wheel, installs it into an empty environment and uses it there, without network: ``make wheel-check``.

The dependencies come from the environment that runs this script. Only its site-packages folder is added to the new
environment, and Python does not process the .pth files of such a folder, so an editable install there has no effect.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("src", "conf", "pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE")
TIMEOUT_SECONDS = 120  # per command
SMALL = (
    "logger=csv",
    "trainer=cpu",
    "train.max_steps=5",
    "train.eval_every=0",
    "train.checkpoint_every=5",
    "train.threads=1",
    "scale.batch_size=256",
    "data.log.train_rows=6144",
    "data.log.eval_rows=2048",
    "data.log.rows_per_day=2048",
    "data.window=2048",
)
WHERE = """
import json, optim, ranker, sys
from ranker import installation
print(json.dumps([ranker.__file__, optim.__file__, str(installation.conf_folder()), str(installation.clone())]))
"""


def main() -> None:
    """Runs the check; a failed step raises."""
    with tempfile.TemporaryDirectory(prefix="evenkeel-wheel-") as name:
        folder = Path(name).resolve()
        wheel = build(folder)
        environment = install(wheel, folder)
        work = folder / "work"
        work.mkdir()
        check(environment, work)
    print("the wheel works outside a clone")


def build(folder: Path) -> Path:
    """Builds the wheel from a copy, because a build leaves files in its folder and takes up those of earlier builds."""
    copy = folder / "sources"
    copy.mkdir()
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
        else:
            shutil.copy(source, copy / name)
    pip("wheel", "--no-build-isolation", "--no-deps", "--no-index", "-w", str(folder), str(copy))
    (wheel,) = folder.glob("*.whl")
    return wheel


def install(wheel: Path, folder: Path) -> Path:
    """Makes an environment, with the wheel installed and the dependencies of this one; returns its folder."""
    environment = folder / "environment"
    call([sys.executable, "-m", "venv", "--without-pip", str(environment)])
    pip("--python", str(environment / "bin" / "python"), "install", "--no-deps", "--no-index", str(wheel))
    (site,) = environment.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return environment


def check(environment: Path, work: Path) -> None:
    """Uses the commands in another working directory."""
    python, evenkeel = str(environment / "bin" / "python"), str(environment / "bin" / "evenkeel")
    *places, clone = json.loads(call([python, "-c", WHERE], cwd=work))
    assert clone == "None", clone
    for place in places:
        assert Path(place).is_relative_to(environment), f"{place} is not in {environment}"
        assert Path(place).exists(), place
    missing = {path.relative_to(ROOT / "conf") for path in (ROOT / "conf").rglob("*.yaml")} - {
        path.relative_to(places[-1]) for path in Path(places[-1]).rglob("*.yaml")
    }
    assert not missing, missing

    assert "headroom" in call([evenkeel, "--help"], cwd=work)
    call([evenkeel, "train", *SMALL, "hydra.run.dir=run"], cwd=work)
    summary = json.loads((work / "run" / "summary.json").read_text(encoding="utf-8"))
    assert (summary["status"], summary["steps"]) == ("completed", 5), summary
    assert summary["versions"]["evenkeel-ranker"][0].isdigit(), summary["versions"]
    call([evenkeel, "report", "run"], cwd=work)
    assert (work / "run" / "report.html").stat().st_size > 0
    assert "clippy" in call([evenkeel, "compare", "run", "--format", "md"], cwd=work)
    open_gate = (
        "--min-auc",
        "0",
        "--min-calibration",
        "0",
        "--max-calibration",
        "1e9",
        "--min-positives",
        "1000000",
        "--min-judged",
        "0",
        "--max-relative-loss",
        "1e9",
    )
    call([evenkeel, "export", "run", *open_gate], cwd=work)
    error = call([evenkeel, "train", "model=larg"], cwd=work, status=2)
    assert error.startswith("error: unknown model 'larg'; did you mean 'large'"), error


def pip(*arguments: str) -> None:
    """Runs pip of this environment."""
    call([sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments])


def call(command: list[str], *, cwd: Path | None = None, status: int = 0) -> str:
    """Runs a command that must end with a status; returns what it printed, or its errors if the status is not 0."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "HYDRA_"))}
    environment |= {"WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False
    )
    if done.returncode != status:
        sys.exit(f"{' '.join(command)}\nended with status {done.returncode}, not {status}\n{done.stdout}{done.stderr}")
    return done.stdout if status == 0 else done.stderr


if __name__ == "__main__":
    main()
