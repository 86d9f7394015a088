"""Every figure, made from plain data: nothing here computes anything that a table does not say."""

from fm_stages.plots.comparison import gap_of_arms, paired_differences, progress_of_arms
from fm_stages.plots.density import timestep_density
from fm_stages.plots.evaluation import evaluation
from fm_stages.plots.generalisation import regular_by_stage
from fm_stages.plots.gradients import gradient_variance
from fm_stages.plots.handover import handover
from fm_stages.plots.heat_maps import gap_over_steps, regular_over_steps
from fm_stages.plots.losses import gap_by_t
from fm_stages.plots.memorization import closest_pairs, memorization_index
from fm_stages.plots.pictures import oracle_paths, posterior_strips, prediction_strips
from fm_stages.plots.stages import boundary_trends, compare_stages, stage_curves
from fm_stages.plots.style import save, shade_stages

__all__ = [
    "boundary_trends",
    "closest_pairs",
    "compare_stages",
    "evaluation",
    "gap_by_t",
    "gap_of_arms",
    "gap_over_steps",
    "gradient_variance",
    "handover",
    "memorization_index",
    "oracle_paths",
    "paired_differences",
    "posterior_strips",
    "prediction_strips",
    "progress_of_arms",
    "regular_by_stage",
    "regular_over_steps",
    "save",
    "shade_stages",
    "stage_curves",
    "timestep_density",
]
