"""The transformer's training forward: all blocks of a clip at once, every one as the product will see it.

Teacher forcing (Self Forcing, arXiv 2506.08009, section 3): a clip's clean tokens stand beside noisy copies of its
blocks. A noisy block attends to the clean frames before it that the context policy keeps and to itself, a clean block
likewise, which is what the cached loop of `pipeline.runtime.generator` computes one by one. The frames before a prompt
switch are encoded in one pass in which they all see each other, as in the product. There are no masks: every block is
a product of its own, which on a CPU is the cheaper way. The submodules and their weights are those of
`wan.transformer.model`.

Letters as elsewhere, and N latent frames in all: the clean ones, then the noisy ones copy by copy.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan.attention.head_group import FULL_HISTORY, Retention
from wan.attention.rope import RotaryEmbedding, Rotation, rotate
from wan.transformer.layers import TransformerBlock
from wan.transformer.model import CausalWanModel

GRAPHS = 32  # of a part of a layer, at most: with gradients and without, in each precision, for few tokens and for many
GAP = 32  # latent frames, more than any window has: how far blocks are from the prefix if there is a gap


@dataclass(frozen=True)
class Past:
    """What a block sees of the clean frames: the first `sinks`, turned to another place, and those of `rest`."""

    sinks: int
    rest: tuple[int, int]


@dataclass(frozen=True)
class Plan:
    """Who sees whom: `prefix` clean frames that are encoded together (0 at the beginning of a video), then `blocks`
    of `n` frames; the first `quiet` ones are context alone and have no noisy copies.

    `window`: latent frames, the first frame and the block included, as `local_attn_size` with `sink_size: 1` and
    `rope: relative`; None: full history. `gap`: between the prefix and the blocks time has passed; of the prefix no
    block sees more than the first frame.
    """

    blocks: int
    prefix: int = 0
    quiet: int = 0
    window: int | None = None
    gap: bool = False
    n: int = 3

    @property
    def clean(self) -> int:
        """Clean frames: nobody looks at the last block's."""
        return self.prefix + self.n * (self.blocks - 1)

    @property
    def noisy(self) -> int:
        """Frames of a noisy copy."""
        return self.n * (self.blocks - self.quiet)

    @property
    def retention(self) -> Retention:
        return FULL_HISTORY if self.window is None else Retention(1, self.window - 1 - self.n)

    def position(self, block: int) -> int:
        """Of a block's first frame."""
        return self.prefix + self.n * block + (GAP if self.gap else 0)

    @cached_property
    def pasts(self) -> tuple[Past, ...]:
        """What each block sees; relative positions turn the sinks."""
        found = []
        for block in range(self.blocks):
            stop = self.prefix + self.n * block
            first = self.prefix if self.gap else 0
            kept = self.retention.keep([*range(min(1, first)), *range(first, stop)])
            if self.shifts[block] or len(kept) < stop:
                found.append(Past(1, (stop - len(kept) + 1, stop)))
            else:
                found.append(Past(0, (0, stop)))
        return tuple(found)

    @cached_property
    def shifts(self) -> tuple[int, ...]:
        """Positions by which each block sees the first frame moved."""
        if self.window is None:
            return (0,) * self.blocks
        return tuple(max(0, self.position(block) + self.n - self.window) for block in range(self.blocks))

    def rows(self, block: int, copies: int) -> tuple[int, ...]:
        """Where the frames of a block begin among all N: the clean ones (but of the last block), then the noisy."""
        clean = (self.prefix + self.n * block,) if block < self.blocks - 1 else ()
        if block < self.quiet:
            return clean
        first = self.clean + self.n * (block - self.quiet)
        return (*clean, *(first + copy * self.noisy for copy in range(copies)))


def init_(model: CausalWanModel, seed: int) -> CausalWanModel:
    """Random weights to train from: matrices of variance 1 / fan-in, an output head of zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0 if ".norm" in name and name.endswith("weight") else 0.0)
            elif name.startswith("head.head"):
                parameter.zero_()
            else:
                fan_in = parameter.shape[-1] if "modulation" in name else parameter[0].numel()
                parameter.normal_(0.0, fan_in**-0.5, generator=generator)
    return model


class TrainingForward(nn.Module):
    """Flows of noisy blocks, with gradients."""

    def __init__(self, model: CausalWanModel, compile_layers: bool = False) -> None:
        super().__init__()
        self.model = model
        if compile_layers:
            torch._dynamo.config.recompile_limit = GRAPHS
        parts = (before_attention, after_attention)
        self._before, self._after = (torch.compile(part, dynamic=True) for part in parts) if compile_layers else parts
        self._rotary = RotaryEmbedding(model.config.head_dim)

    def forward(self, clean: Tensor, noisy: Tensor, timesteps: Tensor, embeds: Tensor, plan: Plan) -> Tensor:
        """The flows of `noisy`.

        clean [B, plan.clean or more, C, h, w]; noisy [B, copies, K, n, C, h, w], the blocks that are not quiet;
        timesteps [B, copies, K] in 0..1000; embeds [B, text_len, text_dim], zero past the prompt.
        """
        model = self.model
        batch, copies = noisy.shape[:2]
        frames = torch.cat((clean[:, : plan.clean], noisy.flatten(1, 3)), dim=1)  # [B, N, C, h, w]
        later = timesteps.flatten(1).repeat_interleave(plan.n, dim=1)
        times = torch.cat((later.new_zeros(batch, plan.clean), later), dim=1)  # [B, N]
        x = self._patchify(frames)
        embedding = time_embedding(model, times)
        modulation = model.time_projection(embedding).unflatten(-1, (6, -1))  # [B, N, 6, dim]
        text = model.text_embedding(embeds)
        rotation = self._rotation(plan, copies, (frames.shape[-2] // 2, frames.shape[-1] // 2))
        turns = [self._rotary.frame_shift(shift, model.device) for shift in plan.shifts]
        turns = Rotation(torch.stack([turn.cos for turn in turns]), torch.stack([turn.sin for turn in turns]))
        for block in model.layers():
            q, k, v = self._before(block, x, modulation, rotation.cos, rotation.sin)
            seen = block_attention(q, k, v, turns, plan, copies)
            x = self._after(block, x, seen, modulation, text)
        x, embedding = x[:, plan.clean :], embedding[:, plan.clean :]
        head = model.head.modulation[0] + embedding[:, :, None]  # [B, frames, 2, dim]
        shift, scale = head[:, :, :1], 1 + head[:, :, 1:]
        flow = model.head.head(shift + model.head.norm(x) * scale).float()
        return self._unpatchify(flow, noisy)

    def _rotation(self, plan: Plan, copies: int, grid: tuple[int, int]) -> Rotation:
        """Tables [N, T, 1, D/2]: noisy copies stand where their clean blocks do."""
        places = [*range(plan.prefix)]
        blocks = [plan.position(block) + frame for block in range(plan.blocks) for frame in range(plan.n)]
        places += blocks[: -plan.n] + blocks[plan.n * plan.quiet :] * copies
        table = self._rotary.table(0, max(blocks) + 1, grid, self.model.device)
        cos, sin = (part.view(max(blocks) + 1, -1, *part.shape[1:])[places] for part in (table.cos, table.sin))
        return Rotation(cos, sin)

    def _patchify(self, frames: Tensor) -> Tensor:
        """[B, N, C, h, w] to tokens [B, N, T, dim]."""
        batch, count, channels, height, width = frames.shape
        patches = frames.view(batch, count, channels, height // 2, 2, width // 2, 2)
        patches = patches.permute(0, 1, 3, 5, 2, 4, 6).flatten(4).flatten(2, 3)
        embedding = self.model.patch_embedding
        return F.linear(patches, embedding.weight.flatten(1), embedding.bias)

    def _unpatchify(self, flow: Tensor, like: Tensor) -> Tensor:
        """[B, frames, T, 4 C] to the sizes of `like`."""
        channels, height, width = like.shape[4], like.shape[5] // 2, like.shape[6] // 2
        flow = flow.view(*flow.shape[:2], height, width, 2, 2, channels)
        return flow.permute(0, 1, 6, 2, 4, 3, 5).flatten(5).flatten(3, 4).reshape(like.shape)


def time_embedding(model: CausalWanModel, timesteps: Tensor) -> Tensor:
    """[...] to [..., dim], as CausalWanModel.encode_time does for one timestep."""
    half = model.config.freq_dim // 2
    ladder = 10000.0 ** -(torch.arange(half, dtype=torch.float64, device=timesteps.device) / half)
    angles = timesteps.double()[..., None] * ladder
    embedding: Tensor = model.time_embedding(torch.cat((angles.cos(), angles.sin()), dim=-1).float())
    return embedding


def before_attention(
    block: TransformerBlock, x: Tensor, modulation: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What comes before a layer's self-attention, over x [B, N, T, dim]: rotated queries and keys, and values, all
    [B, H, N * T, D]. The layers do the same sums as TransformerBlock.forward, for all frames at once."""
    shift, scale, *_ = (block.modulation + modulation).unsqueeze(3).unbind(2)  # six of [B, N, 1, dim]
    attention, width = block.self_attn, block.self_attn.head_dim
    hidden = shift + block.norm1(x) * (1 + scale)
    q = attention.norm_q(attention.q(hidden)).unflatten(-1, (-1, width)).flatten(1, 2)  # [B, N * T, H, D]
    k = attention.norm_k(attention.k(hidden)).unflatten(-1, (-1, width)).flatten(1, 2)
    v = attention.v(hidden).unflatten(-1, (-1, width)).flatten(1, 2).transpose(1, 2)
    table = Rotation(cos.flatten(0, 1), sin.flatten(0, 1))
    q, k = (rotate(part, table).transpose(1, 2) for part in (q, k))
    return q.type_as(v), k.type_as(v), v


def after_attention(block: TransformerBlock, x: Tensor, seen: Tensor, modulation: Tensor, text: Tensor) -> Tensor:
    """The rest of a layer, with what self-attention has `seen` [B, H, N * T, D]."""
    *_, gate, ffn_shift, ffn_scale, ffn_gate = (block.modulation + modulation).unsqueeze(3).unbind(2)
    x = x + gate * block.self_attn.o(seen.transpose(1, 2).flatten(2)).view_as(x)
    cross, width = block.cross_attn, block.cross_attn.head_dim
    keys, values = cross.keys_and_values(text)
    q = cross.norm_q(cross.q(block.norm3(x))).unflatten(-1, (-1, width)).flatten(1, 2)
    read = _attend(*(part.type_as(values).transpose(1, 2) for part in (q, keys, values)))
    x = x + cross.o(read.transpose(1, 2).flatten(2)).view_as(x)
    x = x + ffn_gate * block.ffn(ffn_shift + block.norm2(x) * (1 + ffn_scale))
    return x


def block_attention(q: Tensor, k: Tensor, v: Tensor, turns: Rotation, plan: Plan, copies: int) -> Tensor:
    """Self-attention of all frames, everything [B, H, N * T, D]."""
    tokens = q.shape[2] // (plan.clean + copies * plan.noisy)
    done: dict[int, Tensor] = {}
    if plan.prefix:
        together = slice(0, plan.prefix * tokens)
        done[0] = _attend(q[:, :, together], k[:, :, together], v[:, :, together])
    for block, past in enumerate(plan.pasts):
        rows = plan.rows(block, copies)
        own = [slice(row * tokens, (row + plan.n) * tokens) for row in rows]
        own_q, own_k, own_v = (torch.stack([part[:, :, row] for row in own], dim=2) for part in (q, k, v))
        rest = slice(past.rest[0] * tokens, past.rest[1] * tokens)
        past_k, past_v = k[:, :, rest], v[:, :, rest]
        if past.sinks:
            sinks = slice(0, past.sinks * tokens)
            turned = rotate(k[:, :, sinks], Rotation(turns.cos[block], turns.sin[block]))
            past_k, past_v = torch.cat((turned, past_k), dim=2), torch.cat((v[:, :, sinks], past_v), dim=2)
        seen = _attend_both(own_q, past_k, past_v, own_k, own_v)  # [B, H, number of rows, L, D]
        done.update(zip(rows, seen.unbind(2), strict=True))
    return torch.cat([done[row] for row in sorted(done)], dim=2)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def _attend_both(q: Tensor, past_k: Tensor, past_v: Tensor, own_k: Tensor, own_v: Tensor) -> Tensor:
    """q, own_k, own_v [B, H, N, L, D]; past_k, past_v [B, H, S, D], which all N share."""
    past_k, past_v = (part[:, :, None].expand(-1, -1, q.shape[2], -1, -1) for part in (past_k, past_v))
    parts = q, torch.cat((past_k, own_k), dim=3), torch.cat((past_v, own_v), dim=3)
    # The CPU's flash kernel takes four dimensions.
    seen = _attend(*(part.transpose(1, 2).flatten(0, 1) for part in parts))
    return seen.unflatten(0, (q.shape[0], -1)).transpose(1, 2)
