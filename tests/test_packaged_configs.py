"""The configurations that come with the package are found from any folder, under the names that the README uses."""

from pathlib import Path

import pytest

from fm_stages import cli

REPOSITORY = Path(__file__).parents[1]


def found(*words: str) -> list[str]:
    argv = ["fm-stages", *words]
    cli._find_packaged(argv)
    return argv[1:]


@pytest.fixture
def elsewhere(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_name_of_the_readme_is_the_packages_own_file_from_any_folder(elsewhere):
    digits, arms = str(REPOSITORY / "configs/digits_dit.yaml"), str(REPOSITORY / "configs/arms")
    assert found("fit", "--config", "configs/digits_dit.yaml") == ["fit", "--config", digits]
    assert found("fit", "--config=configs/digits_dit.yaml") == ["fit", f"--config={digits}"]
    assert found("compare", "--arms", "configs/arms") == ["compare", "--arms", arms]
    assert found("profile", "--data", "a=configs/digits_dit.yaml") == ["profile", "--data", f"a={digits}"]


def test_a_file_of_ones_own_goes_first_and_an_unknown_name_stays_for_the_message(elsewhere):
    (elsewhere / "configs").mkdir()
    (elsewhere / "configs/digits_dit.yaml").write_text("seed_everything: 1\n")
    words = ["fit", "--config", "configs/digits_dit.yaml", "--config", "configs/no_such.yaml", "--data", "configs"]
    assert found(*words) == words


@pytest.mark.parametrize("name", ["configs/", "configs/../README.md", "configs/../docs"])
def test_what_lies_beside_the_configurations_is_none_of_them(elsewhere, name):
    """An output may be named so: it belongs to the working folder, not to the package's."""
    words = ["sample", "--out", name]
    assert found(*words) == words


def test_an_installed_package_has_them_inside(elsewhere, monkeypatch):
    inside = elsewhere / "site-packages/fm_stages"
    (inside / "configs").mkdir(parents=True)
    (inside / "configs/x.yaml").touch()
    monkeypatch.setattr(cli, "__file__", str(inside / "cli.py"))
    assert found("fit", "--config", "configs/x.yaml") == ["fit", "--config", str(inside / "configs/x.yaml")]
    assert str(inside / "configs") in cli._usage()
