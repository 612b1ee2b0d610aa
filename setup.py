"""Copies conf/ into the wheel as ranker/conf. All other settings of the build are in pyproject.toml."""

from __future__ import annotations

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConf(build_py):
    """The standard build step, and a copy of conf/; an editable install reads conf/ where it is."""

    def run(self) -> None:
        """Builds the packages."""
        super().run()
        if not self.editable_mode:
            shutil.copytree("conf", Path(self.build_lib) / "ranker" / "conf", dirs_exist_ok=True)


setup(cmdclass={"build_py": BuildWithConf})
