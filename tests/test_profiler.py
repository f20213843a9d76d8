"""Spans and marks measure what they claim; the report shows shares and rates."""

from __future__ import annotations

import json
import mmap
import threading
import time

import pytest
import torch

from utils.profiler import Profiler, VideoProfile, device_name, peak_memory_bytes, resident_bytes

CPU = torch.device("cpu")


REPORT = """\
Profiling results:
  - Initialization/caching time: 10.00 ms (0.50%)
  - Diffusion generation time: 1400.00 ms (70.00%)
    - Block 0 generation time: 400.00 ms (28.57% of diffusion)
    - Block 1 generation time: 300.00 ms (21.43% of diffusion)
    - Block 2 generation time: 250.00 ms (17.86% of diffusion)
    - Block 3 generation time: 250.00 ms (17.86% of diffusion)
    - Block 4 generation time: 200.00 ms (14.29% of diffusion)
  - VAE decoding time: 500.00 ms (25.00%)
  - Frame copying time: 100.00 ms (5.00%)
  - Video writing time: 90.00 ms (4.50%)
  - Total time: 2000.00 ms; parts were busy for 2100.00 ms, overlap saved 100.00 ms
Device: Some GPU
Pixel frames: 57 in 5 blocks, 24 forwards
Diffusion FPS: 40.71 (generated pixel frames / diffusion time)
Steady diffusion FPS: 48.00 (frames of a block / median block, warm)
End-to-end FPS: 28.50 (generated pixel frames / total time)
Time to first frame: 555.50 ms
Peak memory: 3.00 GiB"""


def _profile(block_ms: tuple[float, ...] = (400.0, 300.0, 250.0, 250.0, 200.0), **changes: object) -> VideoProfile:
    values: dict[str, object] = {
        "init_ms": 10.0,
        "block_ms": block_ms,
        "vae_ms": 500.0,
        "write_ms": 90.0,
        "total_ms": 2000.0,
        "first_frame_ms": 555.5,
        "frames": 9 + 12 * (len(block_ms) - 1),
        "block_frames": (9,) + (12,) * (len(block_ms) - 1),
        "device_name": "Some GPU",
        "peak_bytes": 3 * 1024**3,
        "forwards": 24,
        "copy_ms": 100.0,
    }
    return VideoProfile(**{**values, **changes})  # type: ignore[arg-type]


def test_spans_of_a_name_are_listed_in_order() -> None:
    profiler = Profiler(CPU)
    for seconds in (0.03, 0.0):
        with profiler.span("outer"), profiler.span("inner"):
            time.sleep(seconds)
    profiler.mark("first")
    time.sleep(0.02)
    profiler.mark("first")  # a later mark does not move the first
    report = profiler.report()
    assert list(report.spans) == ["inner", "outer"]
    slow, fast = report.spans["outer"]
    assert slow >= 30 > fast >= 0
    assert report.spans["inner"][0] <= slow
    assert report.marks["first"] >= slow
    assert report.total_ms >= report.marks["first"] + 20


def test_report_does_not_end_the_measuring() -> None:
    profiler = Profiler(CPU)
    with profiler.span("a"):
        pass
    first = profiler.report()
    with profiler.span("a"):
        pass
    assert len(first.spans["a"]) == 1
    assert len(profiler.report().spans["a"]) == 2


def test_span_that_fails_is_recorded_and_the_error_passes() -> None:
    profiler = Profiler(CPU)
    with pytest.raises(KeyError), profiler.span("a"):
        raise KeyError
    assert len(profiler.report().spans["a"]) == 1


def test_reset_starts_anew() -> None:
    profiler = Profiler(CPU)
    with profiler.span("a"):
        time.sleep(0.03)
    profiler.mark("m")
    profiler.reset()
    report = profiler.report()
    assert report.spans == {}
    assert report.marks == {}
    assert report.total_ms < 30


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_spans_measure_the_stream() -> None:
    device = torch.device("cuda")
    profiler = Profiler(device)
    begin = time.perf_counter()
    with profiler.span("sleep"):
        torch.cuda._sleep(200_000_000)
    launched_ms = (time.perf_counter() - begin) * 1000
    assert profiler.report().spans["sleep"][0] > 10 * launched_ms


def test_peak_memory_is_of_this_process() -> None:
    peak = peak_memory_bytes(CPU)
    assert peak is not None
    assert 50 * 1024**2 < peak < 1024**4
    assert Profiler(CPU).peak_memory_bytes() is not None


def test_device_names() -> None:
    assert device_name(CPU)
    assert device_name(torch.device("meta")) == "meta"


def test_report_in_full() -> None:
    assert _profile().format() == REPORT


def test_steady_rate_leaves_out_warm_up_and_the_last_block() -> None:
    assert _profile((900.0, 800.0, 100.0, 1.0)).steady_fps == pytest.approx(120.0)
    for blocks in (1, 2, 3):
        short = _profile((100.0,) * blocks)
        assert short.steady_fps is None
        assert "Steady diffusion FPS: n/a" in short.format()


def test_given_blocks_count_in_no_rate() -> None:
    """9 + 12 frames were given, and 3 blocks of 12 made, of which the third is the last."""
    profile = _profile((30.0, 30.0, 250.0, 250.0, 200.0), prefix_blocks=2)
    assert profile.generated_frames == 36
    assert profile.diffusion_fps == pytest.approx(36 / 0.7)
    assert profile.end_to_end_fps == pytest.approx(18.0)
    assert profile.steady_fps is None
    assert "Pixel frames: 57, 21 of them given in 5 blocks" in profile.format()
    assert profile.as_dict()["generated_frames"] == 36


def test_no_overlap_is_no_loss() -> None:
    profile = _profile(total_ms=5000.0)
    assert profile.busy_ms == pytest.approx(2100.0)
    assert profile.overlap_ms == 0.0


def test_spans_of_several_threads_may_overlap() -> None:
    profiler = Profiler(CPU)

    def aside() -> None:
        with profiler.host_span("write"):
            time.sleep(0.05)

    thread = threading.Thread(target=aside)
    thread.start()
    with profiler.span("denoise"):
        time.sleep(0.05)
    thread.join()
    spans = profiler.report().spans
    assert min(*spans["write"], *spans["denoise"]) > 45


def test_unknown_and_zero_values_are_shown_as_such() -> None:
    text = _profile((0.0,), total_ms=0.0, peak_bytes=None, first_frame_ms=None).format()
    assert "Peak memory: n/a" in text
    assert "Time to first frame: n/a" in text
    assert "End-to-end FPS: n/a" in text


def test_dictionary_survives_json() -> None:
    profile = _profile()
    values = profile.as_dict()
    assert json.loads(json.dumps(values)) == values
    assert values["block_ms"] == [400.0, 300.0, 250.0, 250.0, 200.0]
    assert values["diffusion_fps"] == pytest.approx(57 / 1.4)
    assert values["steady_fps"] == pytest.approx(48.0)


def test_blocks_and_their_frames_must_agree() -> None:
    with pytest.raises(ValueError, match="5 blocks were timed, but 1 gave frames"):
        _profile(block_frames=(9,))


def test_what_the_allocator_held_stands_beside_the_peak() -> None:
    """A GPU's captured passes have memory of their own, in which no tensors are counted."""
    assert Profiler(CPU).reserved_memory_bytes() is None
    assert _profile(reserved_bytes=5 * 1024**3).format().endswith("Peak memory: 3.00 GiB, reserved 5.00 GiB")
    assert _profile(reserved_bytes=5 * 1024**3).as_dict()["reserved_bytes"] == 5 * 1024**3


def test_the_latest_span_is_told_without_a_report() -> None:
    profiler = Profiler(CPU)
    assert profiler.latest_ms("denoise") is None
    for pause in (0.0, 0.02):
        with profiler.span("denoise"):
            time.sleep(pause)
    assert profiler.latest_ms("denoise") == profiler.report().spans["denoise"][-1] >= 20


def test_resident_memory_is_that_of_now() -> None:
    before = resident_bytes()
    if before is None:
        pytest.skip("this system does not say")
    with mmap.mmap(-1, 32 << 20) as block:  # new pages: an allocator may hand out resident ones
        block.write(bytes(len(block)))
        assert 24 << 20 < (resident_bytes() or 0) - before < 256 << 20
