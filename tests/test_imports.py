"""The import rule: a part of the package imports only from parts below it, through their faces.

    __main__    python -m fm_stages
    cli         the command: a table of subcommands
    studies     what a person runs on models and data beside training
    training    the LightningModule and its callbacks
    data        data modules; what a training set is
    oracle      the bank, the exact posterior, what a loss is made of
    flow        the mathematics of flow matching        networks    architectures: neither knows of the other

``plots`` stands beside them: it makes figures of plain data and imports nothing of the package, and only ``training``,
``studies`` and ``cli`` import it. ``fm_stages`` itself, the top, imports nothing but the standard library. What stands
below ``data`` knows nothing of Lightning. A face is the ``__init__.py`` of a folder, inside which files import one
another.

Every ``import`` statement of the package is read, those inside functions and under ``TYPE_CHECKING`` too.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "fm_stages"

# From below; the parts of one layer do not import each other. A part that is missing here has no place in the design.
LAYERS = [["flow", "networks"], ["oracle"], ["data"], ["training"], ["studies"], ["cli"], ["__main__"]]
ALLOWED = {part: set(sum(LAYERS[:rank], [])) for rank, layer in enumerate(LAYERS) for part in layer}
ALLOWED["plots"] = set()  # figures are made from plain data
for part in ["training", "studies", "cli"]:
    ALLOWED[part].add("plots")
WITHOUT_LIGHTNING = {"flow", "networks", "oracle", "plots"}


def modules_of(package: Path) -> dict[str, Path]:
    """Module names under ``package`` with their files; a folder's ``__init__.py`` goes by the folder's name."""
    names = {file: file.relative_to(package.parent).with_suffix("").parts for file in package.rglob("*.py")}
    return {".".join(parts).removesuffix(".__init__"): file for file, parts in names.items()}


def imported(node: ast.stmt, module: str, is_face: bool, modules: set[str]) -> list[str]:
    """Absolute names of the modules that one statement imports."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    base = node.module or ""
    if node.level:
        parts = module.split(".")
        parts = parts[: len(parts) - node.level + is_face]
        base = ".".join([*parts, base] if base else parts)
    # `from fm_stages.oracle import exact` imports the file exact.py, not a name of the face.
    return [f"{base}.{alias.name}" if f"{base}.{alias.name}" in modules else base for alias in node.names]


def violations(source: str, module: str, modules: set[str], is_face: bool = False) -> list[str]:
    """One line for each import in ``source``, the text of ``module``, that breaks the rule."""
    found = []
    here = (module.split(".") + [""])[1]
    if here and here not in ALLOWED:
        return [f"{module}: the import rule has no place for it"]
    for node in ast.walk(ast.parse(source)):
        for name in imported(node, module, is_face, modules):
            root, part, *rest = [*name.split("."), ""][:3]
            where = f"{module}:{node.lineno}: {name}"
            if not here and root not in sys.stdlib_module_names:
                found.append(f"{where}: the top of the package imports nothing")
            elif root in ("lightning", "pytorch_lightning") and here in WITHOUT_LIGHTNING:
                found.append(f"{where}: {here} knows nothing of Lightning")
            elif root != "fm_stages" or part in ("", here):
                continue
            elif part not in ALLOWED[here]:
                found.append(f"{where}: {here} may not import {part}")
            elif any(rest):
                found.append(f"{where}: import from the face, fm_stages.{part}")
    return found


def names_of_face(file: Path | None) -> set[str]:
    """What an ``__init__.py`` lists in ``__all__``."""
    for node in ast.parse(file.read_text()).body if file else []:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "__all__":
            return set(ast.literal_eval(node.value))
    return set()


def test_imports_go_only_downwards():
    files = modules_of(PACKAGE)
    # a face may give a function the name of its file: importing that name is importing from the face
    modules = {m for m in files if m.rpartition(".")[2] not in names_of_face(files.get(m.rpartition(".")[0]))}
    found = [
        line
        for module, file in files.items()
        for line in violations(file.read_text(), module, modules, is_face=file.name == "__init__.py")
    ]
    assert "fm_stages.flow" in files
    assert not found, "\n".join(found)


MODULES = {f"fm_stages.{name}" for name in ["flow", "flow.paths", "oracle", "oracle.bank", "oracle.exact", "training"]}


@pytest.mark.parametrize(
    ("module", "source", "complaint"),
    [
        ("fm_stages.flow.paths", "from fm_stages.oracle import Oracle", "flow may not import oracle"),
        ("fm_stages.flow.paths", "def f():\n    import fm_stages.training", "flow may not import training"),
        ("fm_stages.flow.paths", "from ..oracle import Oracle", "flow may not import oracle"),
        ("fm_stages.flow", "from ..oracle import Oracle", "flow may not import oracle"),
        ("fm_stages.flow.paths", "from fm_stages.networks import DiT", "flow may not import networks"),
        ("fm_stages.oracle.exact", "from fm_stages import training", "oracle may not import training"),
        ("fm_stages.networks.dit", "from fm_stages.flow import shift_time", "networks may not import flow"),
        ("fm_stages.plots", "from fm_stages.flow import shift_time", "plots may not import flow"),
        ("fm_stages.data.images", "if TYPE_CHECKING:\n    from fm_stages.training import EMA", "data may not import"),
        ("fm_stages.data.images", "from fm_stages.plots import curve", "data may not import plots"),
        ("fm_stages.oracle.exact", "import lightning.pytorch as pl", "oracle knows nothing of Lightning"),
        ("fm_stages.training.module", "from fm_stages.oracle.exact import Oracle", "import from the face"),
        ("fm_stages.training.module", "from fm_stages.oracle import exact", "import from the face"),
        ("fm_stages.training.module", "import fm_stages.oracle.exact", "import from the face"),
        ("fm_stages.training.module", "from fm_stages.utils import thing", "training may not import utils"),
        ("fm_stages.utils", "import math", "no place for it"),
        ("fm_stages", "import torch", "imports nothing"),
        ("fm_stages", "from .flow import LinearPath", "imports nothing"),
    ],
)
def test_a_violation_is_found(module, source, complaint):
    found = violations(source, module, MODULES, is_face=module in ("fm_stages", "fm_stages.flow"))
    assert len(found) == 1
    assert complaint in found[0]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("fm_stages.oracle.exact", "from fm_stages.oracle.bank import DataBank"),
        ("fm_stages.oracle.exact", "from .bank import DataBank\nfrom . import bank"),
        ("fm_stages.oracle", "from .exact import Oracle"),
        ("fm_stages.oracle.exact", "import torch\nfrom fm_stages.flow import Path"),
        ("fm_stages.training.monitor", "from fm_stages import __version__\nfrom fm_stages.plots import curve"),
        ("fm_stages.cli", "def fit():\n    from fm_stages.training import main"),
        ("fm_stages.__main__", "from .cli import main"),
    ],
)
def test_what_is_allowed_passes(module, source):
    assert violations(source, module, MODULES, is_face=module == "fm_stages.oracle") == []


HEAVY = ["torch", "lightning", "diffusers", "timm", "wandb", "sklearn", "matplotlib", "jsonargparse"]


@pytest.mark.parametrize(
    "start",
    [
        "import fm_stages",
        "import runpy; sys.argv = ['fm-stages', '--help']; runpy.run_module('fm_stages', run_name='__main__')",
    ],
    ids=["import", "help"],
)
def test_start_is_light(start):
    """A person who asks for help does not wait for torch."""
    code = f"""
import sys
try:
    {start}
except SystemExit as stop:
    assert not stop.code, stop.code
finally:
    assert not (heavy := sys.modules.keys() & {HEAVY!r}), heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    if "--help" in start:
        assert "fm-stages" in done.stdout
