"""The code of README.md and docs/ is run, page by page, from top to bottom, in one empty folder for each page.

- A block of Python runs; what it needs and the reader does not stands in an ``<!--- invisible-code-block: python``.
  ``<!--- skip: next "why" -->`` before it leaves one out.
- A block of YAML or Python whose paragraph before it names one file (own.yaml in backticks) is written there first.
- Every ``fm-stages COMMAND --...`` is parsed by that command: its options are there, its configuration can be read.
  After ``<!--- run -->`` it is run as well, after ``<!--- run: --trainer.max_steps 4 -->`` with these options added.
- Every file of the repository and every target of make that a block names is there.
"""

import re
import shlex
import sys
import unittest
from collections.abc import Iterator
from pathlib import Path

import jsonargparse
import matplotlib.pyplot as plt
import pytest
from sybil import Document, Example, Region
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown import SkipParser
from sybil.parsers.markdown.lexers import DirectiveInHTMLCommentLexer, RawFencedCodeBlockLexer

from fm_stages import cli

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
FENCE = re.compile(r"(?P<language>\w*)[^\n]*$\n", re.MULTILINE)
INDENTED = re.compile(r"(?:^\n|\A)((?: {4}.*\n|\n(?= {4}))+)", re.MULTILINE)
COMMAND = re.compile(r".*(?:(?<![\w/-])fm-stages|-m fm_stages(?: --)?) (?P<name>[a-z]+)(?P<rest>(?: --?\w.*)?)$")
IN_REPOSITORY = re.compile(r"(?<![\w/.-])(?:configs|benchmarks|tests|docs|fm_stages)/[\w/.-]*\w")
TARGET = re.compile(r"^make ([a-z-]+)", re.MULTILINE)


class UnderstoodError(BaseException):
    """What a command was given has been parsed: it need not go on."""


def understand_once(patch: pytest.MonkeyPatch) -> None:
    """Commands end where their arguments are understood."""
    parse, depth = jsonargparse.ArgumentParser.parse_args, 0

    def parse_args(self, *args, **kwargs):
        nonlocal depth
        depth += 1  # a parser may call another one
        try:
            parsed = parse(self, *args, **kwargs)
        finally:
            depth -= 1
        if depth:
            return parsed
        raise UnderstoodError

    patch.setattr(jsonargparse.ArgumentParser, "parse_args", parse_args)


def shell_lines(text: str) -> list[str]:
    """Lines of a block, without prompt and comment, continued ones joined."""
    joined = re.sub(r"\\\n\s*", "", text)
    return [re.sub(r"\s+#\s.*", "", line.strip().removeprefix("$ ")).rstrip() for line in joined.splitlines()]


def files_of(text: str) -> Iterator[tuple[str, str]]:
    """Names and contents of the files that a page shows: blocks of code after a paragraph that names one."""
    for found in re.finditer(r"^```(yaml|python)\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        before = text[: found.start()].rstrip().rpartition("\n\n")[2]
        ending = "yaml" if found[1] == "yaml" else "py"
        names = re.findall(rf"`([a-z_]+\.{ending})`", before)
        if comment := re.match(rf"# ([a-z_]+\.{ending})\n", found[2]):
            names = [comment[1]]
        if len(names) == 1:
            yield names[0], found[2]


class Page:
    """A page and what its blocks have to be given: the folder they run in, and the command."""

    def __init__(self, file: Path, folder: Path, command, monkeypatch) -> None:
        self.file, self.folder, self.command, self.monkeypatch = file, folder, command, monkeypatch
        self.run: str | None = None
        self.document = Document.parse(str(file), SkipParser(), self.regions)

    def regions(self, document: Document) -> Iterator[Region]:
        for region in DirectiveInHTMLCommentLexer("invisible-code-block", "python")(document):
            yield Region(region.start, region.end, region.lexemes["source"], PythonEvaluator())
        for region in DirectiveInHTMLCommentLexer("run")(document):
            yield Region(region.start, region.end, region.lexemes["arguments"], self.mark)
        fenced = [*RawFencedCodeBlockLexer(FENCE)(document)]
        for region in fenced:
            yield Region(region.start, region.end, region.lexemes, self.fenced)
        inside = [range(region.start, region.end) for region in fenced]
        comments = [range(*found.span()) for found in re.finditer(r"<!--.*?-->", document.text, re.DOTALL)]
        for found in INDENTED.finditer(document.text):
            if not any(found.start(1) in place for place in [*inside, *comments]):
                yield Region(found.start(1), found.end(1), found[1], lambda example: self.shell(example.parsed))

    def mark(self, example: Example) -> None:
        self.run = str(example.parsed).strip()

    def fenced(self, example: Example) -> None:
        language, source = example.parsed["language"], example.parsed["source"]
        if language in ("python", "py"):
            example.parsed = source
            PythonEvaluator()(example)
        elif language in ("", "sh", "bash", "console", "shell"):
            self.shell(source)

    def shell(self, text: str) -> None:
        """Try what a block of shell says; of output, nothing looks like a command."""
        extra, self.run = self.run, None
        for line in shell_lines(text):
            for name in IN_REPOSITORY.findall(line):
                assert (ROOT / name).exists() or (self.folder / name).exists(), f"{name} is not there: {line}"
            if target := TARGET.match(line):
                assert f"\n{target[1]}:" in (ROOT / "Makefile").read_text(), line
            if found := COMMAND.search(line):
                words = shlex.split(f"{found['name']} {found['rest']} {extra or ''}")
                assert words[0] in cli.COMMANDS, f"no command {words[0]}: {line}"
                self.try_command(words, only_parse=extra is None)

    def try_command(self, words: list[str], only_parse: bool) -> None:
        if not only_parse:
            done = self.command(*words)
            assert done.status == 0, (words, done.err[-2000:])
            return
        words = [str(ROOT / "configs/digits_dit.yaml") if word == "CONFIG" else word for word in words]
        with self.monkeypatch.context() as patch:
            understand_once(patch)
            patch.setattr(sys, "argv", ["fm-stages", *words])
            try:
                cli.main()
            except UnderstoodError:
                return
            except SystemExit as end:
                pytest.fail(f"fm-stages {shlex.join(words)}: status {end.code}")
        pytest.fail(f"fm-stages {shlex.join(words)} has not parsed what it was given")


@pytest.mark.parametrize("file", PAGES, ids=lambda file: str(file.relative_to(ROOT)))
def test_what_a_page_says_works(file, command, tmp_path, monkeypatch):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.syspath_prepend(tmp_path)
    for name, text in files_of(file.read_text()):
        (tmp_path / name).write_text(text)
    page = Page(file, tmp_path, command, monkeypatch)
    for example in page.document.examples():
        try:
            example.evaluate()
        except unittest.SkipTest:
            continue  # the page says why
    plt.close("all")


@pytest.mark.parametrize("file", sorted(ROOT.glob("*.md")), ids=lambda file: file.name)
def test_relative_links_lead_somewhere(file):
    """Those of docs/ are MkDocs' to check."""
    text = re.sub(r"^```.*?^```|`[^`]*`", "", file.read_text(), flags=re.DOTALL | re.MULTILINE)
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"[a-z]+:", link)]
    for link in links:
        name, _, anchor = link.partition("#")
        place = file.parent / name if name else file
        assert place.exists(), link
        if anchor:
            assert anchor in anchors(place.read_text()), link


def anchors(text: str) -> set[str]:
    """Those that a page's headings make, as hosts of repositories write them."""
    heads = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}
