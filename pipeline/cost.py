"""What a steady block costs under the settings, in frames that heads see and in counted operations."""

from __future__ import annotations

from dataclasses import replace

from dummy.equal_cost import mean_frames
from dummy.policy import ContextPolicy, HeadSplit, policy_from_config
from dummy.roles import HeadRoles, Role
from pipeline.config import InferenceConfig
from wan.config import ModelConfig
from wan.geometry import LatentGeometry
from wan.head_group import Retention
from wan.operations import clean_pass_operations, forward_operations


def assumed_roles(sizes: ModelConfig, split: HeadSplit) -> HeadRoles:
    """Roles for a plan before any are observed: dummy heads spread evenly, the others half sink, half neighbour."""
    total = sizes.num_layers * sizes.num_heads
    others = (i for i in range(total))
    count = split.budget.assumed(sizes.num_layers, sizes.num_heads)
    dummy = {i * total // count for i in range(count)}
    codes = [Role.DUMMY if i in dummy else (Role.SINK, Role.NEIGHBOR)[next(others) % 2] for i in range(total)]
    rows = [codes[i : i + sizes.num_heads] for i in range(0, total, sizes.num_heads)]
    return HeadRoles.from_codes(rows)


def kept_frames(policy: ContextPolicy, sizes: ModelConfig, past: int) -> float:
    """Earlier frames that a head sees, as a mean over all heads, once roles hold, where there are `past` of them."""
    if policy.split is None:
        return min(policy.initial.total, past)
    roles = policy.split.roles or assumed_roles(sizes, policy.split)
    there = {
        role: Retention(0, min(retention.total, past)) for role, retention in policy.split.retentions(roles).items()
    }
    return mean_frames(there, roles.counts())


def block_operations(sizes: ModelConfig, geometry: LatentGeometry, kept: float, steps: int) -> float:
    """Of a block's denoising steps and its clean pass, with heads that see `kept` earlier frames on average."""
    head_frames = (kept + geometry.frames_per_block) * sizes.num_layers * sizes.num_heads
    return steps * forward_operations(sizes, geometry, head_frames) + clean_pass_operations(
        sizes, geometry, head_frames
    )


def cost_lines(
    config: InferenceConfig, policy: ContextPolicy, sizes: ModelConfig, geometry: LatentGeometry
) -> list[str]:
    """The block before the last, which has the most history of all that have a clean pass, beside the same block
    without Dummy Forcing."""
    steps, past = len(config.denoising_step_list), geometry.num_frames - 2 * geometry.frames_per_block
    if past < 0:
        return []
    kept = kept_frames(policy, sizes, past)
    operations = block_operations(sizes, geometry, kept, steps)
    line = f"Cost: {kept:.2f} earlier frames a head on average, {operations / 1e12:.3g} TFLOP a block"
    if policy.split is None:
        return [line]
    off = replace(config.dummy_forcing, enabled=False)
    dense = kept_frames(policy_from_config(config.model_kwargs, off, geometry.frames_per_block), sizes, past)
    share = operations / block_operations(sizes, geometry, dense, steps)
    return [
        f"{line}, {100 * share:.0f} % of that without Dummy Forcing ({dense:.2f} frames)",
        *_remarks(config, policy),
    ]


def _remarks(config: InferenceConfig, policy: ContextPolicy) -> list[str]:
    """What is assumed where the run has yet to find it out."""
    split, forcing = policy.split, config.dummy_forcing
    assert split is not None
    remarks = []
    if split.roles is None:
        remarks.append("  (sink and neighbor heads: an even split is assumed; the run finds it out)")
    if split.roles is None and forcing.num_dummy == "auto":
        remarks.append(
            "  (dummy heads: half are assumed; the run takes as many as lose at most "
            f"{100 * forcing.max_loss:g} % of all heads' attention)"
        )
    if isinstance(forcing.equal_cost, float):
        remarks.append(
            f"  (neighbor heads: as many frames as {forcing.equal_cost:g} pixel frames/s allow, measured by the run)"
        )
    return remarks
