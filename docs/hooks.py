"""What MkDocs cannot do alone: formulas as MathML, and pages that are made from what lies elsewhere.

A formula becomes MathML while the site is built, which browsers draw without a script. The page of the command line is
what each command answers to ``--help``, and the pages of the repository's root (SECURITY.md, ...) appear as they are.
"""

import contextlib
import html
import io
import os
import re
import sys
from pathlib import Path

import latex2mathml.converter
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
COMMAND_LINE = "reference/command-line.md"
FORMULA = re.compile(r'<(span|div) class="arithmatex">\s*\\[(\[](.*?)\\[)\]]\s*</\1>', re.DOTALL)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Each page of docs/results is in the navigation: benchmarks/reproduce.py writes them."""
    (section,) = [entry for entry in config.nav if isinstance(entry, dict) and "Results" in entry]
    pages = sorted(file.relative_to(ROOT / "docs").as_posix() for file in (ROOT / "docs/results").glob("*.md"))
    section["Results"] = [*dict.fromkeys([*section["Results"], *pages])]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made here."""
    files.append(File.generated(config, COMMAND_LINE, content=command_line()))
    for name in ("SECURITY.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        if (ROOT / name).is_file():
            files.append(File.generated(config, f"project/{name.lower()}", content=(ROOT / name).read_text()))
    return files


def on_page_markdown(markdown: str, page: Page, **_) -> str:
    """Links lead where they do when the repository is read: ../SECURITY.md from docs/, docs/X.md from the root."""
    up = "../" * page.file.src_uri.count("/")
    markdown = re.sub(r"\]\((?:\.\./)*([A-Z]+)\.md\b", lambda link: f"]({up}project/{link[1].lower()}.md", markdown)
    return re.sub(r"\]\(docs/", f"]({up}", markdown) if page.file.src_uri.startswith("project/") else markdown


def on_page_content(content: str, **_) -> str:
    """Formulas as MathML."""

    def mathml(found: re.Match) -> str:
        display = "block" if found[1] == "div" else "inline"
        return latex2mathml.converter.convert(html.unescape(found[2]), display=display)

    return FORMULA.sub(mathml, content)


def command_line() -> str:
    """Markdown: what each command is for, and what it answers to --help."""
    from fm_stages.cli import DESCRIPTIONS

    parts = [
        "# The command line\n",
        "Each command as it describes itself. A mistake in what is given ends with one line and status 2, Ctrl-C with",
        "130. Each takes `--allow-import PACKAGE` as well ([files from strangers](../project/security.md)).\n",
    ]
    for name, purpose in DESCRIPTIONS.items():
        parts.append(f"\n## {name}\n\n{purpose[0].upper()}{purpose[1:].partition(': ')[0]}.\n")
        if name == "validate":
            parts.append("It takes what [fit](#fit) takes; `--ckpt_path FILE` is required.")
            continue
        if name == "fit":
            parts.append(
                "`fm-stages fit --help` also lists the arguments of Lightning's Trainer (`--trainer.max_steps`, ...), "
                "and `--model.network.help DiT` those of a class. Defaults are those of `fm_stages/base.yaml`.\n"
            )
        parts.append(f"```text\n{shortened(help_of(name))}\n```")
    return "\n".join(parts) + "\n"


def shortened(text: str) -> str:
    """A command's help without the Trainer's part, lists of every class that torch has, and folders of this machine."""
    text = re.sub(r",\s+known\s+subclasses:\s[^)]*\)", ")", text.replace(f"{ROOT}/", ""))
    text = re.sub(
        r"^Customize every aspect of training via flags:\n.*?(?=^\S)", "", text, flags=re.DOTALL | re.MULTILINE
    )
    if len(usage := text.split("\n\n")[0]) > 5000:
        text = text.replace(usage, "usage: fm-stages fit --config FILE [--config FILE ...] [options]")
    return text


def help_of(name: str) -> str:
    """What ``fm-stages NAME --help`` prints, 100 columns wide."""
    from fm_stages.cli import main

    given, columns = sys.argv, os.environ.get("COLUMNS")
    sys.argv, os.environ["COLUMNS"] = ["fm-stages", name, "--help"], "100"
    try:
        with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.suppress(SystemExit):
            main()
    finally:
        sys.argv = given
        if columns is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = columns
    return printed.getvalue().rstrip()
