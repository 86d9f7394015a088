"""What a velocity network refuses: sizes that cannot be, and inputs of other shapes than it was built for."""

from torch import Tensor


def check_sizes(network: str, num_classes: int, **sizes: int) -> None:
    """Refuse sizes below 1, and a negative number of classes.

    Raises:
        ValueError: with the names and values.
    """
    if wrong := [f"{name}={value}" for name, value in sizes.items() if value < 1]:
        raise ValueError(f"sizes of a {network} must be 1 or more, got {', '.join(wrong)}")
    if num_classes < 0:
        raise ValueError(f"num_classes={num_classes} is negative: pass 0 for an unconditional network")


def check_inputs(x: Tensor, t: Tensor, y: Tensor, channels: int, side: int) -> None:
    """Refuse inputs that are not x (B, C, S, S), t (B,) and y (B,).

    Raises:
        ValueError: with the shape and the remedy.
    """
    if x.ndim != 4 or x.shape[1:] != (channels, side, side):
        raise ValueError(
            f"x has shape {tuple(x.shape)}, this network takes (batch, {channels}, {side}, {side}): set its "
            f"in_channels and input_size to those of the data"
        )
    for name, value in (("t", t), ("y", y)):
        if value.shape != x.shape[:1]:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}: pass one value for each of the {x.shape[0]} samples, "
                f"shape ({x.shape[0]},)"
            )
