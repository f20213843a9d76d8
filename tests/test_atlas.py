"""The head atlas: recorded from whole runs, stored, drawn, looked at in a browser, turned into roles."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from matplotlib.text import Text
from torch import Tensor

from dummy.atlas.plots import draw_all, frame_map, typical_heads
from dummy.atlas.recorder import PassRecorder
from dummy.atlas.report import facts, page
from dummy.atlas.stability import consensus, lost_attention, overlap, roles_of_videos, stability
from dummy.atlas.table import Atlas
from dummy.config import DummyForcingConfig
from dummy.frame_attention import FrameAttention
from dummy.roles import HeadRoles, Role
from pipeline.atlas import command
from pipeline.atlas import cost as atlas_cost
from pipeline.atlas.cost import scoring_bytes, video_bytes
from pipeline.atlas.recording import (
    Recording,
    choose_passes,
    jobs_of,
    watch,
    watched_generator,
    watched_policy,
)
from pipeline.atlas.stored import load_stored
from pipeline.config.config import geometry_of, load_config
from tests.conftest import Program
from utils.errors import InputError
from utils.files import disk_full
from utils.memory import PeakTracker

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
    atlas, _ = load_stored(stored, [])
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
    atlas, _ = load_stored(path, [])
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
    assert load_stored(stored, [])[0].roles(1, 0, 4).counts()[Role.DUMMY] == 6
    assert load_stored(stored, ["dummy_forcing.num_dummy=0.25"])[0].roles(1, 0, 4).counts()[Role.DUMMY] == 3
    assert load_stored(stored, ["dummy_forcing=on"])[0].forcing == load_stored(stored, [])[0].forcing


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["seed=3"], "only dummy_forcing settings can be changed"),
        (["dummy_forcing=off"], "override 'dummy_forcing=off': a stored atlas is looked at for the roles"),
        (["dummy_forcing.enabled=false"], "override 'dummy_forcing.enabled=false': a stored atlas is looked at"),
        (["dummy_forcing.roles=r.json"], "does not change the roles or what heads keep"),
        (["dummy_forcing.teacache_enabled=true"], "does not change the roles or what heads keep"),
        (["dummy_forcing.numdummy=3"], "does not change the roles or what heads keep"),
        (["dummy_forcing.num_dummy=13"], "num_dummy: 13 is more than the model has heads; use at most 3 layers x 4"),
        (["dummy_forcing.num_dummy=5", "dummy_forcing.num_dummy_within=layer"], "is more than a layer has heads"),
        (["--roles", "r.json", "dummy_forcing.ar_start=4", "dummy_forcing.num_dummy=0.5"], "ar_start: head roles"),
        (["--blocks", "1"], "--blocks: of a stored atlas it would be ignored"),
        (["--steps", "1"], "--steps: of a stored atlas it would be ignored"),
        (["--query_share", "1"], "--query_share: of a stored atlas"),
        (["--context", "dense"], "--context: of a stored atlas"),
        (["--prompts", "p.txt"], "--prompts: of a stored atlas"),
        (["A fox."], "the prompt 'A fox.' (no key=value): of a stored atlas"),
        (["--dry_run"], "--dry_run: of a stored atlas"),
        (["--sampling"], "--sampling: of a stored atlas"),
        (["--out", "b.safetensors"], "copy the file instead"),
    ],
)
def test_what_a_stored_atlas_would_ignore_is_refused(
    stored: Path,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(stored.parent)
    assert command.main(["--atlas", str(stored), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (stored.parent / "r.json").exists()


def test_an_atlas_without_dummy_forcing_takes_a_budget(program: Program, capsys: pytest.CaptureFixture[str]) -> None:
    path = program.folder / "a.safetensors"
    assert run(program, "A fox.", "dummy_forcing=off", "--out", str(path)) == 0
    assert load_stored(path, [])[0].roles(1, 0, 4).counts()[Role.DUMMY] == 6
    assert load_stored(path, ["dummy_forcing.num_dummy=2"])[0].roles(1, 0, 4).counts()[Role.DUMMY] == 2


def test_what_auto_would_find_is_said(stored: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*overrides: str) -> str:
        assert command.main(["--atlas", str(stored), *overrides]) == 0
        return capsys.readouterr().out

    auto = "dummy_forcing.num_dummy=auto"
    none, some, every = (said(auto, f"dummy_forcing.max_loss={bound}") for bound in ("0", "0.2", "1"))
    assert re.search(r"dummy heads, single videos +0 to 0, 0.0 on average", none)
    assert re.search(r"dummy heads, single videos +12 to 12, 12.0 on average", every)
    assert re.search(r"earlier frames a head +1.00 to 1.00 of 9, 1.00 on average", every)
    losses = re.search(r"attention lost to them +(\S+), .* in blocks 1, 2, 3", some)
    assert losses and 0.1 < float(losses[1]) <= 0.2
    atlas, _ = load_stored(stored, [auto, "dummy_forcing.max_loss=0.2"])
    kept = [roles.counts()[Role.NEIGHBOR] * 2 / 12 + 1 for roles in roles_of_videos(atlas)]
    assert f"{min(kept):.2f} to {max(kept):.2f} of 9" in some


def test_the_loss_of_later_blocks_is_that_of_the_dummy_heads_of_the_role_pass() -> None:
    atlas = made_up()
    dummy = atlas.dummy_sets(1)[:, 2]
    for block, loss in lost_attention(atlas).items():
        last = atlas.attention[block][:, 2, ..., :-2].sum(-1)  # all but the last frame and the block
        assert loss == pytest.approx(float((last * dummy).mean()))


def test_the_roles_that_are_told_are_those_that_are_written(program: Program, stored: Path) -> None:
    atlas, _ = load_stored(stored, [])
    told = dict(facts(atlas))["roles, clean pass of block 1"]
    counts = consensus(atlas).to_json({})["counts"]
    assert isinstance(counts, dict) and told == ", ".join(f"{number} {name}" for name, number in counts.items())
    path = program.folder / "late.safetensors"
    assert run(program, "--blocks", "2,3", "--steps", "0,clean", "--out", str(path)) == 0
    late, _ = load_stored(path, [])
    assert "not those of a run" in dict(facts(late))["roles, block 3"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--blocks", "0"], "--blocks: '0' is none of 1 to 3; the first block sees nothing earlier, the last has no"),
        (["--blocks", "4"], "--blocks: '4' is none of 1 to 3"),
        (["--steps", "4"], "--steps: '4' is none of 0, 1, 2, 3, clean"),
        (["--query_share", "0"], "--query_share: must be above 0"),
        (["num_output_frames=6", "dummy_forcing=off"], "leave no block to record"),
        (["--roles", "roles.json", "--blocks", "2"], "record it with --blocks 1 --steps clean"),
        (["--roles", "roles.json", "--steps", "3"], "record it with --blocks 1 --steps clean"),
        (["--out", "file/a.safetensors"], "--out: file is a file, not a folder"),
        (["--out", "folder"], "folder: is a folder, so no file can be written there"),
        (["--out", "x" * 300], "cannot be written (File name too long)"),
        (["--plot", "file"], "--plot: file is a file"),
        (["--report", "file/a.html"], "--report: file is a file"),
        (["--roles", "/proc/nowhere/a.json"], "--roles: the folder /proc/nowhere cannot be written"),
        (["--sampling", "file/a.json"], "--sampling: file is a file"),
        (["--out", "a", "--report", "folder/../a"], "--report: folder/../a is what --out is to write"),
        (["--sampling", "seed=1"], "--sampling: 'seed=1' is a setting"),
        (["--sampling", "a", "--out", "b"], "--out: --sampling makes a table alone"),
        (["--sampling", "--plot", "b"], "--plot: --sampling makes a table alone"),
        (["--sampling", "--query_share", "1"], "--query_share: --sampling makes a table alone"),
        (["--dry_run", "--roles", "b"], "--roles: --dry_run records nothing"),
        (["--prompts", "p.txt", "A fox."], "--prompts: p.txt and prompts on the command line"),
        (["A fox.", " "], "a prompt on the command line is blank"),
        (["start_from=image.png"], "start_from: image.png would be ignored"),
        (["dummy_forcing.roles=given.json", "dummy_forcing.num_dummy=13"], "num_dummy: 13 is more than the model has"),
    ],
)
def test_what_cannot_be_recorded_is_refused_before_that(
    program: Program,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(program.folder)
    program.file("file", "")
    program.file("given.json", json.dumps({"roles": [[0, 1, 2, 2]] * 3}))
    (program.folder / "folder").mkdir()
    assert run(program, *arguments) == 2
    said = capsys.readouterr().err
    assert message in said and "is recorded" not in said


def test_a_disk_that_is_full_by_then_costs_no_other_file(
    program: Program, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(atlas: Atlas, path: Path) -> list[Path]:
        raise disk_full(path)

    monkeypatch.setattr(command, "write_atlas", full)
    roles, out = program.folder / "roles.json", program.folder / "a.safetensors"
    assert run(program, "A fox.", "--out", str(out), "--roles", str(roles)) == 2
    said = capsys.readouterr()
    assert json.loads(roles.read_text())["videos"] == 1 and str(roles) in said.out and "heads above" in said.out
    assert f"{out}: no space left" in said.err


def test_prompts_on_the_command_line(program: Program) -> None:
    path = program.folder / "a.safetensors"
    given = ["A red fox = a fox.", "num_samples=2", "A cat.", "A dog.", "inference_iter=2"]
    assert run(program, "--blocks", "1", "--steps", "clean", "--out", str(path), *given) == 0
    atlas, _ = load_stored(path, [])
    assert atlas.by_prompt() == {"A red fox = a fox.": [0, 1], "A cat.": [2, 3]}
    assert not torch.equal(atlas.attention[1][0], atlas.attention[1][1])
    same = program.folder / "b.safetensors"
    prompts = program.file("p.txt", "A red fox = a fox.\n")
    assert run(program, "--prompts", str(prompts), "--blocks", "1", "--steps", "clean", "--out", str(same)) == 0
    assert torch.equal(load_stored(same, [])[0].attention[1][0], atlas.attention[1][0])


def test_a_dry_run_needs_no_file(program: Program, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(program, "--dry_run", f"model_root={program.folder / 'nowhere'}", "data_path=nothing.txt") == 2
    said = capsys.readouterr()
    assert "TFLOP of scores" in said.out and "Recording adds at most" in said.out and "nothing.txt" in said.err
    assert run(program, "--dry_run", "--blocks", "1", "A fox.", "num_samples=3") == 0
    assert "recording 5 passes at 4 of 18 queries" in (said := capsys.readouterr().out) and "Videos: 3" in said
    assert sorted(path.name for path in program.folder.iterdir()) == ["prompts.txt"]


class Weighed:
    """An observer whose tensors are counted, from the first video to the last."""

    def __init__(self, recorder: PassRecorder) -> None:
        self.recorder = recorder
        self.tracker = PeakTracker()

    def __call__(self, layer: int, q: Tensor, keys: Tensor, context: Sequence[int], values: Tensor) -> None:
        with self.tracker:
            self.recorder(layer, q, keys, context, values)


@pytest.mark.parametrize(
    ("share", "chunk", "precision"),
    [
        (1.0, 128 << 20, "fp32"),
        (1.0, 128 << 20, "bf16"),
        (0.25, 128 << 20, "bf16"),
        (1.0, 1 << 12, "fp32"),
        (1.0, 1, "bf16"),
    ],
)
def test_recording_allocates_at_most_what_is_said(
    program: Program, precision: str, share: float, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(atlas_cost, "PIECE_BYTES", chunk)
    defaults = FrameAttention.__init__.__defaults__
    assert defaults is not None
    monkeypatch.setattr(FrameAttention.__init__, "__defaults__", (defaults[0], chunk, *defaults[2:]))
    given = program.arguments("num_output_frames=21", "resolution=[64,96]", f"precision={precision}")
    config = load_config(given[1], given[2:])
    recording = Recording(config, choose_passes(config, None, None), share, "dense", ("A fox.",))
    jobs = jobs_of(config, recording.texts)
    generator, embeds = watched_generator(config, jobs, watched_policy(config, "dense"), torch.device("cpu"))
    sizes, chosen = generator.model.config, recording.passes
    geometry = geometry_of(config, sizes.in_dim)
    weighed = Weighed(PassRecorder(chosen.wanted, chosen.count, geometry.tokens_per_frame, share))
    watch(generator, geometry, jobs[0], embeds, weighed, chosen.blocks[-1])
    kept = weighed.recorder.seen.values()
    assert weighed.tracker.current == video_bytes(recording, sizes)
    said = scoring_bytes(recording, sizes, torch.device("cpu"))
    assert weighed.tracker.peak <= said < 1.1 * weighed.tracker.peak
    results = sum(one.by_frame().nbytes + one.entropy().nbytes for one in kept)
    assert results <= video_bytes(recording, sizes)


def test_the_last_block_has_steps_but_no_clean_pass(program: Program) -> None:
    path = program.folder / "atlas.safetensors"
    assert run(program, "--blocks", "4", "--steps", "0,3", "--out", str(path)) == 0
    atlas, _ = load_stored(path, [])
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


def test_prompts_are_compared_with_other_prompts_and_seeds_with_seeds() -> None:
    atlas = replace(made_up(4), videos=("a", "a", "b", "a"))
    found = stability(atlas)
    assert list(found) == ["blocks", "steps", "prompts", "seeds"]
    sets = torch.stack([atlas.dummy_sets(block).flatten(2) for block in (1, 2)])

    def between(one: int, other: int) -> float:
        return float(overlap(sets[:, one], sets[:, other]).mean())

    prompts = [between(video, 2) for video in (0, 1, 3)]
    assert found["prompts"].mean == pytest.approx(sum(prompts) / 3) and found["prompts"].names == ("1", "2")
    seeds = [between(0, 1), between(0, 3), between(1, 3)]
    assert found["seeds"].mean == pytest.approx(sum(seeds) / 3) and found["seeds"].names == ("1", "2", "3")
    assert "seeds" not in stability(made_up())
    html = page(atlas)
    assert "<pre>a\nb</pre>" in html and "4 videos of 2 prompts" in html and "overlap between seeds" in html


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
    means, maps = atlas.mean_regions(), meshes(figures["shares"])
    for number, mesh in enumerate(maps):
        np.testing.assert_allclose(mesh.get_array(), means[..., number])
    assert {"sink", "neighbor", "current", "layer", "head", f"{float(means[0, 0, 0]):.2f}"} <= words(figures["shares"])
    (axes,) = figures["current"].axes
    assert axes.get_title("left").startswith("1 of 6 heads (17 %)")
    heads = next(line for line in axes.lines if line.get_linestyle() == "None").get_ydata()
    assert heads[0] > 80 > heads[1] and (np.diff(heads) <= 0).all()
    bars = np.array([bar[:, 1] for bar in axes.collections[0].get_segments()])
    assert (bars[:, 0] < heads).all() and (heads < bars[:, 1]).all()  # videos differ
    for mesh, (name, found) in zip(meshes(figures["stability"]), stability(atlas).items(), strict=True):
        np.testing.assert_allclose(mesh.get_array(), found.matrix)
        assert any(word.startswith(f"{name}: mean {found.mean:.2f}") for word in words(figures["stability"]))


def test_typical_heads_are_drawn_with_what_they_see() -> None:
    atlas = made_up()
    assert typical_heads(atlas)[Role.SINK][0] == (0, 0) and typical_heads(atlas)[Role.NEIGHBOR][0] == (0, 1)
    assert typical_heads(atlas)[Role.DUMMY][0] == (1, 2)
    rows = frame_map(atlas, 0, 0)
    assert rows.shape == (2, 9) and rows[0].isnan().tolist() == [False] * 6 + [True] * 3
    assert rows[1].nansum() == pytest.approx(1.0) and rows[1].argmax() == 0
    drawn = meshes(draw_all(atlas)["examples"])[0]
    np.testing.assert_array_equal(drawn.get_array().mask, rows.isnan())
    np.testing.assert_allclose(drawn.get_array().compressed(), rows[~rows.isnan()])
    grey = drawn.cmap(np.ma.masked)
    assert grey not in [drawn.cmap(share) for share in (0.0, 0.1, 0.5, 1.0)]


def test_every_picture_is_written_twice(program: Program, stored: Path) -> None:
    from PIL import Image

    folder = program.folder / "plots"
    assert command.main(["--atlas", str(stored), "--plot", str(folder)]) == 0
    for name, figure in draw_all(load_stored(stored, [])[0]).items():
        root = ET.parse(folder / f"{name}.svg").getroot()
        with Image.open(folder / f"{name}.png") as image:
            inches = figure.get_size_inches()
            assert image.size == pytest.approx(200 * inches, abs=1)
            assert len(image.convert("RGB").getcolors(1 << 24)) > 10
        assert root.attrib["width"] == f"{72 * inches[0]:g}pt"


def test_a_long_atlas_has_names_for_some_blocks() -> None:
    short = made_up()
    blocks = range(1, 27)
    attention = {block: torch.full((1, 1, 2, 3, 3 * block + 1), 1 / (3 * block + 1)) for block in blocks}
    entropy = {block: torch.ones(1, 1, 2, 3) for block in blocks}
    frames = {block: tuple(range(3 * block)) for block in blocks}
    long = replace(short, attention=attention, entropy=entropy, frames=frames, passes=("clean",), videos=("a",))
    figure = draw_all(long)["examples"]
    figure.draw_without_rendering()
    for axis in (figure.axes[0].xaxis, figure.axes[0].yaxis):
        boxes = [label.get_window_extent() for label in axis.get_ticklabels()]
        assert len(boxes) > 8 and not any(one.overlaps(other) for one, other in pairwise(boxes))


def meshes(figure: Figure) -> list[QuadMesh]:
    """The maps of a figure, without the colour bars, whose values are a column."""
    return [mesh for mesh in figure.findobj(QuadMesh) if mesh.axes.get_label() != "<colorbar>"]


def words(figure: Figure) -> set[str]:
    return {text.get_text() for text in figure.findobj(Text)}


def browser() -> str | None:
    names = ("chromium", "chromium-browser", "google-chrome", "chrome", "chromium-headless-shell")
    return next((path for name in names if (path := shutil.which(name))), None)


def test_the_page_stands_alone(tmp_path: Path) -> None:
    html = page(made_up())
    assert not re.search(r"<script|(src|href)=\"(?!data:|#)|url\((?!#)|@import", html)
    assert html.count("<svg") == 4 and "Head atlas of m" in html and "<?xml" not in html
    # What a picture refers to stands in it, under a name of its own.
    pictures = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    referred = [set(re.findall(r"(?:href=\"#|url\(#)([^\")]+)", picture)) for picture in pictures]
    assert all(f'id="{name}"' in picture for picture, names in zip(pictures, referred, strict=True) for name in names)
    assert all(not one & other for one, other in combinations(referred, 2)) and any(referred)


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


def test_passes_of_a_first_block_with_steps_of_its_own_are_told_apart() -> None:
    steps = ["denoising_step_list=[1000]", "denoising_step_list_first_chunk=[1000,750,500,250]"]
    chosen = choose_passes(load_config({}, ["num_frame_per_block=1", *steps]), None, None)
    count, seen = chosen.count(), []
    for _ in range(5 + 2 * 2):  # four steps and the clean pass, then two blocks of a step and a clean pass
        for layer in range(3):
            count.see(layer)
        seen.append(count.key)
    assert seen == [(0, 0), (0, 1), (0, 2), (0, 3), (0, 4), (1, 0), (1, 1), (2, 0), (2, 1)]
    assert [name for _, name in chosen.passes] == ["0", "clean"]
    with pytest.raises(InputError, match="rolling: passes over several blocks at once cannot be told apart"):
        choose_passes(load_config({}, ["rolling={max_attention: 21}", "dummy_forcing=off"]), None, None)
