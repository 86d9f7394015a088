"""Checkpoints: when and how they are written, what is in them, how a run goes on from one."""
