"""The mathematics of flow matching, without data and without Lightning."""

from fm_stages.flow.generators import keyed_generator, keyed_normal, keyed_uniform, stratified_uniform
from fm_stages.flow.paths import CosinePath, LinearPath, Path, VPPath, check_time, expand_time
from fm_stages.flow.sampling import sample
from fm_stages.flow.solvers import euler, time_grid
from fm_stages.flow.timesteps import (
    LogitNormalTimesteps,
    ShiftedTimesteps,
    TimestepSampler,
    UniformTimesteps,
    shift_for_share,
    shift_time,
)
from fm_stages.flow.weighting import StageWeighting, UniformWeighting, Weighting

__all__ = [
    "CosinePath",
    "LinearPath",
    "LogitNormalTimesteps",
    "Path",
    "ShiftedTimesteps",
    "StageWeighting",
    "TimestepSampler",
    "UniformTimesteps",
    "UniformWeighting",
    "VPPath",
    "Weighting",
    "check_time",
    "euler",
    "expand_time",
    "keyed_generator",
    "keyed_normal",
    "keyed_uniform",
    "sample",
    "shift_for_share",
    "shift_time",
    "stratified_uniform",
    "time_grid",
]
