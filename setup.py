"""Copies what lies outside the package, recipes and the runner's sources, into it when it is installed or built."""

from pathlib import Path
from shutil import copytree, ignore_patterns

from setuptools import setup
from setuptools.command.build_py import build_py

CARRIED = {"recipes": "recipes", "apps/runner": "apps/runner"}


class BuildWithFolders(build_py):
    """build_py that also carries folders; an editable install finds them in the checkout instead."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for source, below in CARRIED.items():
            if Path(source).is_dir():
                target = Path(self.build_lib) / "edge_ibtm" / below
                copytree(source, target, dirs_exist_ok=True, ignore=ignore_patterns("__pycache__", "build"))


setup(cmdclass={"build_py": BuildWithFolders})
