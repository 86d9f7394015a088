"""The options of ``fm-stages sample``, and what they come to for a network."""

from __future__ import annotations

from argparse import ArgumentError
from dataclasses import dataclass
from functools import partial
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from fm_stages.flow import DIFFUSIONS, SOLVERS, EulerMaruyama, Guidance, Solver, dopri5, time_grid
from fm_stages.oracle import StageProfile
from fm_stages.studies.models import WEIGHTS, Trained, check_guidance, label_rule
from fm_stages.studies.sample_files import FORMATS

SDE = "euler_maruyama"
DEFAULTS = {"num_steps": 50, "shift": 1.0, "diffusion": "sigma", "tolerance": 1e-5}


def sample_parser(purpose: str) -> ArgumentParser:
    """The options of the command; ``purpose`` is what its help begins with."""
    parser = ArgumentParser(prog="fm-stages sample", description=purpose, exit_on_error=False, allow_abbrev=False)
    option = parser.add_argument
    option("--ckpt", type=str, required=True, help="checkpoint of fm-stages fit")
    option("--num", type=int, required=True, help="images in all, over all ranks")
    option("--out", type=str, required=True, help="folder of the images; a new one, or one to go on with")
    option(
        "--format",
        choices=list(FORMATS),
        default="png",
        help="png: images/; npz: one file, as evaluators read it; safetensors: shards",
    )
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
    option("--profile", type=str | None, default=None, help="profile.json of fm-stages profile, for that interval")
    option("--guidance_channels", choices=["all", "3"], default="all", help="3: as the published code of DiT and SiT")
    option("--precision", choices=["32", "bf16"], default="32", help="bf16: autocast; images then depend on the batch")
    option("--device", type=str | None, default=None, help="default: a GPU for each rank if there are any")
    return parser


def parse(arguments: list[str], purpose: str) -> Namespace:
    """The options, checked as far as they can be without the network.

    Raises:
        ValueError: if they do not go together; the message names the option.
    """
    try:
        options = sample_parser(purpose).parse_args(arguments)
    except ArgumentError as error:
        raise ValueError(f"{error} (fm-stages sample --help lists what can be given)") from error
    for name in ("num", "batch_size"):
        if options[name] < 1:
            raise ValueError(f"--{name} {options[name]} must be 1 or more")
    solver = options.solver
    if solver not in (*SOLVERS, SDE):
        raise ValueError(f"--solver {solver}: there is no such solver; there are {', '.join(SOLVERS)} and {SDE}")
    adaptive = solver == "dopri5"
    for name, fits, reason in (
        ("num_steps", not adaptive, "dopri5 chooses its own steps, --tolerance says how fine"),
        ("shift", not adaptive, "dopri5 chooses its own steps"),
        ("tolerance", adaptive, "only --solver dopri5 has one"),
        ("diffusion", solver == SDE, f"only --solver {SDE} has one"),
    ):
        if options[name] is not None and not fits:
            raise ValueError(f"--{name} {options[name]}: {reason}; leave it out")
        options[name] = options[name] if options[name] is not None else DEFAULTS[name] if fits else None
    if adaptive and not 0 < options.tolerance < 1:
        raise ValueError(f"--tolerance {options.tolerance} must lie in (0, 1)")
    for name in ("guidance_interval", "profile"):
        if options[name] is not None and options.guidance_scale == 1:
            raise ValueError(f"--{name} is for guidance: give a --guidance_scale other than 1, or leave it out")
    if options.profile and options.guidance_interval:
        raise ValueError("--profile and --guidance_interval both give the interval of guidance: leave one out")
    return options


@dataclass(frozen=True)
class Settings:
    """What decides which images are drawn, checked against the network.

    Attributes:
        solver: of the ODE or SDE.
        guidance: with its interval.
        plain: all of it as plain data, by which two calls are told apart.
    """

    solver: Solver | EulerMaruyama
    guidance: Guidance
    plain: dict[str, Any]

    @classmethod
    def of(cls, options: Namespace, trained: Trained) -> Settings:
        """From the options.

        Raises:
            ValueError: if the network cannot do what they ask for.
        """
        scale, interval = options.guidance_scale, tuple(options.guidance_interval or (0.0, 1.0))
        check_guidance(scale, trained)
        if options.profile:
            interval = _interval_of(options.profile, trained)
        channels = None if options.guidance_channels == "all" else int(options.guidance_channels)
        guidance = Guidance(scale, interval, channels)
        if options.num_steps is not None:
            time_grid(options.num_steps, options.shift, guidance.nodes)  # refuses what it cannot be made of
        solver: Solver | EulerMaruyama
        if options.solver == SDE:
            solver = EulerMaruyama(trained.module.path, options.diffusion)
        elif options.solver == "dopri5":
            solver = partial(dopri5, tolerance=options.tolerance)
        else:
            solver = SOLVERS[options.solver]
        same = ("num", "format", "seed", "solver", "num_steps", "shift", "tolerance", "diffusion", "precision")
        plain = {
            **{"weights": trained.weights, "step": trained.step, "weights_digest": trained.digest},
            **{name: options[name] for name in same},
            "labels": label_rule(options.labels, trained),
            "guidance_scale": scale,
            "guidance_interval": list(interval) if scale != 1 else None,
            "guidance_channels": options.guidance_channels if scale != 1 else None,
        }
        return cls(solver, guidance, plain)


def _interval_of(file: str, trained: Trained) -> tuple[float, float]:
    """The guidance interval of a profile, which has to be of the path of the network."""
    profile = StageProfile.load(file)
    path = StageProfile.name_of(trained.module.path)
    if profile.path != path:
        raise ValueError(f"--profile {file} is of {profile.path}, the network of {path}: measure its own")
    return profile.guidance_interval()
