"""What a steady block costs under the settings, in frames that heads see and in counted operations."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from dummy.equal_cost import mean_frames
from dummy.policies.registry import policy_from_config
from dummy.policy import ContextPolicy, HeadSplit
from dummy.roles import HeadRoles, Role
from pipeline.config.config import InferenceConfig
from wan.attention.head_group import UNBOUNDED, HeadLayout, Retention
from wan.config import ModelConfig
from wan.geometry import LatentGeometry
from wan.transformer.operations import clean_pass_operations, forward_operations


def possible_roles(sizes: ModelConfig, split: HeadSplit) -> list[HeadRoles]:
    """The given roles, or what is assumed before any are observed: with as many dummy heads as are asked for, or, where
    their number is found by the run, with the fewest and with the most that it can find."""
    if split.roles is not None:
        return [split.roles]
    return [_evenly(sizes, count) for count in split.budget.possible(sizes.num_layers, sizes.num_heads)]


def _evenly(sizes: ModelConfig, count: int) -> HeadRoles:
    """`count` dummy heads spread over the model, the others half sink, half neighbour."""
    total = sizes.num_layers * sizes.num_heads
    others = (i for i in range(total))
    dummy = {i * total // count for i in range(count)}
    codes = [Role.DUMMY if i in dummy else (Role.SINK, Role.NEIGHBOR)[next(others) % 2] for i in range(total)]
    rows = [codes[i : i + sizes.num_heads] for i in range(0, total, sizes.num_heads)]
    return HeadRoles.from_codes(rows)


def assumed_roles(sizes: ModelConfig, split: HeadSplit, past: int = UNBOUNDED) -> HeadRoles:
    """Of the possible roles those that keep the most of `past` earlier frames."""
    return max(possible_roles(sizes, split), key=lambda roles: split_frames(split, roles, past))


def assumed_layout(sizes: ModelConfig, policy: ContextPolicy, past: int = UNBOUNDED) -> HeadLayout | None:
    """What heads keep, or may keep at most once they have parted; None for a policy under which all keep the same."""
    layout = policy.fixed_layout()
    if layout is not None:
        return layout
    if policy.split is not None:
        return policy.split.layout(assumed_roles(sizes, policy.split, past))
    return None if policy.online is None else policy.online.assumed(sizes.num_layers, sizes.num_heads).layout()


def split_frames(split: HeadSplit, roles: HeadRoles, past: int) -> float:
    """Of `past` earlier frames those that a head sees once the roles hold, as a mean over all heads."""
    by_role = split.retentions(roles)
    there = {role: Retention(0, min(retention.total, past)) for role, retention in by_role.items()}
    return mean_frames(there, roles.counts())


def kept_frames(policy: ContextPolicy, sizes: ModelConfig, past: int) -> list[float]:
    """Of `past` earlier frames those that a head sees in a steady block, as a mean over all heads; the least and the
    most where the run finds out."""
    if policy.table is not None:
        return [policy.table.mean_frames(past)]
    if policy.online is not None:
        return [min(policy.online.frames, past)]
    if policy.split is None:
        return [min(policy.initial.total, past)]
    found = {split_frames(policy.split, roles, past) for roles in possible_roles(sizes, policy.split)}
    return sorted(found)


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
    operations = [block_operations(sizes, geometry, frames, steps) for frames in kept]
    teraflops = [f"{one / 1e12:.3g}" for one in operations]
    line = (
        f"Cost: {_range(f'{f:.2f}' for f in kept)} earlier frames a head on average, {_range(teraflops)} TFLOP a block"
    )
    if policy.observed is None and policy.table is None:
        return [line]
    off = replace(config.dummy_forcing, enabled=False)
    (dense,) = kept_frames(policy_from_config(config.model_kwargs, off, geometry.frames_per_block), sizes, past)
    whole = block_operations(sizes, geometry, dense, steps)
    share = _range(f"{100 * one / whole:.0f}" for one in operations)
    return [
        f"{line}, {share} % of that without Dummy Forcing ({dense:.2f} frames)",
        *_remarks(config, policy),
    ]


def _range(texts: Iterable[str]) -> str:
    return " to ".join(dict.fromkeys(texts))


def _remarks(config: InferenceConfig, policy: ContextPolicy) -> list[str]:
    """What is assumed where the run has yet to find it out."""
    split, forcing = policy.split, config.dummy_forcing
    if split is None:
        return _predictions(config, policy)
    remarks = []
    if split.roles is None:
        remarks.append("  (sink and neighbor heads: an even split is assumed; the run finds it out)")
    if split.roles is None and forcing.num_dummy == "auto":
        remarks.append(
            f"  (dummy heads: as many as lose at most {100 * forcing.max_loss:g} % of all heads' attention in block "
            f"{split.ar_start}; the run finds it out. The cost is that of no and of all heads dummy, the memory the "
            "more of both)"
        )
    if isinstance(forcing.equal_cost, float):
        remarks.append(
            f"  (neighbor heads: as many frames as {forcing.equal_cost:g} pixel frames/s allow, measured by the run; "
            "cost and memory here are without them)"
        )
    return remarks


def _predictions(config: InferenceConfig, policy: ContextPolicy) -> list[str]:
    """What a calibration says of the heads' retentions, and how far it is to be trusted."""
    remarks = []
    if policy.allocation is not None and policy.dial is not None and policy.table is not None:
        one, measured = policy.allocation, policy.dial.calibration
        spread = "" if len(measured.videos) == 1 else f" +- {100 * one.spread:.2g}"
        remarks.append(
            f"Predicted: heads' outputs lose {100 * one.error:.3g}{spread} % of their size, by a calibration "
            f"of {len(measured.videos)} videos of {measured.subject.num_frames} latent frames; {one.frames:.3f} frames "
            f"a head in the last block, at most {policy.table.lengths()} attention calls a layer"
        )
    if policy.online is not None:
        remarks.append(
            f"  (which head keeps how much: by the errors in block {policy.online.ar_start}; the run finds it out)"
        )
    if config.dummy_forcing.speed is not None:
        remarks.append(
            f"  (as many frames as {config.dummy_forcing.speed:g} pixel frames/s allow, measured by the run; cost and "
            "memory here are those of the fewest)"
        )
    return remarks
