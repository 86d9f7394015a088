"""The options of ``fm-stages sample``, most of which are those of all drawing, and what they come to for a network."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from jsonargparse import ArgumentParser, Namespace
from torch import Tensor

from fm_stages.flow import (
    DIFFUSIONS,
    SAME_TIME,
    SOLVERS,
    EulerMaruyama,
    Guidance,
    Path,
    Solver,
    dopri5,
    stage_grid,
    time_grid,
)
from fm_stages.oracle import StageProfile
from fm_stages.studies.commands import check_least, command_parser, parse_options
from fm_stages.studies.models import WEIGHTS, Trained, check_guidance, label_rule
from fm_stages.studies.sample.files import FORMATS

SDE = "euler_maruyama"
DEFAULTS = {"num_steps": 50, "shift": 1.0, "diffusion": "sigma", "tolerance": 1e-5}


def sample_parser(purpose: str) -> ArgumentParser:
    """The options of the command; ``purpose`` is what its help begins with."""
    parser = command_parser("sample", purpose)
    option = parser.add_argument
    option("--num", type=int, required=True, help="images in all, over all ranks")
    option("--out", type=str, required=True, help="folder of the images; a new one, or one to go on with")
    option(
        "--format",
        choices=list(FORMATS),
        default="png",
        help="png: images/; npz: one file, as evaluators read it; safetensors: shards",
    )
    option(
        "--data", type=str | None, default=None,
        help="config, checkpoint or class path of the data that makes pixels of what is drawn; default: those that the "
        "checkpoint was trained on",
    )  # fmt: skip
    add_drawing_options(parser)
    return parser


def add_drawing_options(parser: ArgumentParser) -> None:
    """The options of every command that draws images: from which networks, and how."""
    option = parser.add_argument
    option("--ckpt", type=str | None, default=None, help="checkpoint of fm-stages fit")
    option(
        "--expert", type=str, action="append", default=None, metavar="CKPT",
        help="in the place of --ckpt, twice: the network before the split, then the one after it",
    )  # fmt: skip
    option(
        "--split", type=float | None, default=None,
        help="t between the stages, for --expert and --navigation_share; default: the boundary of --profile",
    )  # fmt: skip
    option(
        "--navigation_share", type=float | None, default=None,
        help="share of --num_steps before the split; uniform steps there, and after it",
    )  # fmt: skip
    option("--weights", choices=[*WEIGHTS, None], default=None, help="default: ema where they are kept")
    option("--labels", type=str, default=None, help="balanced (default), drawn, null, a class, or 0,3,5")
    option("--seed", type=int, default=0, help="of all noise and labels")
    option("--batch_size", type=int, default=64, help="images that a rank draws together")
    option("--solver", type=str, default="euler", help=f"{', '.join(SOLVERS)} or {SDE} (the SDE); default: %(default)s")
    option("--num_steps", type=int | None, default=None, help="solver steps; default: 50; not for dopri5")
    option("--shift", type=float | None, default=None, help="of the time grid; > 1: more steps near noise; default: 1")
    option("--tolerance", type=float | None, default=None, help="of dopri5; default: 1e-5")
    option("--diffusion", type=str | None, default=None, help=f"of the SDE: {', '.join(DIFFUSIONS)}; default: sigma")
    option("--guidance_scale", type=float, default=1.0, help="classifier-free guidance; 1 is none")
    option(
        "--guidance_interval", type=float, nargs=2, metavar=("LO", "HI"), default=None,
        help="t between which there is guidance (0 is noise, 1 is data); default: all",
    )  # fmt: skip
    option("--profile", type=str | None, default=None, help="profile.json of fm-stages profile, for interval and split")
    option("--guidance_channels", choices=["all", "3"], default="all", help="3: as the published code of DiT and SiT")
    option("--precision", choices=["32", "bf16"], default="32", help="bf16: autocast; images then depend on the batch")
    option("--device", type=str | None, default=None, help="default: a GPU for each rank if there are any")


def parse(arguments: list[str] | None, purpose: str) -> Namespace:
    """The options, of this process where no arguments are given, checked as far as they can be without the network.

    Raises:
        ValueError: if they do not go together; the message names the option.
    """
    options = parse_options(sample_parser(purpose), arguments)
    check_least(options, 1, "num")
    check_drawing_options(options)
    return options


def check_drawing_options(options: Namespace) -> None:
    """Fill in the defaults that depend on the solver.

    Raises:
        ValueError: if options of `add_drawing_options` do not go together; the message names the option.
    """
    check_least(options, 1, "batch_size")
    solver = options.solver
    if solver not in (*SOLVERS, SDE):
        raise ValueError(f"--solver {solver}: there is no such solver; there are {', '.join(SOLVERS)} and {SDE}")
    adaptive = solver == "dopri5"
    own_steps = "dopri5 chooses its own steps"
    for name, fits, reason in (
        ("num_steps", not adaptive, f"{own_steps}, --tolerance says how fine"),
        ("navigation_share", not adaptive, own_steps),
        (
            "shift", not adaptive and options.navigation_share is None,
            own_steps if adaptive else "--navigation_share says already where the steps go",
        ),
        ("tolerance", adaptive, "only --solver dopri5 has one"),
        ("diffusion", solver == SDE, f"only --solver {SDE} has one"),
    ):  # fmt: skip
        if options[name] is not None and not fits:
            raise ValueError(f"--{name} {options[name]}: {reason}; leave it out")
        options[name] = options[name] if options[name] is not None else DEFAULTS.get(name) if fits else None
    if adaptive and not 0 < options.tolerance < 1:
        raise ValueError(f"--tolerance {options.tolerance} must lie in (0, 1)")
    if options.guidance_interval is not None and options.guidance_scale == 1:
        raise ValueError("--guidance_interval is for guidance: give a --guidance_scale other than 1, or leave it out")
    _check_stages(options)


def _check_stages(options: Namespace) -> None:
    """Raise a ValueError unless the networks, the split, the share and the profile go together."""
    files = options.expert or []
    if options.ckpt is not None and files:
        raise ValueError("--ckpt and --expert both name networks: one is given as --ckpt, two as --expert, twice")
    if options.ckpt is None and len(files) != 2:
        raise ValueError(
            f"--expert is given {len(files)} times: give the network before the split and the one after it, as "
            "--expert EARLY --expert LATE, or one network for all t as --ckpt"
        )
    staged = bool(files) or options.navigation_share is not None
    split = options.split
    if split is not None and not staged:
        raise ValueError(f"--split {split} is for --expert or --navigation_share: give one of them, or leave it out")
    if staged and split is None and options.profile is None:
        raise ValueError(
            f"--{'expert' if files else 'navigation_share'} needs the time between the stages: give --split, or "
            "--profile for the boundary that was measured"
        )
    guided = options.guidance_scale != 1
    if options.profile and not (guided and not options.guidance_interval) and not (staged and split is None):
        raise ValueError(
            "--profile gives the interval of guidance and the split of stages, and here neither is asked of it: leave "
            "it out"
        )


@dataclass(frozen=True)
class Settings:
    """What decides which images are drawn, checked against the networks.

    Attributes:
        solver: of the ODE or SDE.
        guidance: with its interval.
        split: t between the stages; None where nothing depends on it.
        grid: of the solver; the ends of the interval and the split are nodes.
        plain: all of it as plain data, by which two calls are told apart.
    """

    solver: Solver | EulerMaruyama
    guidance: Guidance
    split: float | None
    grid: Tensor
    plain: dict[str, Any]

    @classmethod
    def of(cls, options: Namespace, networks: list[Trained]) -> Settings:
        """From the options, for a network or the experts that `load_networks` gives.

        Raises:
            ValueError: if a network cannot do what they ask for.
        """
        scale, interval, split = options.guidance_scale, options.guidance_interval, options.split
        for trained in networks:
            check_guidance(scale, trained)
        labels = [label_rule(options.labels, trained) for trained in networks][0]
        if scale != 1 and labels == "null":
            raise ValueError(f"--guidance_scale {scale} moves images towards their label, and --labels null gives none")
        path = networks[0].module.path
        if options.profile:
            profile = _profile_of(options.profile, path)
            if scale != 1 and not interval:
                interval = profile.guidance_interval()
            if split is None and (options.expert or options.navigation_share is not None):
                split = profile.boundary
        if split is not None and not SAME_TIME < split < 1 - SAME_TIME:
            raise ValueError(f"stages cannot part at t = {split:g}: give a --split inside (0, 1)")
        channels = None if options.guidance_channels == "all" else int(options.guidance_channels)
        guidance = Guidance(scale, tuple(interval or (0.0, 1.0)), channels)
        grid = _grid(options, split, guidance)
        same = ("seed", "solver", "num_steps", "shift", "tolerance", "diffusion", "precision")
        plain = {
            "weights": one_or_all([trained.weights for trained in networks]),
            "step": one_or_all([trained.step for trained in networks]),
            "weights_digest": one_or_all([trained.digest for trained in networks]),
            "split": split,
            "navigation_share": options.navigation_share,
            "steps_before_split": int((grid < split - SAME_TIME).sum()) if split and options.num_steps else None,
            **{name: options[name] for name in same},
            "labels": labels,
            "guidance_scale": scale,
            "guidance_interval": list(guidance.interval) if scale != 1 else None,
            "guidance_channels": options.guidance_channels if scale != 1 else None,
        }
        return cls(_solver(options, path), guidance, split, grid, plain)


def one_or_all(values: list[Any]) -> Any:
    """A value for each network: the value itself where there is one network."""
    return values[0] if len(values) == 1 else values


def _grid(options: Namespace, split: float | None, guidance: Guidance) -> Tensor:
    nodes = [*guidance.nodes, *([] if split is None else [split])]
    if options.num_steps is None:  # dopri5 asks for the nodes alone
        return time_grid(len(nodes) + 1, nodes=nodes)
    if split is not None and options.navigation_share is not None:
        return stage_grid(options.num_steps, split, options.navigation_share, nodes)
    return time_grid(options.num_steps, options.shift, nodes)


def _solver(options: Namespace, path: Path) -> Solver | EulerMaruyama:
    if options.solver == SDE:
        return EulerMaruyama(path, options.diffusion)
    return partial(dopri5, tolerance=options.tolerance) if options.solver == "dopri5" else SOLVERS[options.solver]


def _profile_of(file: str, path: Path) -> StageProfile:
    """A profile, which has to be of the path of the network."""
    profile, name = StageProfile.load(file), StageProfile.name_of(path)
    if profile.path != name:
        raise ValueError(f"--profile {file} is of {profile.path}, the network of {name}: measure its own")
    return profile
