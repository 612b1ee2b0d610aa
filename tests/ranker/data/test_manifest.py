from __future__ import annotations

import hashlib

import pytest

from ranker.data.manifest import FileEntry, Manifest, day_file, sha256_of
from ranker.errors import UserError


def some_manifest() -> Manifest:
    return Manifest(
        files=(
            FileEntry(path=day_file("2022-04-26"), rows=0),
            FileEntry(
                path=day_file("2022-04-25"),
                rows=3,
                time_min_ms=1650844800000,
                time_max_ms=1650844800007,
                sha256="ab",
                label_rates={"click": 0.5, "like": None},
            ),
        ),
        source={"name": "made up"},
    )


def test_a_manifest_comes_back_as_it_was_written(tmp_path):
    manifest = some_manifest()
    manifest.write(tmp_path)
    assert Manifest.read(tmp_path) == manifest
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


def test_files_are_in_the_order_of_days_and_rows_are_summed():
    manifest = some_manifest()
    assert [entry.path for entry in manifest.files] == ["day=2022-04-25.parquet", "day=2022-04-26.parquet"]
    assert manifest.rows == 3


def test_a_directory_without_a_manifest_gives_none(tmp_path):
    assert Manifest.read(tmp_path) is None


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"format": 99, "files": []}', '{"format": 1}', '{"format": 1, "files": [{"x": 1}]}']
)
def test_a_broken_manifest_is_refused_with_its_path(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=r"manifest\.json.*prepare the data again"):
        Manifest.read(tmp_path)


def test_the_checksum_is_that_of_the_bytes(tmp_path):
    (tmp_path / "x").write_bytes(b"abc" * 1000)
    assert sha256_of(tmp_path / "x") == hashlib.sha256(b"abc" * 1000).hexdigest()
