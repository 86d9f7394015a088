"""The model card of an exported folder: what the network is, and how to draw with it."""

from __future__ import annotations

from typing import Any

from fm_stages import __version__

TEXT = """---
library_name: diffusers
pipeline_tag: unconditional-image-generation
tags:
- flow-matching
---

# {name}, trained with flow matching

{table}

```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("path/of/this/folder", trust_remote_code=True)
images = pipeline({call}).images
```

With `trust_remote_code=True` diffusers runs the Python files of this folder, which are the network and the pipeline:
read them first. They need {libraries}.

**Arguments** of the call, each as in the table above where it is not given: `class_labels` ({labels}), `batch_size`,
`num_inference_steps`, `guidance_scale`, `guidance_interval`, `guidance_channels`, `generator` or the noise itself as
`latents`, and `output_type` ({outputs}).

**Time**: t = 0 is noise and t = 1 is data, and the network gives dx/dt: `pipeline.network(x, t, labels)`. diffusers'
sigma is 1 - t. The pipeline passes the scheduler its own time grid and turns the sign: a call of the scheduler without
these sigmas takes another grid, and draws other images. {path_note}

Made by fm-stages {version}. From the same noise the images are those of `fm-stages sample` with Euler steps, to 1e-4.
"""

LINEAR = "The path is linear, so that sigma is also the coefficient of the noise."
CURVED = (
    "The path is {path}, on which sigma is not the coefficient of the noise: do not use the scheduler's `scale_noise` "
    "and `stochastic_sampling`."
)


def card(facts: dict[str, str], index: dict[str, Any], libraries: list[str]) -> str:
    """The text of README.md.

    Args:
        facts: rows of its table.
        index: model_index.json.
        libraries: that have to be installed.
    """
    num_classes, path = index["num_classes"], index["path"]
    if num_classes:
        none = (
            ", -1 or none for an image without label" if index["null_class"] else ", which the network has to be given"
        )
        labels, call = f"0 to {num_classes - 1}{none}", f"class_labels={[*range(min(num_classes, 2))]}"
    else:
        labels, call = "none: the network knows no classes", "batch_size=2"
    if not index["pixels"]:
        call += ', output_type="latent"'
    return TEXT.format(
        name=facts["network"].partition(",")[0],
        table="\n".join(["| what | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in facts.items())]),
        call=call,
        libraries=", ".join(libraries),
        labels=labels,
        outputs="`pil`, `np`, `pt` or `latent`" if index["pixels"] else "`latent`: a decoder has to follow",
        path_note=LINEAR if path == "LinearPath" else CURVED.format(path=path),
        version=__version__,
    )
