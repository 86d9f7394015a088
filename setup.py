"""What pyproject.toml cannot say: a wheel carries ``configs/`` as ``fm_stages/configs``."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConfigs(build_py):
    """Copies the configurations beside the modules; an editable install reads them where they lie."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            here = Path(self.build_lib, "fm_stages", "configs")
            shutil.rmtree(here, ignore_errors=True)  # what an earlier build left
            shutil.copytree("configs", here)


setup(cmdclass={"build_py": BuildWithConfigs})
