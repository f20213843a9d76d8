"""Compare the program with stored inputs and outputs of reference implementations.

    python -m tests.conformance CASE.safetensors ... [--out OUT.safetensors] [--device cpu] [--precision fp32|bf16]
                                [--engine eager|compiled|graphed|recorded] [--attention auto|sdpa|cudnn|fa2|fa3|varlen]

With torchrun the processes compute a case together, each its share of the heads.

A case is a safetensors file whose metadata key `case` describes it; weights lie beside it. It is computed with the
product's own classes: the loaders, the policy made from the settings, and the one generator. What was computed is
written under the names of the expectations; with expectations in the case the largest difference for each is printed
and the exit status is 1 if one is above its tolerance.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dummy.config import DummyForcingConfig, RetentionConfig
from dummy.policies.calibrated import policy_of_table
from dummy.policies.registry import policy_from_config
from dummy.policy import ContextPolicy
from dummy.retentions import RetentionTable
from dummy.roles import HeadRoles
from pipeline.runtime.engine import WAYS, passes_of
from pipeline.runtime.generator import BlockGenerator
from pipeline.runtime.inputs import GeneratorSettings, Passes
from pipeline.runtime.outputs import FlowRecord
from pipeline.runtime.schedule import DenoisingSchedule
from pipeline.runtime.together import joined
from pipeline.runtime.windows import Round, one_by_one, rolling
from pipeline.session import Session
from utils import command
from utils.distributed import World
from utils.errors import InputError
from wan.attention.backends import AttentionName
from wan.attention.exchange import HeadExchange
from wan.attention.head_group import Retention
from wan.checkpoints.filling import load_into
from wan.checkpoints.lora import merge_lora
from wan.checkpoints.reading import read_tensors
from wan.checkpoints.state import generator_state
from wan.config import ModelConfig, ModelKwargs
from wan.geometry import LatentGeometry
from wan.text import embed, load_encoder
from wan.transformer.model import CausalWanModel
from wan.vae.vae import VAE

TOLERANCE = 2e-4
BF16_TOLERANCE = 0.03  # of the norm; a GPU's kernels have up to 0.021
TOLERANCES = {"video": 1e-3, "head_roles": 0.0}
FLOWS = 5  # forwards whose flow the cases record

Case = Mapping[str, object]
Tensors = Mapping[str, Tensor]


class ReplayedNoise:
    """The case's noise in the order in which the loop draws: a block's own, then one per re-noising step."""

    def __init__(self, noise: Tensor, renoise: Tensor, frames_per_block: int, settings: GeneratorSettings) -> None:
        blocks, fresh, steps = noise.split(frames_per_block, dim=1), iter(renoise), len(settings.schedule)
        if settings.rolling is not None:
            rounds = rolling(len(blocks), steps)
        else:
            first = settings.first_schedule or settings.schedule
            rounds = one_by_one(len(blocks), 0, len(first), steps)
        self._draws = iter([draw for one in rounds for draw in _draws_of(one, blocks, fresh)])

    def normal(self, shape: Sequence[int]) -> Tensor:
        draw = next(self._draws)
        assert tuple(draw.shape[1:]) == tuple(shape)
        return draw


def _draws_of(one: Round, blocks: Sequence[Tensor], fresh: Iterator[Tensor]) -> Iterator[Tensor]:
    """The noise that the passes of a round ask for: a block's own as it enters, then one for each that goes on."""
    for window in one.windows:
        if window.entering is not None:
            yield blocks[window.entering]
        finished = window is one.windows[-1]  # and so its first block draws no more
        yield from (next(fresh) for _ in window.steps[finished:])


def read_case(path: Path) -> tuple[Case, dict[str, Tensor]]:
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["case"]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@dataclass(frozen=True)
class Machine:
    """Where and how a case is computed."""

    device: torch.device
    dtype: torch.dtype
    engine: str = "eager"
    attention: AttentionName = "auto"
    rank: int = 0
    ranks: int = 1  # processes that compute the case together

    def passes(self, model: CausalWanModel) -> Passes:
        if self.ranks > 1:
            model.exchange = HeadExchange(self.rank, self.ranks)
        return passes_of(model, self.engine)


def load_model(case: Case, folder: Path, machine: Machine) -> CausalWanModel:
    path = folder / str(case["weights"])
    state = generator_state(read_tensors(path), use_ema=False, source=path)
    if "lora" in case:
        lora = folder / str(case["lora"])
        rank, alpha = case.get("lora_rank"), case.get("lora_alpha")
        merge_lora(state, read_tensors(lora), rank, alpha, lora)
    with torch.device("meta"):
        model = CausalWanModel(ModelConfig.from_mapping(case["model"]))
    load_into(model, state, path, machine.dtype, machine.device)
    model.use_attention(machine.attention)
    return model


def context_policy(case: Case) -> tuple[ContextPolicy, int | None]:
    """The policy of the case, and W, the frames that a prompt switch re-encodes at most."""
    block = int(case["frames_per_block"])
    given = dict(case["policy"])
    kind = given.pop("kind")
    if kind not in ("full", "window", "prune", "packed", "calibrated"):
        raise InputError(f"the case's policy.kind is {kind!r}; it is full, window, prune, packed or calibrated")
    size = given.pop("local_attn_size", -1)
    window = ModelKwargs(
        local_attn_size=size,
        sink_size=given.pop("sink_size", 0),
        ema_sink_alpha=given.pop("ema_sink_alpha", None),
        rolling_sink=given.pop("rolling_sink", False),
    )
    recache = case.get("recache", size)
    frames = None if recache in (-1, None) else int(recache)
    if kind in ("full", "window"):
        return policy_from_config(window, DummyForcingConfig(enabled=False), block), frames
    if kind == "calibrated":
        return policy_of_table(retention_table(given["table"], ModelConfig.from_mapping(case["model"]))), frames
    if "retention" in given:
        given["retention"] = RetentionConfig(**{role: tuple(kept) for role, kept in given["retention"].items()})
    given.setdefault("num_dummy", 0)
    settings = DummyForcingConfig(policy=kind, score_query_share=1.0, **given)
    policy = policy_from_config(window, settings, block)
    if "head_roles" not in case or policy.split is None:
        return policy, frames
    roles = HeadRoles.from_codes(case["head_roles"])
    # Given roles hold from the first block on; in cases of kind prune after block ar_start, as observed ones do.
    split = replace(policy.split, roles=roles, from_start=kind == "packed")
    return replace(policy, split=split), frames


def retention_table(numbers: Sequence[Sequence[Sequence[int]]], sizes: ModelConfig) -> RetentionTable:
    """From [layers][heads][sink, recent]. Raises InputError for a table of another shape."""
    try:
        table = RetentionTable.of([[Retention(sink, recent) for sink, recent in row] for row in numbers])
        kept = [number for one in table.counts() for number in (one.sink, one.recent)]
        fits = all(type(number) is int and number >= 0 for number in kept)
    except (TypeError, ValueError):
        table, fits = RetentionTable(()), False
    if not fits or [len(row) for row in table.rows] != [sizes.num_heads] * sizes.num_layers:
        raise InputError(
            "the case's policy.table is no list of [sink, recent], whole numbers from 0 on, for each of "
            f"{sizes.num_layers} layers x {sizes.num_heads} heads"
        )
    return table


def make_generator(case: Case, model: CausalWanModel, machine: Machine) -> BlockGenerator:
    schedule, block = case["schedule"], int(case["frames_per_block"])
    policy, window = context_policy(case)
    first = schedule.get("denoising_step_list_first_chunk")
    most = case["rolling"]["max_attention"] if case.get("rolling") else None
    settings = GeneratorSettings(
        DenoisingSchedule.build(schedule["denoising_step_list"], schedule["shift"], schedule["warp"]),
        policy if most is None else policy.at_most(block, most - block),
        context_noise=float(case.get("context_noise", 0)),
        window=window,
        relative_rope=case.get("rope") == "relative",
        global_sink=bool(case.get("global_sink", False)),
        reclassify_on_switch=bool(case.get("reclassify_on_switch", False)),
        teacache_threshold=case.get("teacache"),
        first_schedule=None if first is None else DenoisingSchedule.build(first, schedule["shift"], schedule["warp"]),
        rope_window=case.get("rope_window"),
        kv_flush=bool(case.get("kv_flush", False)),
        cut_from=int(case.get("scene_cut_from", 45)),
        rolling=most,
    )
    return BlockGenerator(model, settings, machine.passes(model))


def start_session(case: Case, tensors: Tensors, generator: BlockGenerator) -> Session:
    """A session with the case's noise, whose prompts are called `i.b`: embedding i of video b."""
    geometry = LatentGeometry(case["height"], case["width"], case["num_frames"], case["frames_per_block"])
    noise = ReplayedNoise(tensors["noise"], tensors["renoise"], geometry.frames_per_block, generator.settings)
    batch = int(case["batch"])

    def embed(name: str) -> Tensor:
        number, video = name.split(".")
        return tensors[f"prompt_embeds.{number}"][int(video)]

    session = Session(generator, geometry, noise, embed, batch=batch, live=False)
    starts = enumerate([0, *case.get("switch", ())])
    cuts = [frame for frame, cut in zip(case.get("switch", ()), case.get("scene_cut", ()), strict=False) if cut]
    session.plan([(start, tuple(f"{i}.{video}" for video in range(batch))) for i, start in starts], cuts)
    return session


def compute_rollout(case: Case, tensors: Tensors, folder: Path, machine: Machine) -> dict[str, Tensor]:
    generator = make_generator(case, load_model(case, folder, machine), machine)
    session = start_session(case, tensors, generator)
    rollout = session.rollout
    rollout.record = FlowRecord(FLOWS)
    latents = [block.latents for block in session]
    result = {"latents": torch.cat(latents, dim=1)}
    result |= {f"flow.{i}": flow for i, flow in enumerate(rollout.record.flows)}
    if rollout.frame_attention is not None and rollout.roles is not None:
        result["frame_attention"] = rollout.frame_attention
        result["head_roles"] = torch.tensor(rollout.roles.codes())
    return result


def compute_text(path: Path, tensors: Tensors, machine: Machine) -> dict[str, Tensor]:
    weights = {name.removeprefix("weights."): t for name, t in tensors.items() if name.startswith("weights.")}
    encoder = load_encoder(weights, machine.dtype, machine.device, path)
    return {"prompt_embeds": embed(encoder, tensors["input_ids"], tensors["attention_mask"])}


def compute_vae(tensors: Tensors, machine: Machine) -> dict[str, Tensor]:
    weights = {name.removeprefix("weights."): t for name, t in tensors.items() if name.startswith("weights.")}
    vae = VAE.from_state(weights, None, machine.dtype, machine.device)
    result = {}
    if "latents" in tensors:
        result["video"] = vae.decoder().decode(tensors["latents"])
    if "pixels" in tensors:
        result["encoded"] = vae.encode(tensors["pixels"].transpose(1, 2))
    return result


def compute(path: Path, machine: Machine) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What the case computes, and what it expects, both by name."""
    case, tensors = read_case(path)
    if case["kind"] == "text_encoder":
        result = compute_text(path, tensors, machine)
    elif case["kind"] == "vae":
        result = compute_vae(tensors, machine)
    elif case["kind"] == "rollout":
        result = compute_rollout(case, tensors, path.parent, machine)
    else:
        raise InputError(f"{path}: kind {case['kind']!r} is unknown; it is rollout, text_encoder or vae")
    expected = {name.removeprefix("expect."): t for name, t in tensors.items() if name.startswith("expect.")}
    return {name: tensor.cpu().contiguous() for name, tensor in result.items()}, expected


def differences(result: Tensors, expected: Tensors) -> dict[str, float]:
    """The largest absolute difference per expectation; infinite where nothing comparable was computed."""
    return {
        name: (result[name].double() - tensor.double()).abs().max().item()
        if name in result and result[name].shape == tensor.shape
        else float("inf")
        for name, tensor in expected.items()
    }


def relative_errors(result: Tensors, expected: Tensors) -> dict[str, float]:
    """The norm of the difference over that of the expectation."""
    return {
        name: ((result[name].double() - tensor.double()).norm() / tensor.double().norm()).item()
        if name in result and result[name].shape == tensor.shape
        else float("inf")
        for name, tensor in expected.items()
    }


def report(result: Tensors, expected: Tensors, precision: str) -> bool:
    """Print how far each result is from its expectation; whether all are near enough.

    In bf16, heads that are nearly of another role may get it: then the roles, and the latents, which follow from them,
    are printed and decide nothing.
    """
    errors = differences(result, expected) if precision == "fp32" else relative_errors(result, expected)
    others = precision == "bf16" and errors.get("head_roles", 0.0) > 0
    good = True
    for name, error in errors.items():
        limit = TOLERANCES.get(name, TOLERANCE) if precision == "fp32" else BF16_TOLERANCE
        near, follows = error <= limit, others and name in ("head_roles", "latents")
        good &= near or follows
        remark = "ok" if near else "other roles" if follows else f"above {limit:.0e}"
        print(f"{name:16} {error:.2e}  {remark}")
    return good


def exact(device: torch.device) -> None:
    """No shortened float32 products on a GPU."""
    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_tf32 = False


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.conformance", description=__doc__)
    parser.add_argument("cases", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, help="of the last case")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--engine", default="eager", choices=WAYS)
    parser.add_argument("--attention", default="auto", choices=get_args(AttentionName))
    arguments = parser.parse_args(argv)
    dtype = torch.float32 if arguments.precision == "fp32" else torch.bfloat16
    world = World.from_environment()
    device = torch.device(arguments.device)
    if device.type == "cuda" and world.size > 1:
        device = torch.device("cuda", world.local_rank)
    machine = Machine(device, dtype, arguments.engine, arguments.attention, world.rank, world.size)
    with joined(world, machine.device):
        return run(arguments, machine)


def run(arguments: argparse.Namespace, machine: Machine) -> int:
    """The exit status. Of processes that compute together the first says what comes out."""
    exact(machine.device)
    failed = []
    for path in arguments.cases:
        if len(arguments.cases) > 1 and not machine.rank:
            print(f"{path.stem}, {arguments.engine}, {arguments.precision}")
            torch._dynamo.reset()  # cases of many sizes would run into the limit of compilations
        result, expected = compute(path, machine)
        if machine.rank:
            continue
        if arguments.out is not None:
            save_file(result, arguments.out)
        if not report(result, expected, arguments.precision):
            failed.append(path.stem)
    if failed and len(arguments.cases) > 1:
        print(f"not met: {', '.join(failed)}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(command.run(main, log_format=None))
