"""An export folder whose files are not those that were written is refused."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from ranker.commands.export_commands import score
from ranker.errors import UserError
from ranker.export.bundle import check_files, new_folder, write_checksums


@pytest.fixture
def export(tmp_path: Path) -> Path:
    for name in ("export.json", "schema.yaml", "model.pt2"):
        (tmp_path / name).write_text(name)
    write_checksums(tmp_path)
    return tmp_path


def test_the_checksums_are_those_of_sha256sum(export: Path) -> None:
    check_files(export)
    subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=export, check=True, capture_output=True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: (folder / "model.pt2").write_text("model.pt3"), "model.pt2 is damaged or was changed"),
        (lambda folder: (folder / "schema.yaml").unlink(), "lacks the file 'schema.yaml'"),
        (lambda folder: (folder / "model.onnx").write_text("new"), "model.onnx has no checksum"),
        (lambda folder: (folder / "SHA256SUMS").unlink(), "cannot be checked"),
        (lambda folder: (folder / "SHA256SUMS").write_text("0  ../x\n"), "lacks the file '../x'"),
    ],
)
def test_a_changed_file_is_one_line(export: Path, change: Callable[[Path], object], words: str) -> None:
    change(export)

    with pytest.raises(UserError, match=words):
        check_files(export)


def test_a_place_that_cannot_be_a_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(UserError, match=r"file/sub/export cannot be written: .*; give another folder with --out"),
        new_folder(tmp_path / "file" / "sub" / "export", replace=False),
    ):
        pass


def test_a_wrong_number_of_threads_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert score([str(tmp_path), "rows.parquet", "--out", "x.parquet", "--threads", "-1"]) == 2
    assert capsys.readouterr().err == "error: --threads must be 0 or more, got -1\n"
