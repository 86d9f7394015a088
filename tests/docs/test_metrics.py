"""docs/how-to/metrics.md names what a run logs."""

import re
from pathlib import Path

import pytest

from tests.test_cli import NAMES

PAGE = Path(__file__).parents[2] / "docs/how-to/metrics.md"


@pytest.mark.parametrize("name", sorted({name.removesuffix("_ema").removesuffix("_sem") for name in NAMES}))
def test_a_logged_name_is_in_the_table(name):
    assert re.search(rf"^\|.*`{name}`.*\|", PAGE.read_text(), re.MULTILINE)
