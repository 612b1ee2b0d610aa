"""Which errors of the operating system become one line, and what the line advises."""

from __future__ import annotations

import errno
import os

import pytest
from hydra.errors import MissingConfigException

from ranker.cli import command, one_line_errors
from ranker.errors import disk_trouble


def os_error(number: int, path: str | None = "/data/file") -> OSError:
    return OSError(number, os.strerror(number), path)


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, "make room there"),
        (errno.EDQUOT, "make room there"),
        (errno.EROFS, "choose a folder that can be written"),
        (errno.EACCES, "change its permissions"),
    ],
)
def test_trouble_with_the_disk_is_one_line_with_the_path_and_what_to_do(
    number: int, advice: str, capsys: pytest.CaptureFixture[str]
) -> None:
    @command
    def fails() -> int:
        raise os_error(number)

    assert fails() == 2
    line = capsys.readouterr().err
    assert line.startswith(f"error: /data/file: {os.strerror(number)}; {advice}")
    assert line.count("\n") == 1


def test_an_error_in_the_middle_of_a_write_names_no_path() -> None:
    assert disk_trouble(os_error(errno.ENOSPC, None)).startswith("No space left on device; make room there")


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EPERM, errno.EINVAL, errno.EPIPE])
def test_other_errors_keep_their_stack(number: int) -> None:
    assert disk_trouble(os_error(number)) == ""
    with pytest.raises(OSError, match=os.strerror(number)), one_line_errors():
        raise os_error(number)


def test_an_error_that_is_not_of_the_system_is_not_about_the_disk() -> None:
    assert disk_trouble(ValueError("No space left on device")) == ""


def test_an_error_of_hydra_that_is_a_system_error_too_stays_a_mistake_of_the_user(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert issubclass(MissingConfigException, OSError)
    with pytest.raises(SystemExit) as ended, one_line_errors():
        raise MissingConfigException("no such config", "model/larg", ["large"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: unknown model 'larg'")
