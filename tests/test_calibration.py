"""Calibrated memory: errors by frame against plain attention, the file, the dial, the command, the policy in runs."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dummy.calibration.candidates import CANDIDATES, named, parse_candidates
from dummy.calibration.dial import Dial
from dummy.calibration.measured import FILE, Calibration, Subject
from dummy.calibration.recorder import HeadErrors, Pieces
from dummy.policies.calibrated import calibrated_policy
from dummy.policy import ContextPolicy
from pipeline.calibrate import command, recording
from pipeline.calibrate.cost import observed_operations, recorder_bytes
from pipeline.config.config import geometry_of, load_config
from pipeline.runtime.generator import BlockGenerator
from pipeline.runtime.inputs import GeneratorSettings
from pipeline.runtime.loading import check_before_loading, generator_settings
from tests.conftest import ROOT, Program
from tests.small_checkpoints import SmallCheckpoints
from tests.test_generator import SCHEDULE, latents, start
from tests.tiny import CONFIG, tiny_model
from utils.errors import InputError
from utils.lock import RunLock
from utils.memory import PeakTracker
from wan.attention.head_group import FULL_HISTORY, Retention
from wan.config import WAN_1_3B, WAN_14B
from wan.transformer.operations import forward_operations

TOKENS, HEADS, WIDTH, OWN = 5, 3, 8, 2
CONTEXT = [4, 0, 3, 1, 2]  # as slots may hold them
SUBJECT = Subject(CONFIG.num_layers, CONFIG.num_heads, CONFIG.head_dim, 4, 6, 3, 21, "of nobody")
CPU = torch.device("cpu")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("piece_bytes", [20_000, 128 << 20])
def test_errors_are_those_of_plain_attention(piece_bytes: int) -> None:
    """Every candidate computed on its own, in float64, with the rows of the output projection themselves."""
    length, keys_length = OWN * TOKENS, (OWN + len(CONTEXT)) * TOKENS
    q, k = normal(2, length, HEADS, WIDTH), 3 * normal(2, keys_length, HEADS, WIDTH, seed=1)
    v = normal(2, keys_length, HEADS, WIDTH, seed=2)
    rows = normal(HEADS, WIDTH, 24, seed=3)
    observer = HeadErrors(TOKENS, CANDIDATES, [rows @ rows.transpose(1, 2)], length, piece_bytes)
    for _ in range(2):  # the mean over passes
        observer(0, q, k, CONTEXT, v)
    numbers = torch.tensor([-1] * OWN + CONTEXT).repeat_interleave(TOKENS)
    scores = torch.einsum("blhd,bshd->bhls", q.double(), k.double()) * WIDTH**-0.5

    def outputs(keep: Retention) -> Tensor:
        kept = [-1, *keep.keep(sorted(CONTEXT))]
        mask = (numbers[:, None] == torch.tensor(kept)).any(1)
        shares = scores.masked_fill(~mask, -torch.inf).softmax(-1)
        return torch.einsum("bhls,bshd,hdo->bhlo", shares, v.double(), rows.double())

    whole = outputs(FULL_HISTORY)
    expected = torch.stack([(outputs(one) - whole).square().sum(-1).mean((0, 2)) for one in CANDIDATES], -1)
    torch.testing.assert_close(observer.errors()[0].double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(observer.outputs()[0].double(), whole.square().sum(-1).mean((0, 2)), rtol=1e-4, atol=0)


def test_frames_with_next_to_no_attention_neither_overflow_nor_vanish() -> None:
    """The block itself may hold e^-200 of a head's attention; kept alone it is all the same all that the head sees."""
    q, v = torch.ones(1, TOKENS, 1, 4), normal(1, 2 * TOKENS, 1, 4)
    k = torch.cat((torch.zeros(1, TOKENS, 1, 4), torch.full((1, TOKENS, 1, 4), 100.0)), 1)
    observer = HeadErrors(TOKENS, (Retention(0, 0), FULL_HISTORY), [torch.eye(4)[None]], 3)
    observer(0, q, k, [0], v)
    lost = (v[0, :TOKENS].mean((0, 1)) - v[0, TOKENS:].mean((0, 1))).square().sum()
    torch.testing.assert_close(observer.errors()[0, 0], torch.stack((lost, torch.zeros(()))), rtol=1e-5, atol=1e-9)


def test_the_recorder_takes_at_most_what_is_said() -> None:
    tokens, frames, queries, piece_bytes = 60, 9, 50, 1 << 17
    q, k, v = (normal(1, count * tokens, 4, 16, seed=count) for count in (3, 3 + frames, 4 + frames))
    grams = [torch.eye(16).expand(4, -1, -1).contiguous()]
    observer = HeadErrors(tokens, CANDIDATES, grams, queries, piece_bytes)
    with PeakTracker() as tracker:
        observer(0, q, k, range(frames), v[:, tokens:])
    pieces = Pieces.of(4, 16, 3 + frames, tokens, len(CANDIDATES), piece_bytes)
    assert 1 < pieces.frames < 3 + frames and 1 < pieces.queries < queries and pieces.bytes <= piece_bytes
    assert tracker.peak <= pieces.bytes + 4 * 64 * 2 * queries + 4096


@pytest.mark.parametrize(("sizes", "resolution"), [(WAN_1_3B, 480), (WAN_14B, 1080)])
def test_watching_a_pass_costs_less_than_the_pass_and_bounded_memory(sizes, resolution) -> None:
    config = load_config({"resolution": resolution, "data_path": "none.txt"})
    plan = recording.Recording(config, recording.chosen_passes(config, None, None), CANDIDATES, 256, 8)
    plain = forward_operations(sizes, geometry_of(config, 16), sizes.num_layers * sizes.num_heads * 21)
    assert observed_operations(plan, sizes, 21) < plain
    assert recorder_bytes(plan, sizes) < 1 << 30


def measured(errors: Tensor | None = None, videos: int = 3, subject: Subject = SUBJECT) -> Calibration:
    shape = videos, 2, subject.num_layers, subject.num_heads
    if errors is None:
        pace = torch.tensor([min(one.total, 18) for one in CANDIDATES])
        errors = torch.rand(*shape, 1, generator=torch.Generator().manual_seed(0)) * torch.exp(-pace / 3)
        errors[..., -1] = 0
    prompts = tuple(f"prompt {number}" for number in range(videos))
    return Calibration(CANDIDATES, errors, torch.ones(shape), (2, 3), ("0", "1"), prompts, subject)


def test_a_calibration_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    one = replace(measured(), about={"seeds": [1, 2, 3]})
    one.save(path)
    read = Calibration.load(path, "here")
    assert torch.equal(read.errors, one.errors) and torch.equal(read.outputs, one.outputs)
    assert replace(read, errors=one.errors, outputs=one.outputs) == one


def broken(path: Path, change) -> None:
    """A calibration whose metadata and tensors `change` may spoil."""
    measured().save(path)
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()[FILE.key])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    about = change(about, tensors) or about
    save_file(tensors, path, {FILE.key: about if isinstance(about, str) else json.dumps(about)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda about, _: about.update(version=1), "is of another version"),
        (lambda about, _: about.update(candidates=["0+1", "0+1"]), "0\\+1 is there twice"),
        (lambda about, _: about.update(candidates=["-1+2"]), "'-1\\+2' is no candidate"),
        (lambda about, _: about.update(candidates=["0+9999"]), "'0\\+9999' is no candidate"),
        (lambda about, _: about.update(candidates=["0+1"]), "errors is \\[3, 2, 3, 4, 16\\], not \\[3, 2, 3, 4, 1\\]"),
        (lambda about, _: about.update(candidates=[]), "candidates is no list of texts"),
        (lambda about, _: about.update(videos=[]), "videos is no list of texts"),
        (lambda about, _: about.update(num_heads=10**30), "errors is"),
        (lambda about, _: about.update(num_frames=10**400), "num_frames is more than any video has"),
        (lambda about, _: about.update(blocks=[2, -(10**400)]), "blocks are not those of a video of 21 latent frames"),
        (lambda about, _: about.update(blocks=[2, 7]), "blocks are not those of a video of 21 latent frames"),
        (lambda about, _: about.update(num_heads=True), "num_heads is no number"),
        (lambda about, _: about.update(checkpoint=7), "checkpoint is no text"),
        (lambda about, _: "[" * 100_000, "its metadata is no JSON"),
        (lambda about, _: "[]", "its metadata is a list"),
        (lambda _, tensors: tensors.pop("outputs") is None, "outputs is missing"),
        (lambda _, tensors: tensors["errors"].fill_(float("nan")) is None, "errors holds what is no number"),
        (lambda _, tensors: tensors["errors"].fill_(-1.0) is None, "errors holds what is no number"),
        (lambda _, tensors: tensors.update(errors=tensors["errors"].int()), "errors holds what is no number"),
    ],
)
def test_a_broken_file_is_refused_with_the_reason(tmp_path: Path, change, message: str) -> None:
    path = tmp_path / "c.safetensors"
    broken(path, change)
    with pytest.raises(InputError, match=f"here: {path}.*{message}"):
        Calibration.load(path, "here")


@pytest.mark.parametrize("content", [b"", b"\xff" * 40, b"<html>", None])
def test_what_is_no_calibration_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "c.safetensors"
    if content is None:  # cut off
        measured().save(path)
        content = path.read_bytes()[:-1000]
    path.write_bytes(content)
    with pytest.raises(InputError, match="cannot be read as a calibration"):
        Calibration.load(path, "here")
    save_file({"errors": torch.zeros(1)}, path)
    with pytest.raises(InputError, match="is no calibration"):
        Calibration.load(path, "here")


@pytest.mark.parametrize("names", ["1+2,x", "1+2,1+2", "1+-1", "1+99999", "", "all+0", "٣+1"])
def test_candidates_that_are_none(names: str) -> None:
    with pytest.raises(InputError, match="--candidates: "):
        parse_candidates(names.split(","), "--candidates")
    assert parse_candidates([named(one) for one in CANDIDATES], "") == CANDIDATES


@pytest.mark.parametrize("frames", [0, 0.5, 1.33, 4, 18])
def test_the_dial_keeps_to_the_budget_and_spends_it_well(frames: float) -> None:
    dial = Dial(measured(), past=18)
    one, fewer = dial.choose(frames), replace(dial, max_lengths=2).choose(frames)
    assert round(12 * one.frames) <= round(12 * frames) and one.error <= fewer.error + 1e-12
    assert all(len(set(row)) <= 2 for row in fewer.table.rows)
    assert (one.error == 0) == (frames == 18)
    alike = dial.predict(torch.full((3, 4), CANDIDATES.index(Retention(0, int(frames))) if frames < 18 else 15))
    assert one.error <= alike.error + 1e-12 or frames % 1


def test_a_block_counts_as_often_as_there_are_blocks_from_it_on() -> None:
    """Of 7 blocks 2 and 3 count 5 and 4 times; the score is the root of the mean square."""
    one = replace(measured(videos=2), errors=torch.rand(2, 2, 3, 4, 16, generator=torch.Generator().manual_seed(1)))
    expected = ((5 * one.errors[:, 0] + 4 * one.errors[:, 1]) / 9).double()
    torch.testing.assert_close(one.video_errors(), expected.sqrt(), rtol=1e-6, atol=0)
    torch.testing.assert_close(one.mean_errors(), expected.mean(0).sqrt(), rtol=1e-6, atol=0)
    assert one.output() == pytest.approx(12)


def test_errors_are_of_what_joins_the_stream() -> None:
    """Each head's rows of the output projection, multiplied by the layer's gate at the recorded steps."""
    model = tiny_model()
    generator = BlockGenerator(model, GeneratorSettings(SCHEDULE, ContextPolicy("full", FULL_HISTORY)))
    passes = recording.ChosenPasses((1,), ((0, "0"), (1, "1")), *[len(generator.usual.steps) + 1] * 2)
    times = [model.encode_time(timestep).layers[:, 2] for timestep in SCHEDULE.timesteps[:2]]
    gates = torch.stack(times).square().mean(0).sqrt()
    x, layer = normal(1, CONFIG.head_dim), model.layers()[1].self_attn.o.weight
    head = slice(CONFIG.head_dim, 2 * CONFIG.head_dim)
    expected = ((x @ layer[:, head].T) * gates[1]).square().sum()
    gram = recording.recorded_grams(generator, passes)[1][1]
    torch.testing.assert_close((x @ gram @ x.T).squeeze(), expected, rtol=1e-4, atol=1e-6)


def test_heads_that_put_out_nothing_lose_no_share_of_it() -> None:
    silent = replace(measured(), outputs=torch.zeros_like(measured().outputs))
    chosen = Dial(silent, past=18).choose(4)
    assert chosen.frames <= 4 and chosen.error != chosen.error  # nan


def test_a_third_may_be_written_with_two_digits() -> None:
    assert [Dial(measured(), past=18).choose(frames).frames for frames in (0.67, 1.33)] == pytest.approx([2 / 3, 4 / 3])


def test_a_short_video_and_a_window_rule_candidates_out() -> None:
    short = Dial(measured(), past=6)
    assert short.limits() == (0, 6) and short.choose(6).table.counts() == {FULL_HISTORY: 12}
    windowed = Dial(measured(), past=100, window=12)
    assert windowed.limits() == (0, 9)
    assert max(kept.total for kept in windowed.choose(9).table.counts()) == 9
    with pytest.raises(InputError, match=r"frames_per_head: 9.5 is more than there is"):
        windowed.choose(9.5)
    few = replace(measured(), candidates=(Retention(1, 1), FULL_HISTORY), errors=measured().errors[..., -2:])
    with pytest.raises(InputError, match=r"frames_per_head: 1 is less than there is.* 2 to 18 frames"):
        Dial(few, past=18).choose(1)


@pytest.mark.parametrize("frames", [0, 6, 12])
def test_a_run_keeps_what_was_chosen_from_the_first_block_on(frames: int) -> None:
    policy = calibrated_policy(Dial(measured(), past=18), frames)
    rollout = start(BlockGenerator(tiny_model(), GeneratorSettings(SCHEDULE, policy)), 7)
    assert not rollout.parting.pending
    kept = [group.retention for layer in rollout.cache.layers for group in layer.groups]
    assert policy.table is not None and set(kept) == set(policy.table.counts())
    latents(rollout)
    assert rollout.cache.frames_per_head <= frames


def test_all_frames_are_full_history() -> None:
    full = ContextPolicy("full", FULL_HISTORY)
    chosen = calibrated_policy(Dial(measured(), past=18), 18)
    one, other = (
        latents(start(BlockGenerator(tiny_model(), GeneratorSettings(SCHEDULE, policy)), 7))
        for policy in (full, chosen)
    )
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


BAD = {
    "frames_per_head=null": "frames_per_head: policy calibrated needs a number .* got nothing",
    "frames_per_head=-0.5": "frames_per_head: policy calibrated needs",
    "frames_per_head=sixteen": "frames_per_head: .* got 'sixteen'",
    "frames_per_head=0fps": "frames_per_head: .* a speed above 0",
    "frames_per_head=.inf": "frames_per_head: expected a number",
    "frames_per_head=true": "frames_per_head: expected a number",
    "max_lengths=0": "max_lengths: .* must be 1 or more, got 0",
    "max_lengths=1.5": "max_lengths: expected",
    "calibration=null": "calibration: policy calibrated needs a file",
    "equal_cost=full": "equal_cost: policy calibrated would ignore it",
    "roles=roles.json": "roles: policy calibrated would ignore it",
    "reclassify_on_switch=true": "reclassify_on_switch: policy calibrated would ignore it",
    "retention={dummy: [0,1]}": "retention: policy calibrated would ignore it",
    "policy=packed": "calibration: policy packed would ignore it",
    "policy=prune": "calibration: policy prune would ignore it",
}


@pytest.mark.parametrize(("change", "message"), BAD.items())
def test_settings_that_make_no_sense_are_refused(change: str, message: str) -> None:
    given = ["policy=calibrated", "calibration=c.safetensors", "frames_per_head=2", change]
    with pytest.raises(InputError, match=f"dummy_forcing.{message}"):
        load_config(ROOT / "configs" / "shapes_demo.yaml", [f"dummy_forcing.{one}" for one in given])


def test_a_window_is_a_budget_where_there_is_one() -> None:
    given = ["dummy_forcing.policy=calibrated", "dummy_forcing.calibration=c", "dummy_forcing.frames_per_head=window"]
    with pytest.raises(InputError, match=r"frames_per_head: window is the cost of"):
        load_config(ROOT / "configs" / "shapes_demo.yaml", given)
    assert load_config(ROOT / "configs" / "longlive_inference.yaml", given).policy == "calibrated"


RUN = ["num_output_frames=12", "dummy_forcing.enabled=false", "model_kwargs.local_attn_size=-1"]
PROMPTS = ("A fox.", "A lighthouse at dusk.")


def arguments(program: Program, *others: str, out: str = "c.safetensors") -> list[str]:
    """Of the command, for the program's small checkpoints."""
    given = program.arguments(*RUN, prompts=PROMPTS)
    return [*given, "--out", str(program.folder / out), "--queries", "9", "--steps", "0,3", *others]


def test_the_command_goes_on_where_it_was_and_adds_videos(
    program: Program, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    path = program.folder / "c.safetensors"
    assert command.main(arguments(program, "--videos", "1")) == 0
    (first,) = Calibration.load(path, "").errors
    assert first.shape == (3, 3, 4, 16) and bool((first[..., -1] == 0).all()) and float(first[..., 0].min()) > 0
    assert "measured in 1 video\n" in caplog.text and "nan" not in capsys.readouterr().out
    assert command.main(arguments(program, "--videos", "3")) == 0
    three = Calibration.load(path, "")
    assert three.videos == (*PROMPTS, PROMPTS[0]) and torch.equal(three.errors[0], first)
    assert len(set(three.about["seeds"])) == 3 and three.passes == ("0", "3") and three.blocks == (1, 2, 3)
    assert command.main(arguments(program, "--videos", "3", out="whole.safetensors")) == 0
    assert torch.equal(Calibration.load(program.folder / "whole.safetensors", "").errors, three.errors)
    assert "frames a head   error %" in capsys.readouterr().out and "measured in 3 videos\n" in caplog.text
    for others, message in (
        (["--candidates", "0+0,0+all"], "candidates"),
        (["seed=5"], "settings \\(seed\\), prompts, seeds or number of videos"),
        (["--videos", "2"], "prompts, seeds or number of videos"),
        (["--blocks", "1"], "blocks"),
        (["resolution=[48,64]"], "model, weights or sizes, settings \\(resolution\\)"),
    ):
        assert command.main(arguments(program, "--videos", "3", *others)) == 2
        error = capsys.readouterr().err
        assert re.search(f"error: --out: {path} exists and was made with other .*{message}", error), error
    with RunLock(program.folder / ".c.safetensors.lock", "") as other:
        other.begin("process 7")
        assert command.main(arguments(program, "--videos", "4")) == 2
        assert f"--out: another run writes {path}; wait for its end" in capsys.readouterr().err
    assert not [*program.folder.glob(".*")]  # no lock is left
    assert torch.equal(Calibration.load(path, "").errors, three.errors)


def test_a_killed_run_loses_no_finished_video(
    program: Program,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    whole, seen = recording.watch, []

    def watch(*given: object) -> None:
        seen.append(given)
        if len(seen) == 2:
            raise KeyboardInterrupt
        whole(*given)

    monkeypatch.setattr(recording, "watch", watch)
    assert command.main(arguments(program, "--videos", "2")) == 130
    assert capsys.readouterr().err.splitlines()[-1].startswith("interrupted; what is finished is kept")
    part = Calibration.load(program.folder / "c.safetensors", "")
    assert part.videos == PROMPTS[:1] and part.missing == 1
    assert command.main(["--curve", str(program.folder / "c.safetensors")]) == 0
    assert "c.safetensors is measured in 1 of 2 videos; the command that made it goes on" in caplog.text
    caplog.clear()
    assert command.main(arguments(program, "--videos", "2")) == 0 and len(seen) == 3
    assert " of 2 videos" not in caplog.text
    assert [path.name for path in program.folder.glob("*.safetensors")] == ["c.safetensors"]


def test_prompts_of_any_name(program: Program, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = program.file("7: of ${seed} #1 🦊.txt", "a fox\n")
    assert command.main(arguments(program, "--dry_run", "--prompts", str(prompts))) == 0
    assert "'a fox'" in capsys.readouterr().out


def test_a_dry_run_names_each_prompt_once(program: Program, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = program.file("two.txt", "a fox\na hare\n")
    assert command.main(arguments(program, "--dry_run", "--prompts", str(prompts), "--videos", "1001")) == 0
    assert capsys.readouterr().out.endswith("\n  'a fox', 501 videos\n  'a hare', 500 videos\n")


def test_a_dry_run_says_time_and_memory_and_stops(program: Program, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([*arguments(program, "--dry_run"), "model_name=Wan2.1-T2V-14B", "resolution=1080"]) == 2
    said = capsys.readouterr()
    assert "Time: about" in said.out and "recorder, at most" in said.out and "does not exist" in said.err
    assert "a recorded pass costs 1." in said.out
    assert command.main(arguments(program, "--dry_run")) == 0
    assert not (program.folder / "c.safetensors").exists()


@pytest.mark.parametrize(
    ("others", "message"),
    [
        (["--videos", "0"], "--videos: must be from 1"),
        (["--queries", "0"], "--queries: must be from 1"),
        (["--blocks", "9"], "--blocks: '9' is none of 1 to 3"),
        (["--steps", "4"], "--steps: '4' is none of 0, 1, 2, 3, clean"),
        (["--candidates", "0+1,2"], "--candidates: '2' is no candidate"),
        (["--prompts", "none.txt"], "data_path: none.txt: there is no such file of prompts"),
        (["num_output_frames=3"], "num_output_frames: 3 leave no block to record"),
        (["start_from=a.png"], "start_from: a.png would be ignored"),
        (["--plot", "folder"], "--plot: draws the curve"),
        (["--out", ""], "--out: the path is empty"),
        (["--out", "\n"], "--out: the path is empty"),
    ],
)
def test_what_cannot_be_recorded_is_said(
    program: Program, capsys: pytest.CaptureFixture[str], others: list[str], message: str
) -> None:
    assert command.main(arguments(program, *others)) == 2
    assert f"error: {message}" in capsys.readouterr().err
    assert command.main(["--curve", "c.safetensors", "--videos", "3"]) == 2
    assert "--videos: --curve shows a stored calibration" in capsys.readouterr().err


@pytest.fixture(scope="module")
def stored(checkpoints: SmallCheckpoints, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibration of the small checkpoints, the command's own but for its errors."""
    program = Program(tmp_path_factory.mktemp("calibrated"), checkpoints.root)
    assert command.main(arguments(program, "--videos", "1", "--blocks", "2")) == 0
    return program.folder / "c.safetensors"


def of_policy(stored: Path, *others: str) -> list[str]:
    keys = ("policy=calibrated", f"calibration={stored}", "frames_per_head=2")
    return [*RUN, "dummy_forcing.enabled=true", *(f"dummy_forcing.{key}" for key in keys), *others]


@pytest.mark.parametrize(
    "others", [[], ["attention=varlen"], ["dummy_forcing.teacache_enabled=true"], ["dummy_forcing.max_lengths=1"],
               ["rope=relative", "model_kwargs.local_attn_size=9"], ["dummy_forcing.frames_per_head=0.01fps"]],
)  # fmt: skip
def test_videos_are_made_by_the_policy(program: Program, stored: Path, others: list[str]) -> None:
    assert program(*of_policy(stored, *others), prompts=PROMPTS[:1]) == 0
    assert len(program.mp4s) == 1


def test_a_storyboard_by_the_policy(program: Program, stored: Path) -> None:
    board = program.file("boards.jsonl", json.dumps({"prompts": list(PROMPTS), "switch_frame_indices": [6]}) + "\n")
    window = ["model_kwargs.local_attn_size=6", "global_sink=true", f"data_path={board}"]
    assert program(*of_policy(stored, *window)) == 0
    assert len(program.mp4s) == 1


def test_the_plan_shows_lengths_error_memory_and_operations(
    program: Program, stored: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert program("--dry_run", *of_policy(stored)) == 0
    said = capsys.readouterr().out
    lengths = [int(count) for count in re.findall(r"calibrated +([0-9]+) heads: first [0-9]+ \+ last", said)]
    assert sum(lengths) == 12 and "TFLOP a block" in said and "cache, kept frames" in said
    assert re.search(r"Predicted: heads' outputs lose [0-9.e-]+ % .* a calibration of 1 videos of 12 latent", said)
    assert program("--dry_run", *of_policy(stored, "dummy_forcing.frames_per_head=3fps")) == 0
    assert "as many frames as 3 pixel frames/s allow, measured by the run" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["self_forcing_calibrated", "longlive_calibrated"])
def test_configurations_with_calibrated_memory(
    name: str, program: Program, stored: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--dry_run", "num_output_frames=15", "adapter=null"]
    assert program(*given, f"dummy_forcing.calibration={stored}", config=name) == 0
    assert re.search(r"calibrated +[0-9]+ heads: first", capsys.readouterr().out)
    assert program(*given, config=name) == 0
    assert "which head keeps how much: by the errors in block 3" in capsys.readouterr().out
    assert program(*given, "dummy_forcing.calibration=none.safetensors", config=name) == 2
    assert capsys.readouterr().err.startswith("error: dummy_forcing.calibration: none.safetensors: there is no")


@pytest.mark.parametrize(
    ("others", "message"),
    [
        (["resolution=[48,64]"], "c.safetensors is for latents of 4 x 6, this video has latents of 6 x 8"),
        (["num_frame_per_block=1"], "is for blocks of 3 latent frames, this video has blocks of 1"),
        (["dummy_forcing.frames_per_head=10"], "frames_per_head: 10 is more than there is"),
        (["dummy_forcing.calibration=none"], "calibration: policy calibrated needs a file"),
    ],
)
def test_a_file_for_something_else_is_refused_before_anything_is_loaded(
    program: Program, stored: Path, others: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in ([], ["--dry_run"]):
        assert program(*arguments, *of_policy(stored, *others)) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and (message in error or "none does not exist" in error)


def test_a_file_for_another_model_is_refused(program: Program, stored: Path) -> None:
    config = load_config(program.arguments()[1], [*program.arguments()[2:], *of_policy(stored)])
    with pytest.raises(InputError, match=r"is for a model of 3 layers of 4 heads .* has 30 layers of 12"):
        generator_settings(config, WAN_1_3B)


def test_other_weights_of_equal_sizes_are_a_warning(
    program: Program, stored: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given = program.arguments(*of_policy(stored))
    check_before_loading(load_config(given[1], given[2:]), CPU)
    assert "other weights" not in caplog.text
    other = program.folder / "other.safetensors"
    calibration = Calibration.load(stored, "")
    replace(calibration, subject=replace(calibration.subject, checkpoint="another")).save(other)
    given = program.arguments(*of_policy(other))
    check_before_loading(load_config(given[1], given[2:]), CPU)
    assert "was made with other weights" in caplog.text


def test_the_curve_of_a_stored_calibration(stored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--curve", str(stored), "--plot", str(tmp_path)]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    errors = [float(row.split()[1]) for row in rows]
    assert head.split()[:3] == ["frames", "a", "head"] and errors == sorted(errors, reverse=True) and errors[-1] == 0
    assert {path.name for path in tmp_path.iterdir()} == {"curve.svg", "curve.png", "kept.svg", "kept.png"}
    assert command.main(["--curve", str(stored), "num_output_frames=24"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split()[:2] == [
        "6.00",
        "0.000",
    ]  # all there was to be lost in block 2
    (tmp_path / "file").touch()
    for given, message in (
        (["--curve", str(tmp_path / "curve.svg")], "--curve: "),
        (["--curve", str(tmp_path / "none")], "--curve: .*there is no such calibration"),
        (["--curve", str(stored), "dummy_forcing.max_lengths=0"], "dummy_forcing.max_lengths: .* got 0"),
        (["--curve", str(stored), "--plot", str(tmp_path / "file")], "--plot: .* is a file"),
    ):
        assert command.main(given) == 2
        assert re.match(f"error: {message}", capsys.readouterr().err)
