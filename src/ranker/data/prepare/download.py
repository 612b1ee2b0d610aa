"""Download of published data sets: resumed after a broken connection, checked by checksum, unpacked atomically.

Written by hand because pooch restarts a broken download, and fsspec neither resumes one nor checks it.
"""

from __future__ import annotations

import errno
import hashlib
import http
import http.client
import re
import shutil
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ranker.errors import UserError

PIECE = 1 << 20  # bytes read at a time
TIMEOUT_S = 30.0

KUAIRAND = (
    "KuaiRand (Gao et al., CIKM 2022, doi 10.1145/3511808.3557624) is licensed under CC BY-SA 4.0, "
    "https://creativecommons.org/licenses/by-sa/4.0: name the authors, and share what you make of it alike."
)
MOVIELENS = (
    "MovieLens (Harper and Konstan, ACM TiiS 2015, doi 10.1145/2827872) is for research; its terms forbid use for "
    "revenue and redistribution without permission, and ask for the citation. The archive's README has the full text."
)


@dataclass(frozen=True, kw_only=True)
class Archive:
    """A published archive.

    Attributes:
        url: its URL.
        md5: the checksum published with it.
        data: the folder within it that contains the files to prepare.
        kind: the name of the data set in ``prepare_data.py``.
        size: approximate size as text.
        licence: the terms that the user must accept.
    """

    url: str
    md5: str
    data: str
    kind: str
    size: str
    licence: str

    @property
    def file_name(self) -> str:
        """File name of the archive."""
        return self.url.rsplit("/", 1)[-1]


def _kuairand(name: str, md5: str, size: str) -> Archive:
    url = f"https://zenodo.org/records/10439422/files/{name}.tar.gz"
    return Archive(url=url, md5=md5, data=f"{name}/data", kind="kuairand", size=size, licence=KUAIRAND)


def _movielens(name: str, md5: str, size: str) -> Archive:
    url = f"https://files.grouplens.org/datasets/movielens/{name}.zip"
    return Archive(url=url, md5=md5, data=name, kind="movielens", size=size, licence=MOVIELENS)


ARCHIVES: Mapping[str, Archive] = {
    "kuairand-pure": _kuairand("KuaiRand-Pure", "0820331067a3784d9691136f772b35a7", "47 MB"),
    "kuairand-1k": _kuairand("KuaiRand-1K", "6b0b9c8222d67fcd4c676218edca3f1f", "1.1 GB"),
    "kuairand-27k": _kuairand("KuaiRand-27K", "3e3c799a24e2d23a4d2c757fbf9adf59", "9.9 GB"),
    "movielens-1m": _movielens("ml-1m", "c4d9eecfca2ab87c1945afe126590906", "6 MB"),
    "movielens-32m": _movielens("ml-32m", "d472be332d4daa821edc399621853b57", "239 MB"),
}


class _CutError(Exception):
    """The connection ended before the end of the file."""


def fetch(
    archive: Archive,
    folder: Path,
    *,
    attempts: int = 5,
    wait_s: float = 2.0,
    progress: Callable[[int, int | None], None] | None = None,
) -> Path:
    """Downloads an archive, resuming from ``NAME.part`` if an earlier attempt left one.

    Args:
        archive: the archive.
        folder: destination.
        attempts: consecutive attempts without any new bytes before it gives up.
        wait_s: seconds before the second attempt. Doubles after each further attempt without new bytes.
        progress: called with the bytes received and the total (None if the server does not send it).

    Returns:
        The archive's file. Its checksum has been verified.

    Raises:
        UserError: the server does not respond or refuses, the disk is full, or the checksum is wrong (the file is then
            removed).
    """
    target = folder / archive.file_name
    if target.is_file() and md5_of(target) == archive.md5:
        return target
    folder.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    failures = 0
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            _receive(archive.url, part, progress or (lambda *_: None))
            break
        except (_CutError, OSError, http.client.HTTPException) as error:
            if isinstance(error, urllib.error.HTTPError) and error.code < 500:
                raise UserError(f"{archive.url} answers {error.code} {error.reason}; has it moved?") from error
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                raise UserError(f"the disk is full at {folder}; free some space and run it again to go on") from error
            there = part.stat().st_size if part.exists() else 0
            failures = 0 if there > before else failures + 1
            if failures >= attempts:
                raise UserError(
                    f"{archive.url} cannot be fetched ({_reason(error)}) after {attempts} tries; "
                    f"{there:,} bytes are kept in {part}: run it again to go on"
                ) from error
            time.sleep(wait_s * 2 ** max(failures - 1, 0))
    found = md5_of(part)
    if found != archive.md5:
        part.unlink()
        raise UserError(f"{archive.url} has md5 {found}, expected {archive.md5}; it was removed, fetch it again")
    part.replace(target)
    return target


def _reason(error: Exception) -> str:
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    return " ".join(str(cause).split()) or type(cause).__name__


def _receive(url: str, part: Path, progress: Callable[[int, int | None], None]) -> None:
    """Requests the missing bytes over one connection and appends them to the part."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"User-Agent": "evenkeel", "Accept-Encoding": "identity"})
    if have:
        request.add_header("Range", f"bytes={have}-")
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT_S)
    except urllib.error.HTTPError as error:
        error.close()
        # There are no more bytes: the part is complete. The checksum detects a part of another file.
        if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE and have:
            return
        raise
    with response:
        resumed = response.status == http.HTTPStatus.PARTIAL_CONTENT
        if resumed and not re.match(rf"bytes {have}-", response.headers.get("Content-Range", "")):
            raise _CutError("the server resumed at another position than requested")
        length = response.headers.get("Content-Length")
        start = have if resumed else 0
        total = start + int(length) if length else None
        with open(part, "ab" if resumed else "wb") as file:
            while piece := response.read(PIECE):
                file.write(piece)
                progress(file.tell(), total)
            end = file.tell()
    if total is not None and end < total:
        raise _CutError(f"cut at {end:,} of {total:,} bytes")


def md5_of(path: Path) -> str:
    """MD5 of a file, hexadecimal, read in pieces. It protects against transfer errors, not against malice."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def unpack(archive: Archive, file: Path, folder: Path) -> Path:
    """Unpacks an archive, unless its folder already exists.

    Args:
        archive: the archive.
        file: the archive's file.
        folder: destination of the archive's top folder.

    Returns:
        The folder to give as data.source.

    Raises:
        UserError: the archive is broken or lacks its data folder.
    """
    top = archive.data.split("/")[0]
    if (folder / archive.data).is_dir():
        return folder / archive.data
    draft = folder / f".{top}.draft"
    shutil.rmtree(draft, ignore_errors=True)
    try:
        if file.suffix == ".zip":
            with zipfile.ZipFile(file) as held:
                held.extractall(draft)
        else:
            with tarfile.open(file) as held_tar:
                # The filter rejects members with a path outside of the folder.
                held_tar.extractall(draft, filter="data")
        if not (draft / archive.data).is_dir():
            raise UserError(f"{file} has no folder {archive.data}; fetch it again")
        (draft / top).replace(folder / top)
    except (tarfile.TarError, zipfile.BadZipFile, EOFError) as error:
        raise UserError(f"{file} cannot be unpacked ({error}); remove it and fetch it again") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder / archive.data
