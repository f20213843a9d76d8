"""What a benchmark refuses before it measures anything."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import dit, end_to_end, long_video, memory, merged, policies, scale, vae, writer
from benchmarks.arguments import store
from utils.errors import ToldElsewhere

WRONG = [
    (policies.main, "--policies full,packd", "'packd' is none of full, window"),
    (policies.main, "--size 8 0", "expected a whole number from 1 on, got '0'"),
    (policies.main, "--dim 32", "expected a multiple of 64, got '32'"),
    (dit.main, "--policy packd", "'packd' is none of"),
    (dit.main, "--engine eager,quick", "'quick' is none of eager, compiled"),
    (dit.main, "--attention fa9", "'fa9' is none of auto"),
    (dit.main, "--precision int3", "'int3' is none of auto, fp8"),
    (dit.main, "--resolution 480,481", "'481' is none of 480"),
    (dit.main, "--repeat 0", "expected a whole number from 1 on"),
    (dit.main, "--device cuda:99", "'cuda:99' is no device here"),
    (vae.main, "--device gpu", "'gpu' is no device here"),
    (vae.main, "--resolution large", "'large' is none of 480"),
    (merged.main, "--json /no/such/folder/x.json", "/no/such/folder/x.json: cannot be written"),
    (end_to_end.main, "--policy observd", "'observd' is none of full"),
    (end_to_end.main, "--engine quick", "'quick'"),
    (scale.main, "--policy packd", "'packd' is none of"),
    (scale.main, "--ranks 1,0", "expected a whole number from 1 on, got '0'"),
    (writer.main, "--resolution 480,481", "'481' is none of 480, 720, 1080"),
    (memory.main, "--json /no/such/folder/x.json", "cannot be written"),
    (long_video.main, "--minutes 0.5", "expected a whole number from 1 on, got '0.5'"),
]


@pytest.mark.parametrize(("main", "given", "said"), WRONG, ids=lambda value: value if isinstance(value, str) else "")
def test_what_cannot_be_measured_is_refused_at_once(
    main: Callable[[list[str]], int], given: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(given.split())
    printed = capsys.readouterr()
    assert caught.value.code == 2 and printed.out == ""
    assert printed.err.splitlines()[-1].partition("error: ")[2].startswith("argument --") and said in printed.err


def test_a_result_is_stored_whole(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    store({"rows": [1]}, None)
    store({"rows": [1]}, path)
    with pytest.raises(TypeError):
        store({"rows": [object()]}, path)
    assert json.loads(path.read_text()) == {"rows": [1]} and [*tmp_path.iterdir()] == [path]


def test_a_studio_that_does_not_start_has_said_why(capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("websockets")
    from benchmarks import studio

    with pytest.raises(ToldElsewhere), studio.server(["nonsense=1"]):
        pass
    assert "error: nonsense: unknown key" in capfd.readouterr().err
