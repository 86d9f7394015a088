"""The command ``fm-stages``: a table of subcommands, each imported only when it is called."""

from __future__ import annotations

import os
import select
import sys
import sysconfig
import traceback
from collections.abc import Callable
from pathlib import Path


def _training() -> None:
    from fm_stages.training import TrainingCLI

    TrainingCLI()


def _study(name: str) -> Callable[[], None]:
    """``NAME_command`` of the studies."""

    def run() -> None:
        from fm_stages import studies

        getattr(studies, f"{name}_command")()

    return run


LIBRARIES = tuple(sysconfig.get_paths()[name] for name in ("stdlib", "purelib", "platlib"))

LONGEST = 2000
"""Characters of a message: the parser repeats the value that it does not understand, however long."""

DESCRIPTIONS = {
    "fit": "train a model: fm-stages fit --config configs/digits_dit.yaml",
    "validate": "measure a checkpoint on held-out data: --config X.yaml --ckpt_path FILE",
    "doctor": "what would waste a run, before it starts; takes what fit takes: --config X.yaml",
    "replay": "a step that the guards of a run found, once more: --record RUN/flight/step_XXXXXXX",
    "encode": "images to latents, once: --data FOLDER --vae NAME_OR_PATH --out DIR",
    "profile": "where the stages of a training set lie, before training: --data X",
    "diagnose": "regular loss, gap and floor by t of trained checkpoints: --ckpt FILE [--ckpt FILE]",
    "sample": "draw images from a checkpoint to files: --ckpt FILE --num 50000 --out DIR",
    "evaluate": "FID and others of a checkpoint or of images: --ckpt FILE --features FILE_OR_CLASS",
    "features": "a classifier that measures images for evaluate: --config X.yaml",
    "import": "weights of SiT, DiT, REPA or LightningDiT as a checkpoint: --ckpt FILE --out FILE",
    "export": "a checkpoint as a folder of diffusers, or as one .safetensors: --ckpt FILE --out DIR",
    "handover": "the oracle until tau and the model after it, and the other way round: --ckpt FILE",
    "compare": "ways to train, paired by seed: --config X.yaml --arms configs/arms --seeds 3",
}

COMMANDS = {name: _training if name in ("fit", "validate") else _study(name) for name in DESCRIPTIONS}


def _packaged_configs() -> Path:
    """Where the configurations that come with the package lie: in it, or beside it where it is run from its source."""
    inside = Path(__file__).parent / "configs"
    return inside if inside.is_dir() else Path(__file__).parents[1] / "configs"


def _find_packaged(argv: list[str]) -> None:
    """Let ``configs/NAME`` mean the package's own file in the arguments, where there is none in the working folder."""
    configs = _packaged_configs().resolve()
    for place, word in enumerate(argv):
        before, equals, path = word.rpartition("=")  # --config=configs/x.yaml, and profile's --data NAME=configs/x.yaml
        own = configs.parent.joinpath(path).resolve()
        if path.startswith("configs/") and not Path(path).exists() and configs in own.parents and own.exists():
            argv[place] = f"{before}{equals}{own}"


def _usage() -> str:
    from fm_stages import __doc__ as purpose
    from fm_stages import __version__

    rows = "\n".join(f"  {name:10} {text}" for name, text in DESCRIPTIONS.items())
    return (
        f"fm-stages {__version__}\n{purpose}\n\nusage: fm-stages COMMAND [options]\n\n{rows}\n\n"
        "fm-stages COMMAND --help lists a command's options. Each takes --allow-import PACKAGE as well, after which\n"
        "configurations and checkpoints may name classes of that package, which is to run its code.\n\n"
        f"Configurations to begin with: {_packaged_configs()}\n"
        "configs/NAME.yaml finds them from any folder that has none of that name itself."
    )


def main() -> None:
    """Run a subcommand; a mistake in the input ends with one line and status 2, Ctrl-C with one line and 130."""
    command = _run
    if "TORCHELASTIC_ERROR_FILE" in os.environ:  # torchrun ends with the message of the rank that died
        from torch.distributed.elastic.multiprocessing.errors import record

        command = record(_run)
    try:
        try:
            command()
        finally:
            sys.stdout.flush()  # a reader who has left is found here, and not as Python ends
    except KeyboardInterrupt:
        print("\nfm-stages: stopped by Ctrl-C", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        if not _reader_has_left():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)  # as of a process that SIGPIPE ended


def _reader_has_left() -> bool:
    """Whether stdout is a pipe that nobody reads any more, as after ``| head``."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _run() -> None:
    try:
        packages = _take_allowed(sys.argv)
    except ValueError as error:
        print(f"fm-stages: {error}", file=sys.stderr)
        sys.exit(2)
    _find_packaged(sys.argv)
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return
    if arguments[0] in ("--version", "-V"):
        from fm_stages import __version__

        print(__version__)
        return
    if arguments[0] not in COMMANDS:
        print(f"fm-stages: no command {arguments[0]!r}; there are {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)
    try:
        if packages:
            from fm_stages.training import allow_imports

            allow_imports(*packages)
        COMMANDS[arguments[0]]()
    except BrokenPipeError:
        raise
    except Exception as error:
        found = _input_error(error)
        if found is None:
            raise
        from fm_stages.training import explain

        message = "; ".join(line.strip() for line in explain(str(found)).splitlines() if line.strip()).replace(
            ":;", ":"
        )
        files = _config_files(arguments)
        # an option is at fault, or the message names the file
        place = "" if message.startswith(("--", files.removesuffix(": ") or "--")) else files
        cut = f"{message[:LONGEST]} ..." if len(message) > LONGEST else message
        print(f"fm-stages: {place}{cut}", file=sys.stderr)
        sys.exit(2)


def _take_allowed(argv: list[str]) -> list[str]:
    """Take the packages of --allow-import out of the arguments, for this process and those that it starts.

    They go through the environment, which Lightning's other ranks and the runs of a comparison inherit: so no command
    has to know of the option.

    Raises:
        ValueError: if one is missing.
    """
    packages, rest = [], []
    words = iter(argv)
    for word in words:
        name, given, package = word.partition("=")
        if name != "--allow-import":
            rest.append(word)
            continue
        package = package if given else next(words, "")
        if not all(part.isidentifier() for part in package.split(".")):
            raise ValueError(f"--allow-import {package!r}: give the name of a package, as my_package")
        packages.append(package)
    if packages:
        argv[:] = rest
        known = os.environ.get("FM_STAGES_ALLOW_IMPORT", "").split(",")
        os.environ["FM_STAGES_ALLOW_IMPORT"] = ",".join(filter(None, dict.fromkeys([*known, *packages])))
    return packages


def _input_error(error: BaseException | None) -> BaseException | None:
    """The error, or its cause, that a person's input is to blame for; None if there is no such error.

    This package raised on purpose, with a message that names the value and the remedy; or whatever was raised before
    training began, for until then nothing but the input has been used.
    """
    ours = str(Path(__file__).parent)
    first = error
    while error is not None:
        files = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)]
        # once training runs an error is a defect and its traceback is wanted, unless data or first batch were refused
        running = any(Path(file).name in ("fit_loop.py", "evaluation_loop.py") for file in files)
        if running and Path(files[-1]).name not in ("checks.py", "loading.py"):
            return None
        if files[-1].startswith(ours) and isinstance(error, (ValueError, FileNotFoundError, TypeError)):
            return error
        if not files[-1].startswith((ours, *LIBRARIES)) and isinstance(error, LookupError | NameError | AssertionError):
            return None  # a defect in a class of the user's own: its line is what helps
        error = error.__cause__
    return first


def _config_files(arguments: list[str]) -> str:
    """The config files among the arguments, to begin a message with."""
    from fm_stages.training import config_files

    files = config_files(arguments)
    return f"{', '.join(files)}: " if files else ""
