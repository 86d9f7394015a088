"""``fm-stages export``: a checkpoint as a folder of diffusers, or as one file of weights."""
