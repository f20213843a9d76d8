"""What policies with head roles have in common."""

from __future__ import annotations

from collections.abc import Mapping

from dummy.policy import HeadSplit, PolicyRequest
from dummy.roles import Role
from wan.attention.head_group import Retention

USES_ROLES = frozenset(("roles", "reclassify_on_switch"))


def split_from(request: PolicyRequest, by_role: Mapping[Role, Retention]) -> HeadSplit:
    """Heads part by role: roles that are given hold from the first block on, others from the block after `ar_start`."""
    settings = request.settings
    return HeadSplit(
        by_role,
        settings.ar_start,
        settings.budget,
        settings.sink_score_frames,
        settings.score_query_share,
        request.roles,
        from_start=request.roles is not None,
    )
