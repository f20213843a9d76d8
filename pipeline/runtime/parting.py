"""When the heads of a video part, and by what: which of its passes are observed, and what follows for the cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from dummy.observed import Observed
from dummy.policy import ContextPolicy
from wan.attention.cache import KVCache
from wan.attention.head_group import HeadLayout, Observer, Retention


def parting_block(observed: Observed, given: int) -> int:
    """The block after which heads part, in a video whose first `given` blocks are not denoised."""
    return observed.ar_start if observed.in_clean_pass else max(observed.ar_start, given)


def beginning(policy: ContextPolicy, frames_per_block: int, given: int) -> tuple[Retention, int | None]:
    """What all heads keep until they part, and the latent frames that there are by then, None if they do not part."""
    if policy.observed is None:
        return policy.initial, None
    frames = parting_block(policy.observed, given) * frames_per_block
    return policy.beginning(frames), frames


class Parting:
    """Of one video, or of the first `videos` of a batch.

    `roles` are what the heads are by now, if they have roles and these are known; `frame_attention` what those that
    were observed follow from; `pending` whether heads have yet to part, for which the cache will be laid out anew.
    """

    def __init__(
        self,
        policy: ContextPolicy,
        tokens_per_frame: int,
        videos: int,
        given: int,
        grams: Callable[[], Sequence[Tensor]],
    ) -> None:
        """`given`: blocks that the video begins with, which are not denoised. `grams`: those of this process's heads,
        as dummy.calibration.recorder.HeadErrors takes them."""
        self._policy = policy
        self._observed = policy.observed
        self._sizes = tokens_per_frame, videos
        self._grams = grams
        self._seen: Observer | None = None
        self._block: int | None = None  # after which heads part
        self.roles = None if policy.split is None else policy.split.roles
        self.frame_attention: Tensor | None = None
        self.pending = self._observed is not None and policy.fixed_layout() is None
        if self._observed is not None and self.pending:
            self._block = parting_block(self._observed, given)

    def again(self, block: int) -> bool:
        """Let a block that begins now be observed, whatever has been; False where heads do not part in the video, or
        where errors would be seen too early: roles show in any block, what a longer memory is worth does not."""
        observed = self._observed
        if observed is None or (not observed.in_clean_pass and block < observed.ar_start):
            return False
        self._block, self._seen, self.roles, self.pending = block, None, None, True
        return True

    def is_due(self, block: int) -> bool:
        """Whether heads part after this block."""
        return self.pending and block == self._block

    @contextmanager
    def watching(self, cache: KVCache, block: int, clean: bool) -> Iterator[None]:
        """Within the context, passes over a block are observed if they are those that are to be."""
        observed = self._observed
        wanted = observed is not None and clean == observed.in_clean_pass and self.roles is None
        if observed is None or not wanted or not self.is_due(block):
            yield
            return
        if self._seen is None:
            self._seen = observed.observer(*self._sizes, self._grams)
        with cache.observed(self._seen):
            yield

    def layout(self, all_heads: Callable[[Tensor], Tensor]) -> HeadLayout:
        """What heads keep from now on, by roles that are given or by what was seen; `all_heads` as in
        `KVCache.all_heads`."""
        self.pending = False
        if self.roles is not None:
            assert self._policy.split is not None
            return self._policy.split.layout(self.roles)
        assert self._observed is not None and self._seen is not None
        outcome = self._observed.outcome(self._seen, all_heads)
        self._seen, self.roles, self.frame_attention = None, outcome.roles, outcome.frame_attention
        return outcome.layout
