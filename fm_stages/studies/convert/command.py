"""``fm-stages import``: weights of SiT, DiT, REPA and LightningDiT, as a checkpoint that every command takes."""

from __future__ import annotations

from pathlib import Path

import yaml

from fm_stages.networks import null_row_is_untrained
from fm_stages.studies.commands import command_parser, parse_options
from fm_stages.studies.convert.files import read_weights, write_network
from fm_stages.studies.convert.layouts import LABELS, recognize
from fm_stages.studies.convert.weights import drop_sigma, reverse_time

CONVENTIONS: dict[str, tuple[int | None, float | None]] = {
    "sit": (0, 1.0),
    "dit": (None, None),
    "repa": (1, 1.0),
    "lightningdit": (0, 1.0),
}
"""Of each kind, the time at which there is only noise, and what t is multiplied by; None: nobody knows, ask."""

NOT_SEEN = (
    "Names and shapes do not tell what a network predicts, nor which way its time runs. These were taken as SiT's "
    "(velocity, t = 0 noise, t in [0, 1]). For a DiT that learned velocity otherwise, give --kind dit. One that "
    "predicts noise, as DiT's own published weights do, cannot be imported."
)


def import_network(
    source: str | Path,
    out: str | Path,
    kind: str | None = None,
    weights: str | None = None,
    num_heads: int | None = None,
    num_classes: int | None = None,
    noise_at: int | None = None,
    time_scale: float | None = None,
    path: str = "LinearPath",
    unpickle: bool = False,
) -> str:
    """Convert a file of another project; see `import_command` for the arguments.

    Returns:
        What was found and done, for a person.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the weights are of no known kind, something must be said that they do not tell, or ``out``
            exists.
    """
    if Path(out).exists():  # before minutes of work
        raise ValueError(f"{out} exists already: choose another --out, or remove it")
    found, which = read_weights(source, weights, unpickle)
    try:
        layout = recognize(found, num_heads, num_classes)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    noise_at, time_scale = _conventions(kind, layout.kind, noise_at, time_scale)

    arguments, state = dict(layout.arguments), {name: value.float() for name, value in layout.weights.items()}
    done = []
    if noise_at == 1:
        state = reverse_time(state, time_scale)
        done.append("time and velocity reversed, inside the first layer for t and the last one")
    if arguments.pop("learn_sigma"):
        state = drop_sigma(state, arguments["patch_size"], arguments["in_channels"])
        done.append("the channels for sigma dropped")
    if layout.kind == "repa":
        done.append("the projectors dropped")
    if not layout.null_class:
        done.append("no null class found: label -1 gets the mean of the classes, which nobody trained")
    has_null = layout.null_class and not null_row_is_untrained(state[LABELS])
    if layout.null_class and not has_null:
        done.append("the row of the null class is as it was drawn, so that label dropout was 0: do not guide")
    arguments["time_scale"] = time_scale

    model = {
        "network": {"class_path": "fm_stages.networks.DiT", "init_args": arguments},
        "path": {"class_path": f"fm_stages.flow.{path}"},
        "label_dropout": 0.1 if has_null else 0.0,
        "ema_decay": 0.0,  # what is measured or sampled needs no twin
    }
    write_network(out, state, which, yaml.safe_dump({"model": model}, sort_keys=False))
    num_weights = sum(value.numel() for name, value in state.items() if not name.startswith("feat_rope."))
    sizes = ", ".join(f"{name}={value}" for name, value in arguments.items())
    lines = [f"{kind or layout.kind}, {which} weights: {num_weights:,} in DiT({sizes})", *done, f"Written to {out}."]
    return "\n".join([*lines, *([NOT_SEEN] if layout.kind == "sit" and kind is None else [])])


def _conventions(kind: str | None, seen: str, noise_at: int | None, time_scale: float | None) -> tuple[int, float]:
    """At which time the source has only noise, and what it multiplies t by."""
    fitting = {"sit": ("sit", "dit", "repa"), "repa": ("repa",), "lightningdit": ("lightningdit",)}[seen]
    if kind is not None and kind not in fitting:
        raise ValueError(f"--kind {kind}: the weights are those of {' or '.join(fitting)}")
    usual_end, usual_scale = CONVENTIONS[kind or seen]
    end = usual_end if noise_at is None else noise_at
    scale = usual_scale if time_scale is None else time_scale
    if end is None or scale is None:
        raise ValueError(
            "--kind dit: say at which time there is only noise (--noise_at 0 or 1) and what t in [0, 1] is multiplied "
            "by before it is embedded (--time_scale 1 or 1000)"
        )
    if end not in (0, 1):
        raise ValueError(f"--noise_at {end}: time runs from 0 to 1, give the end where there is only noise")
    if not scale > 0:
        raise ValueError(f"--time_scale {scale} must be positive")
    return end, scale


def import_command(arguments: list[str] | None = None) -> None:
    """The command: reads weights of another project and writes a checkpoint.

    Args:
        arguments: those after ``fm-stages import``; None: of this process.
    """
    parser = command_parser("import", __doc__)
    add = parser.add_argument
    add("--ckpt", type=str, required=True, help="file of torch.save, or .safetensors")
    add("--out", type=str, required=True, help="file to write, .ckpt or .safetensors")
    add("--kind", choices=[*CONVENTIONS], default=None, help="project it comes from; default: as the weights tell")
    add("--weights", choices=["ema", "raw"], default=None, help="which weights; default: EMA where there are some")
    add("--num_heads", type=int | None, default=None, help="attention heads, for sizes that nobody published")
    add("--num_classes", type=int | None, default=None, help="labels, the null class not counted")
    add("--noise_at", type=int | None, default=None, help="0 or 1: the source's time of pure noise, if not its kind's")
    add("--time_scale", type=float | None, default=None, help="what the source multiplies t by, if not its kind's")
    add("--path", choices=["LinearPath", "CosinePath", "VPPath"], default="LinearPath", help="that it was trained on")
    add("--unpickle", action="store_true", help="read a file that can run any code: only from people you trust")
    options = vars(parse_options(parser, arguments))
    print(import_network(options.pop("ckpt"), **options))
