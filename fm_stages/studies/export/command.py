"""``fm-stages export``: a checkpoint as a folder that diffusers loads without this package, or as one .safetensors.

The folder draws what ``fm-stages sample`` draws with Euler steps, from the same noise. diffusers' sigma is read as
1 - t on every path, so that the scheduler's step from one sigma to the next is the Euler step.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import save_file

from fm_stages import __version__
from fm_stages.data import ImageData, whole_folder
from fm_stages.flow import Guidance, time_grid
from fm_stages.oracle import StageProfile
from fm_stages.studies.commands import command_parser, parse_options
from fm_stages.studies.convert.files import write_network
from fm_stages.studies.export.card import card
from fm_stages.studies.export.source import Source, source_of
from fm_stages.studies.models import WEIGHTS, Trained, check_guidance, load_trained

OF_TRAINING = ("activation_checkpointing", "compile_blocks")
"""Arguments of a network that change no number, and that a loaded folder has no use for."""


@dataclass(frozen=True)
class Drawing:
    """What an exported folder does where a call does not say otherwise.

    Attributes:
        shift: of the time grid.
        num_steps: Euler steps.
        guidance_scale: of classifier-free guidance; 1 is none.
        guidance_interval: of t, in which there is guidance.
    """

    shift: float = 1.0
    num_steps: int = 50
    guidance_scale: float = 1.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)

    def check(self, trained: Trained) -> None:
        """Refuse what the network cannot do.

        Raises:
            ValueError: with the value and the remedy.
        """
        guidance = Guidance(self.guidance_scale, self.guidance_interval)
        time_grid(self.num_steps, self.shift, guidance.nodes)  # refuses what it cannot be made of
        check_guidance(self.guidance_scale, trained)


def export_file(trained: Trained, out: str | Path) -> None:
    """Write the weights with their configuration to one .safetensors, which every command takes as a checkpoint.

    Raises:
        ValueError: if there is such a file.
    """
    config = {name: trained.config[name] for name in ("model", "data") if trained.config.get(name)}
    text = yaml.safe_dump(config, sort_keys=False)
    write_network(out, trained.network.state_dict(), trained.weights, text, trained.step)


def export_folder(trained: Trained, out: str | Path, drawing: Drawing | None = None) -> None:
    """Write a folder that `DiffusionPipeline.from_pretrained(out, trust_remote_code=True)` loads.

    Raises:
        ValueError: if the network is not one of this package, there are other files in the folder, or the network
            cannot do what is asked for.
    """
    out, drawing = Path(out).resolve(), drawing or Drawing()  # of a link, the folder that it stands for
    drawing.check(trained)
    _refuse_taken(out)
    network = type(trained.network)
    if not network.__module__.startswith("fm_stages.networks."):
        raise ValueError(
            f"{network.__module__}.{network.__qualname__} is not of fm_stages.networks, and its code cannot be put "
            f"into a folder of diffusers: write its weights with --out {out}.safetensors"
        )
    with whole_folder(out) as part:
        _fill(part, trained, drawing)


def _refuse_taken(out: Path) -> None:
    if out.resolve() == Path.cwd():
        raise ValueError(f"--out {out} is where you are, and would be replaced under you: give a new folder")
    if out.is_dir() and (there := sorted(path.name for path in out.iterdir())):
        raise ValueError(f"--out {out} holds other files ({there[0]}, ...): give a new or an empty folder")
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file: give a new or an empty folder, or a name that ends in .safetensors")


def _fill(folder: Path, trained: Trained, drawing: Drawing) -> None:
    """Write the files of an exported folder, laid out as diffusers expects them."""
    # here: it takes seconds
    from diffusers import __version__ as diffusers_version
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    from fm_stages.studies.export.pipeline import FlowMatchingPipeline, VelocityNetwork

    network = type(trained.network)
    model = source_of(network, VelocityNetwork, header=_header(network))
    pipeline = source_of(FlowMatchingPipeline, header=_header(FlowMatchingPipeline))
    # diffusers takes names of its own pipelines, as dit, for these
    file = network.__module__.rpartition(".")[2] + "_network"
    (folder / "network").mkdir(parents=True)
    (folder / "network" / f"{file}.py").write_text(
        f"{model.text}\n\nVelocityNetwork.architecture = {network.__name__}\n"
    )
    (folder / "pipeline.py").write_text(pipeline.text)
    FlowMatchEulerDiscreteScheduler(shift=drawing.shift).save_pretrained(folder / "scheduler")

    arguments = trained.config["model"]["network"].get("init_args") or {}
    arguments = {name: value for name, value in arguments.items() if name not in OF_TRAINING}
    version = {"_diffusers_version": diffusers_version}
    _write_json(
        folder / "network" / "config.json",
        {"_class_name": VelocityNetwork.__name__, **version, "arguments": arguments},
    )
    weights = {f"network.{name}": value.contiguous() for name, value in trained.network.state_dict().items()}
    save_file(weights, folder / "network" / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    index = {
        "_class_name": ["pipeline", FlowMatchingPipeline.__name__],
        **version,
        "network": [file, VelocityNetwork.__name__],
        "scheduler": ["diffusers", FlowMatchEulerDiscreteScheduler.__name__],
        "path": type(trained.module.path).__name__,
        "num_classes": trained.num_classes,
        "null_class": not trained.num_classes or trained.module.label_dropout > 0,
        "pixels": _draws_pixels(trained),
        "num_inference_steps": drawing.num_steps,
        "guidance_scale": float(drawing.guidance_scale),
        "guidance_low": float(drawing.guidance_interval[0]),
        "guidance_high": float(drawing.guidance_interval[1]),
    }
    _write_json(folder / "model_index.json", index)
    libraries = _needed(model, pipeline)
    (folder / "README.md").write_text(card(_facts(trained, drawing), index, libraries))


def _header(main: type) -> str:
    """What a file of source begins with: where it is from, and what its module says of itself."""
    origin = (
        f"Generated by fm-stages {__version__} from its own source. Copyright (c) the fm-stages authors, MIT License."
    )
    return f'# {origin}\n\n"""{sys.modules[main.__module__].__doc__}"""'


def _write_json(path: Path, tree: dict[str, Any]) -> None:
    path.write_text(json.dumps(tree, indent=2) + "\n")


def _draws_pixels(trained: Trained) -> bool:
    """Whether what the network draws are images in [-1, 1]; not where nothing says so, as for imported weights."""
    usual = trained.data is not None and type(trained.data).to_pixels is ImageData.to_pixels
    return usual and trained.shape[0] in (1, 3)


def _needed(*sources: Source) -> list[str]:
    """Libraries that have to be installed for the folder to load."""
    own = {name for source in sources for name in source.libraries}
    return sorted(name for name in own if name not in sys.stdlib_module_names)


def _facts(trained: Trained, drawing: Drawing) -> dict[str, str]:
    """The table of the model card."""
    data = trained.config.get("data")
    num_weights = sum(weight.numel() for weight in trained.network.parameters())
    decay = trained.module.ema_decay  # 0: of imported weights, where nobody told
    kind = "EMA" + (f", decay {decay:g}" if decay else "") if trained.weights == "ema" else "raw"
    low, high = drawing.guidance_interval
    scale = "1, which is none" if drawing.guidance_scale == 1 else f"{drawing.guidance_scale:g}"
    return {
        "network": f"{type(trained.network).__name__}, {num_weights:,} weights",
        "image": f"{' x '.join(map(str, trained.shape))} (channels, height, width), "
        + ("pixels in [-1, 1]" if _draws_pixels(trained) else "no pixels"),
        "data": data["class_path"].rpartition(".")[2] if data else "not known: the weights were imported",
        "classes": f"{trained.num_classes}, label dropout {trained.module.label_dropout:g}",
        "steps of training": f"{trained.step:,}" if trained.step else "not known",
        "weights": f"{kind}; digest {trained.digest}",
        "path": StageProfile.name_of(trained.module.path),
        "density of t in training": type(trained.module.timesteps).__name__,
        "target": type(trained.module.target).__name__,
        "steps of the solver": f"{drawing.num_steps}, Euler",
        "shift of the time grid": f"{drawing.shift:g}",
        "guidance": f"scale {scale}; for t from {low:g} to {high:g}",
    }


def export_command(arguments: list[str] | None = None) -> None:
    """The command: reads a checkpoint and writes a folder, or one file where ``--out`` ends in .safetensors.

    Args:
        arguments: those after ``fm-stages export``; None: of this process.
    """
    parser = command_parser("export", __doc__)
    add = parser.add_argument
    add("--ckpt", type=str, required=True, help="checkpoint of fm-stages fit")
    add("--out", type=str, required=True, help="folder of diffusers; or a file, if it ends in .safetensors")
    add("--weights", choices=[*WEIGHTS, None], default=None, help="default: ema where they are kept")
    # what follows is what the folder draws with unless it is told otherwise
    usual = Drawing()
    add("--shift", type=float | None, default=None, help="of the time grid; > 1: more steps near noise; default: 1")
    add("--num_steps", type=int | None, default=None, help="of the Euler solver; default: 50")
    add("--guidance_scale", type=float | None, default=None, help="classifier-free guidance; default: 1, which is none")
    add(
        "--guidance_interval", type=float, nargs=2, metavar=("LO", "HI"), default=None,
        help="t between which there is guidance (0 is noise, 1 is data); default: all",
    )  # fmt: skip
    options = parse_options(parser, arguments)
    given = {name: options[name] for name in asdict(usual) if options[name] is not None}
    out = Path(options.out)
    if out.suffix in (".ckpt", ".pt", ".pth", ".bin"):
        raise ValueError(f"--out {out}: give a name that ends in .safetensors, or a folder for diffusers")
    if given and out.suffix == ".safetensors":
        raise ValueError(f"--{next(iter(given))} is for a folder: a .safetensors holds weights alone, leave it out")
    if out.suffix == ".safetensors" and out.exists():  # before minutes of reading
        raise ValueError(f"{out} exists already: choose another --out, or remove it")
    if out.suffix != ".safetensors":
        _refuse_taken(out)
    trained = load_trained(options.ckpt, options.weights)
    if out.suffix == ".safetensors":
        export_file(trained, out)
    else:
        export_folder(trained, out, Drawing(**given))
    print(f"{trained.weights} weights of step {trained.step} ({trained.digest}) written to {out}")
