"""The network of a configuration, refused before memory is taken for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser
from torch import Tensor, nn

from fm_stages.data import TooLargeError, available_memory_bytes, without_memory
from fm_stages.training.class_paths import PACKAGES, instantiate


def check_network(section: Any, weights: Mapping[str, Tensor] | None = None) -> None:
    """Refuse a network before memory is taken for it.

    Args:
        section: ``model.network`` of a parsed configuration, or of one that is plain data: class path and arguments.
        weights: that it is to hold, by its own names; None: it starts afresh, and has to fit into memory.

    Raises:
        ValueError: with the bytes that it takes, or with the first weight that differs.
    """
    path = section if isinstance(section, str) else section.get("class_path") if section else None
    if not isinstance(path, str) or path.partition(".")[0] not in PACKAGES:
        return  # a class of one's own may do anything as it is built, and is trusted
    held = None if weights is None else sum(x.numel() * x.element_size() for x in weights.values())
    limit = available_memory_bytes() if held is None else 8 * held + 2**26
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(nn.Module, "network")
    there = f"{limit / 2**30:.1f} GiB of memory are available" if held is None else f"the file holds {held}"
    try:
        with without_memory(limit, path, there):
            network = instantiate(parser, parser.parse_object({"network": section})).network
    except TooLargeError:
        raise
    except Exception:  # it needs values, or its arguments are wrong: to be seen where it is built
        return
    if weights is not None:
        own = network.state_dict()
        wrong = [k for k in {**weights, **own} if k not in own or k not in weights or own[k].shape != weights[k].shape]
        if wrong:
            theirs, ours = (tuple(x[wrong[0]].shape) if wrong[0] in x else "nothing" for x in (weights, own))
            raise ValueError(
                f"its weights are not those of the {path} that it describes: {len(wrong)} differ, first {wrong[0]}, "
                f"{theirs} in the file and {ours} in the network"
            )
