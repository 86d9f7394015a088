"""docs/reference/files.md: which file to open for what. It names each file of the package, and no other."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
MAP = ROOT / "docs/reference/files.md"


def named() -> set[Path]:
    """Files and folders on the map. A bare name lies beside the file before it."""
    found: set[Path] = set()
    for row in re.findall(r"^\|.*\| (.*) \|$", MAP.read_text(), re.MULTILINE):
        folder = ROOT
        for name in re.findall(r"`([\w/.*-]+)`", row):
            if "/" in name:
                folder = ROOT / (name if name.endswith("/") else Path(name).parent)
                path = ROOT / name
            else:
                path = folder / name
            places = [*path.parent.glob(path.name)]
            assert places, f"{path.relative_to(ROOT)} is not there"
            found.update(places)
    return found


def test_each_file_of_the_package_is_on_it():
    places = named()
    files = {file for file in (ROOT / "fm_stages").rglob("*.py") if file.name not in ("__init__.py", "__main__.py")}
    lost = {str(file.relative_to(ROOT)) for file in files if not places & {file, *file.parents}}
    assert not lost
