"""Full copies of tables, read whole or mapped; archives inside other files."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import torch

from ranker.errors import UserError
from ranker.runs import table_files
from ranker.runs.table_files import Slice, mapped, mapped_copy, read_copy, write_copy


def test_a_mapped_copy_has_the_rows_of_one_that_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_files, "PIECE_BYTES", 3 * 4 * 4)  # three rows a piece
    tensors = {"a/weight": torch.rand(11, 4), "a/sum": torch.rand(11, 4), "b": torch.rand(2, 4).double()}
    write_copy(tmp_path / "copy.zip", tensors)

    whole, pieces = read_copy(tmp_path / "copy.zip"), mapped_copy(tmp_path / "copy.zip")

    assert [start for start, _ in pieces["a/sum"]] == [0, 3, 6, 9]
    for name, values in tensors.items():
        assert torch.equal(whole[name], values)
        rows = torch.cat([piece.clone().view(values.dtype) for _, piece in pieces[name]])
        assert torch.equal(rows, values), name
    (tmp_path / "copy.zip").write_bytes(b"no archive")
    with pytest.raises(UserError, match="is no full copy of tables"):
        mapped_copy(tmp_path / "copy.zip")


def test_an_archive_inside_a_file_is_mapped_where_it_lies(tmp_path: Path) -> None:
    with (tmp_path / "inner.zip").open("wb") as file, zipfile.ZipFile(file, "w") as archive:
        archive.writestr("first", b"x" * 100)
        archive.writestr("second", bytes(range(50)))
        archive.writestr("packed", b"y" * 100, compress_type=zipfile.ZIP_DEFLATED)
    inner = (tmp_path / "inner.zip").read_bytes()
    outer = tmp_path / "outer"
    outer.write_bytes(b"before!" + inner + inner[:30])

    with outer.open("rb") as file, zipfile.ZipFile(Slice(file, 7, len(inner))) as archive:
        assert archive.read("first") == b"x" * 100
        assert bytes(mapped(outer, archive, "second", before=7).tolist()) == bytes(range(50))
        with pytest.raises(ValueError, match="packed is compressed"):
            mapped(outer, archive, "packed", before=7)
