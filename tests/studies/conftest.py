"""A profile made by hand, and the command in an empty folder."""

from collections.abc import Callable

import pytest

from fm_stages.oracle import StageCurves, StageProfile


def made_profile(boundary: float = 0.1, navigation_end: float = 0.1, **fields) -> StageProfile:
    """Floor 1 - t with an error of 0.01, at 101 times; labels in nine of ten draws."""
    t = [i / 100 for i in range(101)]
    flat = [0.01] * len(t)
    curves = {name: [0.5] * len(t) for name in ("top1", "top1_median", "ess", "entropy", "own")}
    curves |= {"floor": [1 - x for x in t], "sem": dict.fromkeys((*curves, "floor"), flat)}
    times = {"navigation_end": navigation_end, "boundary": boundary, "refinement_complete": 0.95}
    curves |= {**times, "time_sem": dict.fromkeys(times, 0.002)}
    alone = StageCurves(**curves)
    return StageProfile(
        **{
            **curves,
            **{"t": t, "num_rows": 1000, "num_distinct": 1000, "num_dims": 16, "rms_norm": 4.0, "num_queries": 64},
            **{"label_dropout": 0.1, "path": "LinearPath", "unconditional": alone, "conditional": alone},
            **{"guidance": [0.2 * (1 - x) for x in t], "guidance_sem": flat},
            **fields,
        }
    )


@pytest.fixture(scope="session")
def profile_of() -> Callable[..., StageProfile]:
    return made_profile
