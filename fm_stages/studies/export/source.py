"""One file of source out of the package's: some definitions and all that they need, with no import of the package.

So that an exported folder carries the very code that trained, and nobody keeps a second copy of it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

PACKAGE = __name__.partition(".")[0]


@dataclass(frozen=True)
class Source:
    """Source text of one file.

    Attributes:
        text: of the file.
        libraries: the modules that it imports, by their first name, sorted; the standard library's among them.
    """

    text: str
    libraries: tuple[str, ...]


def source_of(*objects: type, header: str = "") -> Source:
    """The definitions of classes of the package, each after those that it needs.

    Args:
        objects: what the file has to define.
        header: text that the file begins with.

    Returns:
        The file's text. Comments between definitions are not in it.

    Raises:
        ValueError: if an object is not the package's, or two things that are needed have one name.
    """
    found = _Found()
    for one in objects:
        if not _is_ours(one.__module__):
            raise ValueError(f"{one.__module__}.{one.__qualname__} is not a part of {PACKAGE}")
        found.add(one.__module__, one.__qualname__)
    text = "\n\n\n".join([*([header.rstrip()] if header else []), found.import_lines(), *found.definitions]) + "\n"
    modules = [name for node in ast.walk(ast.parse(text)) for name in _imported(node)]
    return Source(text, tuple(sorted({name.partition(".")[0] for name in modules})))


@dataclass
class _Found:
    """What was gathered on the way."""

    imports: set[tuple[str, str]] = field(default_factory=set)
    definitions: list[str] = field(default_factory=list)
    texts: dict[str, str] = field(default_factory=dict)

    def add(self, module: str, name: str) -> None:
        """Gather what a name at the top level of a module stands for, after all that it needs."""
        names = _top_level(module)
        node, text = names[name]
        if isinstance(node, ast.ImportFrom) and _is_ours(node.module or ""):
            self.add(node.module or "", name)
            return
        if name in self.texts:
            if self.texts[name] != text:
                raise ValueError(f"{name} in {module} is another one than where it was found first: rename one of them")
            return
        self.texts[name] = text
        if isinstance(node, ast.Import | ast.ImportFrom):
            before, _, after = text.rpartition("import ")
            self.imports.add((before, after))
            return
        for inner in ast.walk(node):
            if isinstance(inner, ast.Name) and inner.id in names:
                self.add(module, inner.id)
        self.definitions.append(text)

    def import_lines(self) -> str:
        """One line for each module, of those that are imported whole first."""
        names: dict[str, list[str]] = {}
        for before, name in sorted(self.imports):
            names.setdefault(before or f"import {name}", []).append(name)
        return "\n".join(
            f"{key}import {', '.join(own)}" if key.startswith("from") else key for key, own in names.items()
        )


@cache
def _top_level(module: str) -> dict[str, tuple[ast.stmt, str]]:
    """The statement that binds each name at the top level of a module, and the text that binds this name alone."""
    spec = find_spec(module)
    assert spec is not None and spec.origin is not None  # noqa: PT018
    whole = Path(spec.origin).read_text(encoding="utf-8")
    lines = whole.splitlines()
    names: dict[str, tuple[ast.stmt, str]] = {}
    for node, following in pairwise([*ast.parse(whole).body, ast.Pass()]):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names |= {(alias.asname or alias.name): (node, _import_line(node, alias)) for alias in node.names}
            continue
        first = min([node.lineno, *(one.lineno for one in getattr(node, "decorator_list", []))])
        explained = isinstance(following, ast.Expr) and isinstance(node, ast.Assign | ast.AnnAssign)
        last = following.end_lineno if explained else node.end_lineno
        names |= dict.fromkeys(_bound(node), (node, "\n".join(lines[first - 1 : last])))
    return names


def _bound(node: ast.stmt) -> Iterator[str]:
    """The names that a definition binds."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        yield from (target.id for target in targets if isinstance(target, ast.Name))


def _import_line(node: ast.Import | ast.ImportFrom, alias: ast.alias) -> str:
    renamed = f" as {alias.asname}" if alias.asname else ""
    before = f"from {node.module} " if isinstance(node, ast.ImportFrom) else ""
    return f"{before}import {alias.name}{renamed}"


def _imported(node: ast.AST) -> list[str]:
    """Modules that a statement imports, also inside a function."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module or ""] if isinstance(node, ast.ImportFrom) else []


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] == PACKAGE
