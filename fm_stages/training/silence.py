"""Warnings of libraries that say nothing to the person who reads the log of a run."""

from __future__ import annotations

import logging
import warnings

HARMLESS = (
    "LightningCLI's args parameter is intended",  # of a rehearsal, whose arguments are the command's and some more
    "The number of training batches",  # logging counts steps of the run, not of an epoch
    "Found .* module.s. in eval mode",  # the frozen twin
    "The '.*' does not have many workers",  # the images are in memory
    "`isinstance.treespec, LeafSpec.` is deprecated",  # Lightning on new versions of torch
    "The `srun` command is available",  # `find_launcher` knows
    "Precision .* is not supported by the model summary",  # which then says what float32 would take
    "FSDP2-wrapped module .* returned a view tensor",  # which nobody changes in place
)
"""How they begin, as regular expressions."""


def silence() -> None:
    """Leave them out, in this process."""
    for message in HARMLESS:
        warnings.filterwarnings("ignore", message)
    # an advertisement, in every run
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda r: "litlogger" not in r.getMessage())
