"""The transformer's training forward: all blocks of a clip at once, every one as the product will see it.

Teacher forcing (Self Forcing, arXiv 2506.08009, section 3): a clip's clean tokens stand beside noisy copies of its
blocks. A noisy block attends to the clean blocks before it and to itself, a clean block to the clean blocks before it
and to itself, which is what the cached loop of `pipeline.generator` computes one by one. After a prompt switch the
clean blocks before it see each other, as in the product's re-encoding pass. There are no masks: every block is a
product of its own, which on a CPU is the cheaper way. The submodules and their weights are `wan.transformer.model`'s.

Letters as elsewhere, and K blocks, R rows: the clean blocks of a clip but the last, which nobody looks at, then its
noisy blocks copy by copy.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan.attention.rope import RotaryEmbedding, Rotation, rotate
from wan.transformer.layers import TransformerBlock
from wan.transformer.model import CausalWanModel

GRAPHS = 64  # of a layer: sizes of batches, switches, with gradients and without


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
        self._run_layer = torch.compile(run_layer, dynamic=False) if compile_layers else run_layer
        self._rotary = RotaryEmbedding(model.config.head_dim)

    def forward(self, clean: Tensor, noisy: Tensor, timesteps: Tensor, embeds: Tensor, switch: int = 0) -> Tensor:
        """The flows of `noisy`.

        clean [B, K, n, C, h, w]; noisy [B, copies, K - switch, n, C, h, w], the blocks from `switch` on; timesteps
        [B, copies, K - switch] in 0..1000; embeds [B, text_len, text_dim], zero past the prompt.
        """
        model = self.model
        batch, blocks, frames = clean.shape[:3]
        copies = noisy.shape[1]
        rows = torch.cat((clean[:, :-1], noisy.flatten(1, 2)), dim=1)  # [B, R, n, C, h, w]
        times = torch.cat((clean.new_zeros(batch, blocks - 1), timesteps.flatten(1)), dim=1)  # [B, R]
        x = self._patchify(rows)
        embedding = time_embedding(model, times)
        modulation = model.time_projection(embedding).unflatten(-1, (6, -1))  # [B, R, 6, dim]
        text = model.text_embedding(embeds)
        rotation = self._rotation(blocks, switch, copies, frames, (clean.shape[-2] // 2, clean.shape[-1] // 2))
        for block in model.layers():
            x = self._run_layer(block, x, modulation, text, rotation.cos, rotation.sin, blocks, copies, switch)
        x, embedding = x[:, blocks - 1 :], embedding[:, blocks - 1 :]
        head = model.head.modulation[0] + embedding[:, :, None]  # [B, R, 2, dim]
        shift, scale = head[:, :, :1], 1 + head[:, :, 1:]
        flow = model.head.head(shift + model.head.norm(x) * scale).float()
        return self._unpatchify(flow, noisy)

    def _rotation(self, blocks: int, switch: int, copies: int, frames: int, grid: tuple[int, int]) -> Rotation:
        """Tables [R, L, 1, D/2]: noisy copies stand where their clean blocks do."""
        table = self._rotary.table(0, blocks * frames, grid, self.model.device)
        order = [*range(blocks - 1), *(list(range(switch, blocks)) * copies)]
        cos, sin = (part.view(blocks, -1, *part.shape[1:])[order] for part in (table.cos, table.sin))
        return Rotation(cos, sin)

    def _patchify(self, rows: Tensor) -> Tensor:
        """[B, R, n, C, h, w] to tokens [B, R, L, dim]."""
        batch, count, frames, channels, height, width = rows.shape
        patches = rows.view(batch, count, frames, channels, height // 2, 2, width // 2, 2)
        patches = patches.permute(0, 1, 2, 4, 6, 3, 5, 7).flatten(5).flatten(2, 4)
        embedding = self.model.patch_embedding
        return F.linear(patches, embedding.weight.flatten(1), embedding.bias)

    def _unpatchify(self, flow: Tensor, like: Tensor) -> Tensor:
        frames, height, width = like.shape[3], like.shape[5] // 2, like.shape[6] // 2
        flow = flow.view(flow.shape[0], flow.shape[1], frames, height, width, 2, 2, like.shape[4])
        return flow.permute(0, 1, 2, 7, 3, 5, 4, 6).flatten(6).flatten(4, 5).view_as(like)


def time_embedding(model: CausalWanModel, timesteps: Tensor) -> Tensor:
    """[...] to [..., dim], as CausalWanModel.encode_time does for one timestep."""
    half = model.config.freq_dim // 2
    ladder = 10000.0 ** -(torch.arange(half, dtype=torch.float64) / half)
    angles = timesteps.double()[..., None] * ladder
    embedding: Tensor = model.time_embedding(torch.cat((angles.cos(), angles.sin()), dim=-1).float())
    return embedding


def run_layer(
    block: TransformerBlock,
    x: Tensor,
    modulation: Tensor,
    text: Tensor,
    cos: Tensor,
    sin: Tensor,
    blocks: int,
    copies: int,
    switch: int,
) -> Tensor:
    """One layer over x [B, R, L, dim]; the same sums as TransformerBlock.forward, for all rows at once."""
    parts = (block.modulation + modulation).unsqueeze(3).unbind(2)  # six of [B, R, 1, dim]
    shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = parts
    attention, width = block.self_attn, block.self_attn.head_dim
    hidden = shift + block.norm1(x) * (1 + scale)
    q = attention.norm_q(attention.q(hidden)).unflatten(-1, (-1, width))
    k = attention.norm_k(attention.k(hidden)).unflatten(-1, (-1, width))
    # [B, R, H, L, D]
    q, k = (rotate(part.flatten(0, 1), Rotation(_for_batch(cos, part), _for_batch(sin, part))) for part in (q, k))
    q, k = (part.view(*x.shape[:2], *part.shape[1:]).transpose(2, 3) for part in (q, k))
    v = attention.v(hidden).unflatten(-1, (-1, width)).transpose(2, 3)
    out = block_attention(q, k.type_as(v), v, blocks, copies, switch)
    x = x + gate * attention.o(out.transpose(2, 3).flatten(3))
    cross = block.cross_attn
    keys, values = cross.keys_and_values(text)
    q = cross.norm_q(cross.q(block.norm3(x))).unflatten(-1, (-1, width)).flatten(1, 2)
    seen = F.scaled_dot_product_attention(
        q.type_as(values).transpose(1, 2), keys.type_as(values).transpose(1, 2), values.transpose(1, 2)
    )
    x = x + cross.o(seen.transpose(1, 2).flatten(2)).view_as(x)
    x = x + ffn_gate * block.ffn(ffn_shift + block.norm2(x) * (1 + ffn_scale))
    return x


def _for_batch(table: Tensor, x: Tensor) -> Tensor:
    """[R, L, 1, D/2] repeated for the batch: [B * R, L, 1, D/2]."""
    return table.repeat(x.shape[0], 1, 1, 1)


def block_attention(q: Tensor, k: Tensor, v: Tensor, blocks: int, copies: int, switch: int) -> Tensor:
    """Self-attention of rows, all [B, R, H, L, D]."""
    q = (q * q.shape[-1] ** -0.5).type_as(v)
    later = blocks - switch
    past_k, past_v = (part[:, : blocks - 1].transpose(1, 2) for part in (k, v))  # [B, H, K - 1, L, D]
    out: list[list[Tensor]] = [[] for _ in range(copies + 1)]
    if switch:
        together = past_k[:, :, :switch].flatten(2, 3), past_v[:, :, :switch].flatten(2, 3)
        seen = _attend(q[:, :switch].transpose(1, 2).flatten(2, 3), *together)
        out[0].append(torch.unflatten(seen, 2, (switch, -1)).transpose(1, 2))
    for index in range(switch, blocks):
        rows = [blocks - 1 + copy * later + index - switch for copy in range(copies)]
        rows = [index, *rows] if index < blocks - 1 else rows
        own_q, own_k, own_v = (torch.stack([part[:, row] for row in rows], dim=2) for part in (q, k, v))
        seen = _attend_both(
            own_q, past_k[:, :, :index].flatten(2, 3), past_v[:, :, :index].flatten(2, 3), own_k, own_v
        )  # [B, H, number of rows, L, D]
        for part, row in zip(out[-len(rows) :], seen.unbind(2), strict=True):
            part.append(row.unsqueeze(1))
    return torch.cat([row for part in out for row in part], dim=1)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-1, -2)).softmax(-1) @ v


def _attend_both(q: Tensor, past_k: Tensor, past_v: Tensor, own_k: Tensor, own_v: Tensor) -> Tensor:
    """q, own_k, own_v [B, H, N, L, D]; past_k, past_v [B, H, S, D], which all N share."""
    number, length = q.shape[2:4]
    own = q @ own_k.transpose(-1, -2)  # [B, H, N, L, L]
    past = torch.unflatten(q.flatten(2, 3) @ past_k.transpose(-1, -2), 2, (number, length))
    weights = torch.cat((past, own), dim=-1).softmax(-1)
    past_weights, own_weights = weights[..., : -own_k.shape[3]], weights[..., -own_k.shape[3] :]
    past_sum = (past_weights.flatten(2, 3) @ past_v).view_as(q)
    return own_weights @ own_v + past_sum
