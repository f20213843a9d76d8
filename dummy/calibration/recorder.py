"""What heads' outputs lose if they keep less: an observer of passes over full history (see wan.attention.cache).

For a query, frame f of the context (and of the block itself) holds p[f], the sum of its softmax weights, and u[f], the
sum of weight x value; a head that keeps the frames K puts out (sum over K of u) / (sum over K of p). So all candidates
follow from p and u by frame, which cost one pass over the keys. Here a frame's logarithm of p (but for the common
denominator) and its own mean u / p are held, which cannot overflow or vanish. Queries are a fixed, evenly spread
choice. They and the frames are taken in pieces, so that memory is bounded at any size, and in few: a GPU has each done
before the host can ask for the next.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dummy.frame_attention import SampledQueries, evenly_spread, products
from dummy.passes import PassCount
from utils.transfer import to_device
from wan.attention.head_group import Retention

QUERIES = 256  # of a pass that are looked at, unless more or fewer are asked for
PIECE_BYTES = 256 << 20  # half of it for keys and values at work, half for queries and what is computed of them
FLOAT = 4  # bytes; everything here is float32 whatever the model computes in


@dataclass(frozen=True)
class Pieces:
    """How many frames and queries are at work at once, and what that takes in bytes."""

    frames: int
    queries: int
    bytes: int

    @classmethod
    def of(cls, heads: int, width: int, frames: int, tokens: int, candidates: int, most: int = PIECE_BYTES) -> Pieces:
        """For queries that see `frames` frames of so many tokens; of either at least one, and no more than fits into
        half of `most` bytes."""
        a_frame = 2 * FLOAT * heads * width * tokens  # keys and values
        at_once = min(frames, max(1, most // 2 // a_frame))
        # Of all frames the means and weights, and beside them scores twice or the candidates' outputs three times.
        held = frames * (width + 1)
        at_work = max(2 * at_once * tokens, candidates * (3 * width + 2 * frames))
        a_query = FLOAT * heads * (2 * held + at_work)
        queries = max(1, most // 2 // a_query)
        return cls(at_once, queries, at_once * a_frame + queries * a_query)


class HeadErrors:
    """Errors of all candidates for every head, summed over the passes that it is shown, of a video or a batch.

    `grams[layer]` [H, D, D]: the products of a head's rows of the output projection, W_o W_o^T, so that the squared
    norm of what a difference d makes in the layer's output is d G d^T. Of a batch the first `videos` count.
    """

    def __init__(
        self,
        tokens_per_frame: int,
        candidates: Sequence[Retention],
        grams: Sequence[Tensor],
        queries: int,
        piece_bytes: int = PIECE_BYTES,
        videos: int | None = None,
    ) -> None:
        self._tokens = tokens_per_frame
        self._videos = videos
        self._candidates = candidates
        self._grams = grams
        self._piece_bytes = piece_bytes
        self.past = 0  # earlier frames that the last pass has seen
        self._passes = 0
        self._errors: dict[int, Tensor] = {}
        self._outputs: dict[int, Tensor] = {}
        self._sampled = SampledQueries(lambda count: evenly_spread(count, min(queries, count)))
        self._masks: tuple[tuple[list[int], int], Tensor] | None = None  # of frames (context, own), on their device

    def __call__(self, layer: int, q: Tensor, keys: Tensor, context: Sequence[int], values: Tensor) -> None:
        """q [B, L, H, D]; keys and values [B, S, H, D]: the pass's own frames, then those numbered in `context`."""
        self._passes += layer == 0
        self.past = len(context)
        q = self._sampled.of(q[: self._videos])
        batch, queries, heads, width = q.shape
        frames = keys.shape[1] // self._tokens
        masks = self._kept(list(context), frames - len(context), q.device)
        pieces = Pieces.of(heads, width, frames, self._tokens, len(self._candidates), self._piece_bytes)
        for item in range(batch):
            k, v = (torch.unflatten(part[item], 0, (frames, self._tokens)) for part in (keys, values))
            for part in torch.split(q[item], pieces.queries):
                sums, means = frame_sums(part.transpose(0, 1), k, v, pieces.frames)
                errors, outputs = candidate_errors(sums, means, masks, self._grams[layer])
                self._add(self._errors, layer, errors.sum(1) / (batch * queries))
                self._add(self._outputs, layer, outputs.sum(1) / (batch * queries))

    def _kept(self, context: list[int], own: int, device: torch.device) -> Tensor:
        if self._masks is None or self._masks[0] != (context, own):
            masks = kept_frames(self._candidates, context, own)
            self._masks = (context, own), to_device(masks, device)
        return self._masks[1]

    @staticmethod
    def _add(to: dict[int, Tensor], layer: int, what: Tensor) -> None:
        to[layer] = to[layer] + what if layer in to else what

    def errors(self) -> Tensor:
        """[layers, H, C], the mean over queries, batch and passes."""
        return torch.stack([self._errors[layer] for layer in sorted(self._errors)]) / self._passes

    def outputs(self) -> Tensor:
        """[layers, H]: the mean square of the heads' outputs after the projection."""
        return torch.stack([self._outputs[layer] for layer in sorted(self._outputs)]) / self._passes


def kept_frames(candidates: Sequence[Retention], context: Sequence[int], own: int) -> Tensor:
    """[C, own + context frames] of bool: which frames, in the order of the keys, a candidate sees."""
    kept = [set(one.keep(sorted(context))) for one in candidates]
    return torch.tensor([[True] * own + [frame in frames for frame in context] for frames in kept])


def frame_sums(q: Tensor, keys: Tensor, values: Tensor, at_once: int) -> tuple[Tensor, Tensor]:
    """q [H, Q, D], keys and values [F, T, H, D] to the logarithm of every frame's sum of exponentials [H, Q, F] and to
    the mean of its values by its own softmax [H, Q, F, D]; float32. So many frames at once."""
    sums, means = [], []
    for k, v in zip(torch.split(keys, at_once), torch.split(values, at_once), strict=True):
        heads = len(k), len(q)
        scores = products(q.repeat(len(k), 1, 1), k.transpose(1, 2).flatten(0, 1)).mul_(q.shape[-1] ** -0.5)
        total = scores.logsumexp(-1)
        mean = scores.sub_(total[..., None]).exp_() @ v.transpose(1, 2).flatten(0, 1).float()
        sums.append(torch.unflatten(total, 0, heads))
        means.append(torch.unflatten(mean, 0, heads))
    return torch.cat(sums).permute(1, 2, 0), torch.cat(means).permute(1, 2, 0, 3)


def candidate_errors(sums: Tensor, means: Tensor, masks: Tensor, gram: Tensor) -> tuple[Tensor, Tensor]:
    """From `frame_sums` and masks [C, F] to the squared errors [H, Q, C] of every candidate's output after the
    projection, and to the squared output [H, Q] that nothing is missing from."""
    whole = sums.softmax(-1)
    weights = sums[:, :, None].masked_fill(~masks, -torch.inf).softmax(-1)  # [H, Q, C, F]
    lost = (weights - whole[:, :, None]) @ means  # [H, Q, C, D]
    output = (whole[:, :, None] @ means)[:, :, 0]
    return torch.unflatten(_squares(lost.flatten(1, 2), gram), 1, lost.shape[1:3]), _squares(output, gram)


def _squares(x: Tensor, gram: Tensor) -> Tensor:
    """x [H, N, D] to x G x^T [H, N], which rounding may not take below 0."""
    return ((x @ gram) * x).sum(-1).clamp_min(0)


class CalibrationRecorder:
    """One `HeadErrors` a block of the video at hand, over the `wanted` passes (block, place in the block), which a
    new `count` tells apart."""

    def __init__(
        self,
        wanted: Collection[tuple[int, int]],
        count: Callable[[], PassCount],
        tokens_per_frame: int,
        candidates: Sequence[Retention],
        grams: Sequence[Tensor],
        queries: int,
    ) -> None:
        self._wanted = wanted
        self._new_count = count
        self._made_with = (tokens_per_frame, candidates, grams, queries)
        self.begin()

    def begin(self) -> None:
        """Forget; the next pass is the first of a new video."""
        self._count = self._new_count()
        self._blocks: dict[int, HeadErrors] = {}

    def __call__(self, layer: int, q: Tensor, keys: Tensor, context: Sequence[int], values: Tensor) -> None:
        self._count.see(layer)
        if self._count.key not in self._wanted:
            return
        block, _ = self._count.key
        if block not in self._blocks:
            self._blocks[block] = HeadErrors(*self._made_with)
        self._blocks[block](layer, q, keys, context, values)

    def finish(self) -> tuple[Tensor, Tensor]:
        """What the video gave: errors [B, layers, H, C] and outputs [B, layers, H], on the host."""
        blocks = [self._blocks[block] for block in sorted(self._blocks)]
        return torch.stack([b.errors() for b in blocks]).cpu(), torch.stack([b.outputs() for b in blocks]).cpu()
