"""The head atlas: recorded from whole runs, stored, drawn, looked at in a browser, turned into roles."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dummy.atlas.plots import draw_all, frame_map, typical_heads
from dummy.atlas.report import page
from dummy.atlas.stability import consensus, overlap, stability
from dummy.atlas.table import Atlas
from dummy.config import DummyForcingConfig
from dummy.roles import HeadRoles, Role
from pipeline import atlas as command
from pipeline.atlas import load_stored
from tests.conftest import Program
from utils.errors import InputError

FRAMES = "num_output_frames=15"


def run(program: Program, *arguments: str) -> int:
    return command.main([*program.arguments(FRAMES), *arguments])


@pytest.fixture
def stored(program: Program) -> Path:
    """An atlas of three videos, blocks 1 to 3 with all of their passes, all queries."""
    path = program.folder / "atlas.safetensors"
    assert run(program, "--query_share", "1", "--out", str(path)) == 0
    return path


def made_up(videos: int = 3) -> Atlas:
    """Two layers of three heads; head (0, 0) looks at the first frame, (0, 1) at the last, (1, 2) at the block."""
    generator = torch.Generator().manual_seed(0)
    attention = {}
    for block in (1, 2):
        mass = torch.rand(videos, 3, 2, 3, 3 * block + 1, generator=generator) * 0.01
        mass[..., -1] += 0.02
        mass[:, :, 0, 0, 0] += 2.0
        mass[:, :, 0, 1, -2] += 2.0
        mass[:, :, 1, 2, -1] += 9.0
        attention[block] = mass / mass.sum(-1, keepdim=True)
    entropy = {block: torch.ones(videos, 3, 2, 3) for block in attention}
    frames = {block: tuple(range(3 * block)) for block in attention}
    forcing = DummyForcingConfig(num_dummy=2)
    return Atlas(attention, entropy, frames, ("0", "1", "clean"), tuple("abcdef"[:videos]), forcing, 3, {"model": "m"})


def test_a_recorded_atlas_holds_every_pass(stored: Path) -> None:
    atlas = load_stored(stored, [])
    assert atlas.blocks == [1, 2, 3] and atlas.passes == ("0", "1", "2", "3", "clean") and atlas.shape == (3, 4)
    assert len(atlas.videos) == 3 and atlas.about["config"]["num_output_frames"] == 15
    for block in atlas.blocks:
        assert atlas.frames[block] == tuple(range(3 * block))
        assert atlas.attention[block].shape == (3, 5, 3, 4, 3 * block + 1)
        torch.testing.assert_close(atlas.attention[block].sum(-1), torch.ones(3, 5, 3, 4), atol=1e-5, rtol=0)
        keys = torch.tensor(6.0 * (3 * block + 3))
        assert (atlas.entropy[block] > 0).all() and (atlas.entropy[block] <= keys.log() + 1e-5).all()
    # Other videos, other passes: nothing is a copy of something else.
    assert len({float(value) for value in atlas.attention[2][..., 0, 0, 0].flatten()}) == 15


def test_the_recorded_roles_are_those_of_a_run(program: Program) -> None:
    path = program.folder / "atlas.safetensors"
    arguments = ["--context", "initial", "--blocks", "1", "--steps", "clean", "--out", str(path)]
    assert run(program, *arguments) == 0
    atlas = load_stored(path, [])
    assert program(FRAMES) == 0
    for video, metadata in enumerate(sorted(program.videos.glob("*.json"))):
        found = json.loads(metadata.read_text())["head_roles"]
        assert atlas.roles(1, video, 0).to_json() == found


def test_a_stored_atlas_comes_back(tmp_path: Path) -> None:
    atlas = replace(made_up(), about={})
    path = tmp_path / "a.safetensors"
    atlas.save(path)
    again = Atlas.load(path, atlas.forcing, 3)
    assert (again.passes, again.videos, again.frames) == (atlas.passes, atlas.videos, atlas.frames)
    for block in atlas.blocks:
        assert torch.equal(again.attention[block], atlas.attention[block])
        assert torch.equal(again.entropy[block], atlas.entropy[block])
    other = tmp_path / "b.safetensors"
    other.write_bytes(b"nothing")
    with pytest.raises(InputError, match="cannot be read as an atlas"):
        load_stored(other, [])


def test_a_stored_atlas_takes_another_budget_and_no_other_setting(stored: Path) -> None:
    assert load_stored(stored, []).roles(1, 0, 4).counts()[Role.DUMMY] == 6
    assert load_stored(stored, ["dummy_forcing.num_dummy=0.25"]).roles(1, 0, 4).counts()[Role.DUMMY] == 3
    with pytest.raises(InputError, match="only dummy_forcing settings"):
        load_stored(stored, ["seed=3"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--blocks", "0"], "--blocks: '0' is none of 1 to 3; the first block sees nothing earlier, the last has no"),
        (["--blocks", "4"], "--blocks: '4' is none of 1 to 3"),
        (["--steps", "4"], "--steps: '4' is none of 0, 1, 2, 3, clean"),
        (["--query_share", "0"], "--query_share: must be above 0"),
        (["num_output_frames=6", "dummy_forcing=off"], "leave no block to record"),
        (["--roles", "roles.json", "--blocks", "2"], "record it with --blocks 1 --steps clean"),
    ],
)
def test_what_cannot_be_recorded_is_refused(
    program: Program,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(program.folder)
    assert run(program, *arguments) == 2
    assert message in capsys.readouterr().err


def test_the_last_block_has_steps_but_no_clean_pass(program: Program) -> None:
    path = program.folder / "atlas.safetensors"
    assert run(program, "--blocks", "4", "--steps", "0,3", "--out", str(path)) == 0
    atlas = load_stored(path, [])
    assert atlas.frames[4] == (0, 1, 2, 6, 7, 8, 9, 10, 11)  # the dense setting: a window of 12 with 3 sinks
    assert atlas.attention[4].shape == (3, 2, 3, 4, 10)


def test_overlap_is_that_of_sets() -> None:
    one, other = torch.tensor([1, 1, 0, 0]).bool(), torch.tensor([1, 0, 1, 0]).bool()
    assert float(overlap(one, one)) == 1.0 and float(overlap(one, other)) == 0.5
    assert float(overlap(one, torch.tensor([1, 1, 1, 1]).bool())) == pytest.approx(2 / 3)
    assert float(overlap(torch.zeros(3).bool(), torch.zeros(3).bool())) == 1.0


def test_stability_by_axis() -> None:
    atlas = made_up()
    for block in atlas.blocks:  # in video 2 the heads of the second layer change places
        atlas.attention[block][2] = atlas.attention[block][2].flip(1)
    found = stability(atlas)
    assert list(found) == ["blocks", "steps", "prompts"]
    sets = {block: atlas.dummy_sets(block).flatten(2) for block in (1, 2)}
    pairs = [overlap(sets[1][v, p], sets[2][v, p]) for v in range(3) for p in range(3)]
    assert found["blocks"].mean == pytest.approx(float(torch.stack(pairs).mean()))
    prompts = [overlap(sets[b][0, p], sets[b][2, p]) for b in (1, 2) for p in range(3)]
    assert float(found["prompts"].matrix[0, 2]) == pytest.approx(float(torch.stack(prompts).mean()))
    assert found["steps"].names == ("0", "1")


def test_consensus_and_confidence() -> None:
    atlas = made_up()
    result = consensus(atlas)
    assert result.roles.counts()[Role.DUMMY] == 2 and result.roles.table[1][2] is Role.DUMMY
    assert result.roles.table[0][:2] == (Role.SINK, Role.NEIGHBOR)
    single = [atlas.roles(1, video, 2) for video in range(3)]
    agreeing = sum(one.table[0][2] == result.roles.table[0][2] for one in single) / 3
    assert float(result.confidence[0, 2]) == pytest.approx(agreeing)


def test_a_roles_file_of_an_atlas_is_used_from_the_first_block_on(program: Program, stored: Path) -> None:
    roles = program.folder / "roles.json"
    assert command.main(["--atlas", str(stored), "--roles", str(roles)]) == 0
    content = json.loads(roles.read_text())
    assert content["videos"] == 3 and 0 < content["agreement"] <= 1 and len(content["confidence"]) == 3
    assert program(f"dummy_forcing.roles={roles}", FRAMES) == 0
    for metadata in program.videos.glob("*.json"):
        made = json.loads(metadata.read_text())
        assert HeadRoles.from_codes(made["head_roles"]["roles"]) == HeadRoles.from_codes(content["roles"])


def test_pictures_say_what_the_numbers_say() -> None:
    atlas = made_up()
    figures = draw_all(atlas)
    assert set(figures) == {"shares", "current", "examples", "stability"}
    for figure in figures.values():
        ET.fromstring(figure.svg())
    assert "1 of 6 heads (17 %)" in figures["current"].svg()
    assert typical_heads(atlas)[Role.SINK][0] == (0, 0) and typical_heads(atlas)[Role.NEIGHBOR][0] == (0, 1)
    assert typical_heads(atlas)[Role.DUMMY][0] == (1, 2)
    rows = frame_map(atlas, 0, 0)
    assert rows.shape == (2, 9) and rows[0].isnan().tolist() == [False] * 6 + [True] * 3
    assert rows[1].nansum() == pytest.approx(1.0) and rows[1].argmax() == 0


def test_every_picture_is_written_twice(program: Program, stored: Path) -> None:
    from PIL import Image

    folder = program.folder / "plots"
    assert command.main(["--atlas", str(stored), "--plot", str(folder)]) == 0
    for name, figure in draw_all(load_stored(stored, [])).items():
        ET.parse(folder / f"{name}.svg")
        with Image.open(folder / f"{name}.png") as image:
            assert image.size == (2 * figure.width, 2 * figure.height)
            assert len(image.convert("RGB").getcolors(1 << 24)) > 10


def browser() -> str | None:
    names = ("chromium", "chromium-browser", "google-chrome", "chrome", "chromium-headless-shell")
    return next((path for name in names if (path := shutil.which(name))), None)


def test_the_page_stands_alone(tmp_path: Path) -> None:
    html = page(made_up())
    assert not re.search(r"<script|(src|href)=\"(?!data:,\")|url\(|@import", html)
    assert html.count("<svg") == 4 and "Head atlas of m" in html


@pytest.mark.skipif(browser() is None, reason="no Chromium here; Debian's package chromium will do")
def test_the_page_in_a_browser(tmp_path: Path) -> None:
    from PIL import Image

    path, shot = tmp_path / "report.html", tmp_path / "shot.png"
    path.write_text(page(made_up()), encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr"]
    place = [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1000,1800", f"--screenshot={shot}"]
    done = subprocess.run(
        [str(browser()), *options, *place, path.as_uri()], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "CONSOLE" not in done.stderr, done.stderr  # where a page's errors go
    with Image.open(shot) as image:
        colours = {colour: count for count, colour in image.convert("RGB").getcolors(1 << 24)}
    assert len(colours) > 50
    assert sum(count for colour, count in colours.items() if min(colour) < 245) > 20_000  # ink, not an empty page


def test_the_error_of_sampled_queries(program: Program, capsys: pytest.CaptureFixture[str]) -> None:
    path = program.folder / "sampling.json"
    assert run(program, "--sampling", str(path)) == 0
    assert "| 18 | 100 % | 0.00000 | 0.0000 | 1.000 (1.000) | 0.0 of 12 |" in capsys.readouterr().out
    content = json.loads(path.read_text())
    rows = content["rows"]
    assert [row["share"] for row in rows] == [1.0, 0.5, 0.25, 0.1, 0.05, 0.02, 0.01]
    assert [row["queries"] for row in rows] == [18, 9, 4, 2, 1, 1, 1]
    assert rows[0]["mean_error"] == 0 and all(row["mean_error"] > 0 for row in rows[1:])
    assert rows[1]["mean_error"] < rows[4]["mean_error"]
    assert all(0 <= row["least_overlap"] <= row["dummy_overlap"] <= 1 for row in rows)
