"""The examples for other training loops: each runs, learns, and does what its text says."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
# No dependency of the tests: where transformers is installed, torchmetrics imports it, and each start of a run takes
# seconds longer. make test-examples installs these into an environment of their own.
NEEDS = {"hugging_face_trainer": ("transformers", "accelerate"), "torchrec_tables": ("torchrec", "fbgemm_gpu")}
OTHERS = {"adagrad_diverges_clippy_does_not", "own_log"}  # test_example.py, test_docs.py
NAMES = sorted({path.stem for path in EXAMPLES.glob("*.py")} - OTHERS)


def test_there_is_one_for_each_kind_of_loop() -> None:
    assert NAMES == ["hugging_face_trainer", "lightning_trainer", "plain_loop", "torchrec_tables"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore")  # of the frameworks
def test_it_learns_as_its_text_says_and_clips_the_layers_alone(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    for module in NEEDS.get(name, ()):
        pytest.importorskip(module, reason=f"{module} is not installed; make test-examples runs it")

    left = runpy.run_path(str(EXAMPLES / f"{name}.py"))

    told = capsys.readouterr().out
    text = re.sub(r"\n# ", " ", (EXAMPLES / f"{name}.py").read_text(encoding="utf-8"))
    promised = re.search(r"Expect a loss that falls from about ([\d.]+) to about ([\d.]+\d)", text)
    shown = re.search(r"^loss: ([\d.]+) .*, ([\d.]+) over the last 20 steps$", told, re.MULTILINE)
    assert promised, text
    assert shown, told
    first, last = map(float, shown.groups())
    assert last < first / 4
    assert [first, last] == pytest.approx([float(number) for number in promised.groups()], rel=0.4)
    assert "sigma" in told or "clipped in" in told
    assert clipped(told, "bottom.0.weight")
    assert not any(clipped(told, table) for table in ("items.weight", "users.weight"))
    if name == "plain_loop":
        assert "the restored run makes the same step: True" in told
    if name == "torchrec_tables":
        assert "tables." not in told
    if name == "hugging_face_trainer":
        assert left["trainer"].optimizer.optimizer is left["optimizer"]  # and not one that the Trainer made itself


def clipped(told: str, tensor: str) -> bool:
    """Whether an example's report says that steps of a tensor were clipped."""
    line = next((line for line in told.splitlines() if line.startswith(tensor)), "")
    return bool(line) and "clipped in   0%" not in line and "lowest sigma 1.000" not in line
