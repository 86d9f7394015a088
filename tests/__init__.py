"""A package of its own, for there are others of this name among installed ones (torch-fidelity brings one)."""
