"""One page of HTML with every picture of an atlas and the figures behind them; no script, no server, no network."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from statistics import fmean

import torch

from dummy.atlas.plots import HIGH, draw_all
from dummy.atlas.stability import PAPER, consensus, has_role_pass, lost_attention, roles_of_videos, stability
from dummy.atlas.table import Atlas
from dummy.roles import HeadRoles, Role
from utils.files import write_atomic
from utils.plots import svg

_STYLE = """
body { font: 15px/1.5 sans-serif; color: #222; max-width: 1000px; margin: 2em auto; padding: 0 1em; }
svg { max-width: 100%; height: auto; }
table { border-collapse: collapse; margin: 1em 0; }
td, th { border: 1px solid #ccc; padding: 0.2em 0.6em; text-align: left; }
figure { margin: 2em 0; }
pre { background: #f4f4f4; padding: 0.6em; overflow-x: auto; }
"""

CAPTIONS = {
    "shares": "How the attention of every head divides between the first frame (sink), the other earlier frames "
    "(neighbor) and the block at work (current), as a mean over all blocks, passes and videos recorded.",
    "current": "Heads in the order of what they keep for the block at work. Heads on the left lose little if they "
    "cannot see the past. Bars go from the video in which a head keeps least to that in which it keeps most.",
    "examples": "The heads that are most typical of each role. Grey: not there to be seen.",
    "stability": "How much of the dummy set is the same between blocks, denoising steps, prompts and seeds of "
    "one prompt.",
}


def write_report(atlas: Atlas, path: Path) -> list[Path]:
    """The file that was written, alone. Raises InputError if it cannot be."""
    write_atomic(path, page(atlas))
    return [path]


def page(atlas: Atlas) -> str:
    figures = "\n".join(
        f'<figure id="{name}">{svg(figure, name)}<figcaption>{escape(CAPTIONS[name])}</figcaption></figure>'
        for name, figure in draw_all(atlas).items()
    )
    model = escape(str(atlas.about.get("model", "a model")))
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>Head atlas of {model}</title>'
        f'<link rel="icon" href="data:,"><style>{_STYLE}</style></head><body>\n<h1>Head atlas of {model}</h1>\n'
        f"{_table(('', ''), facts(atlas))}\n{figures}\n"
        f"<h2>Heads above {100 * HIGH:.0f} % on the block, by block and pass</h2>\n{_above(atlas)}\n"
        f"<h2>Prompts</h2>\n<pre>{escape(chr(10).join(atlas.by_prompt()))}</pre>\n"
        f"<h2>Command</h2>\n<pre>{escape(str(atlas.about.get('command', '')))}</pre>\n</body></html>\n"
    )


def facts(atlas: Atlas) -> list[tuple[str, str]]:
    """What a reader wants to know first, as (name, value)."""
    layers, heads = atlas.shape
    shares = atlas.mean_regions()[..., 2]
    chance = float(torch.stack([atlas.dummy_sets(block).double().mean() for block in atlas.blocks]).mean())
    prompts = len(atlas.by_prompt())
    rows = [
        ("heads", f"{layers} layers x {heads} heads = {layers * heads}"),
        ("recorded", f"{len(atlas.videos)} videos of {prompts} prompt{'s'[: prompts > 1]}"),
        ("", f"blocks {_list(atlas.blocks)}, passes {_list(atlas.passes)}"),
        ("queries", f"{100 * float(atlas.about.get('query_share', 1)):g} % of each pass"),
        ("attention on the block", f"{float(shares.min()):.2f} to {float(shares.max()):.2f}"),
        (f"heads above {100 * HIGH:.0f} %", f"{int((shares > HIGH).sum())} of {layers * heads}"),
        *_roles(atlas),
    ]
    for name, result in stability(atlas).items():
        if result.mean is not None:
            paper = f"paper: {PAPER[name]}, " if name in PAPER else ""
            rows.append((f"overlap between {name}", f"{result.mean:.2f} ({paper}chance: {chance:.2f})"))
    return rows


def _roles(atlas: Atlas) -> list[tuple[str, str]]:
    """Those that `--roles` writes and what they cost; where their pass was not recorded, what the last block gives."""
    block, last = atlas.forcing.ar_start, atlas.blocks[-1]
    if not has_role_pass(atlas):
        found, _ = atlas.split.find_roles(atlas.attention[last].flatten(0, 1).mean(0))
        return [(f"roles, block {last}", f"{_counts(found)} (the mean of its passes; not those of a run)")]
    dummy = [roles.counts()[Role.DUMMY] for roles in roles_of_videos(atlas)]
    lost = lost_attention(atlas)
    return [
        (f"roles, clean pass of block {block}", _counts(consensus(atlas).roles)),
        ("dummy heads, single videos", f"{min(dummy)} to {max(dummy)}, {fmean(dummy):.1f} on average"),
        ("attention lost to them", f"{_list(f'{share:.3f}' for share in lost.values())} in blocks {_list(lost)}"),
    ]


def _counts(roles: HeadRoles) -> str:
    return _list(f"{count} {role.name.lower()}" for role, count in roles.counts().items())


def _list(names: Iterable[object]) -> str:
    return ", ".join(str(name) for name in names)


def _above(atlas: Atlas) -> str:
    rows = []
    for block in atlas.blocks:
        share = (atlas.regions(block)[..., 2] > HIGH).double().mean((0, 2, 3))
        rows.append((str(block), *(f"{100 * float(value):.0f} %" for value in share)))
    return _table(("block", *atlas.passes), rows)


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows]
    head = f"<tr>{''.join(f'<th>{escape(cell)}</th>' for cell in header)}</tr>" if any(header) else ""
    return f"<table>{head}{''.join(lines)}</table>"
