"""What all commands have in common."""

import pytest

from fm_stages import cli, studies
from fm_stages.studies.commands import check_least, command_parser, interruptible, parse_options


def test_each_command_is_there():
    names = set(cli.COMMANDS) - {"fit", "validate"}
    assert all(callable(getattr(studies, f"{name}_command")) for name in names)


@pytest.fixture
def parser():
    found = command_parser("draw", "Draws.")
    found.add_argument("--num", type=int, default=1)
    found.add_argument("--rows", type=int | None, default=None)
    return found


@pytest.mark.parametrize("arguments", [["--num", "many"], ["--nu", "2"], ["--colour", "red"]])
def test_what_is_not_understood_is_refused_with_where_to_read_more(parser, arguments):
    with pytest.raises(ValueError, match=r"\(fm-stages draw --help lists what can be given\)"):
        parse_options(parser, arguments)


def test_the_option_is_named_as_it_is_written(parser):
    with pytest.raises(ValueError, match="^--num: "):
        parse_options(parser, ["--num", "many"])


def test_small_numbers_are_refused_and_what_was_not_given_is_not(parser):
    options = parse_options(parser, ["--num", "1"])
    check_least(options, 1, "num", "rows")
    with pytest.raises(ValueError, match="--num 1 must be 2 or more"):
        check_least(options, 2, "rows", "num")


@pytest.mark.parametrize(
    ("told", "line"), [((), "interrupted"), (("nothing was written",), "interrupted; nothing was written")]
)
def test_ctrl_c_ends_a_command_with_a_line_and_130(told, line, capsys):
    with pytest.raises(SystemExit) as end, interruptible(*told):
        raise KeyboardInterrupt
    assert end.value.code == 130
    assert capsys.readouterr().err == f"\nfm-stages: {line}\n"
