"""From a session without end to the settings of a file that makes its video again."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.assembly import Pipeline
from pipeline.config.config import InferenceConfig, as_dict, load_config
from pipeline.runtime.loading import generator_settings
from utils.errors import InputError


def config_to_repeat(pipeline: Pipeline, *, seed: int, frames: int, overrides: Sequence[str] = ()) -> InferenceConfig:
    """The configuration by which interactive_inference.py makes the first `frames` latent frames of a session of the
    pipeline's with these `overrides` again, given the session's storyboard.

    Raises InputError for so few frames that a script would refuse them, or would share out the memory of the heads in
    another way (policy calibrated looks at the length of the video).
    """
    length = [f"seed={seed}", f"num_output_frames={frames}"]
    config = load_config(as_dict(pipeline.config), [*overrides, *length])
    again = generator_settings(config, pipeline.generator.model.config).policy
    if again.table != pipeline.endless_policy(overrides).table:
        raise InputError(
            f"frames: a video of {frames} latent frames would be made with other lengths of memory than this one "
            f"without end; go on for at least {config.model_kwargs.local_attn_size} latent frames"
        )
    return config
