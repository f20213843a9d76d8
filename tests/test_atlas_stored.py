"""A stored atlas that is broken is refused, with what is wrong with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from pipeline.atlas import command
from tests.test_atlas import made_up


def broken(content: object, **tensors: Tensor | None) -> bytes:
    """A file as Atlas.save writes it, of the given metadata and with other tensors; None leaves one out."""
    atlas = made_up()
    all_tensors: dict[str, Tensor | None] = {f"attention.{b}": atlas.attention[b] for b in atlas.blocks}
    all_tensors |= {f"entropy.{b}": atlas.entropy[b] for b in atlas.blocks}
    all_tensors |= {name.replace("_", "."): tensor for name, tensor in tensors.items()}
    text = content if isinstance(content, str) else json.dumps(content)
    kept = {name: tensor for name, tensor in all_tensors.items() if tensor is not None}
    return save(kept, {"head_atlas": text})


WHOLE: dict[str, object] = {
    "frames": {"1": [0, 1, 2], "2": [0, 1, 2, 3, 4, 5]},
    "passes": ["0", "1", "clean"],
    "videos": ["a", "b", "c"],
    "config": {"num_output_frames": 12, "dummy_forcing": {"num_dummy": 2}},
}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"nothing", "cannot be read as an atlas"),
        (save({"a": torch.ones(1)}), "is no head atlas"),
        (broken(WHOLE)[:-100], "cannot be read as an atlas"),
        (broken("{"), "its metadata is no JSON"),
        (broken([1]), "its metadata is a list, not an object"),
        (broken({k: v for k, v in WHOLE.items() if k != "frames"}), "frames is no table of blocks"),
        (broken({**WHOLE, "frames": [1]}), "frames is no table of blocks"),
        (broken({**WHOLE, "frames": {}}), "frames is no table of blocks"),
        (broken({**WHOLE, "frames": {"one": [0]}}), "frames of block 'one' are no ascending numbers"),
        (broken({**WHOLE, "frames": {"01": [0]}}), "frames of block '01'"),
        (broken({**WHOLE, "frames": {"1": [0, 1.5]}}), "frames of block '1' are no ascending numbers"),
        (broken({**WHOLE, "frames": {"1": [0, 1, 3], "2": [0, 1, 2, 3, 4, 5]}}), "block 1 cannot have seen frames"),
        (broken({**WHOLE, "passes": []}), "passes is no list of texts"),
        (broken({**WHOLE, "videos": [1]}), "videos is no list of texts"),
        (broken({**WHOLE, "videos": ["a"]}), "tensor entropy.1 is [3, 3, 2, 3], expected [1, 3, layers, heads]"),
        (broken({**WHOLE, "query_share": "all"}), "query_share is 'all'"),
        (broken({k: v for k, v in WHOLE.items() if k != "config"}), "config is no section of settings"),
        (broken({**WHOLE, "config": 3}), "config is no section of settings"),
        (broken({**WHOLE, "config": {"sed": 3}}), "its settings cannot be used (sed: unknown key; did you mean seed?)"),
        (broken(WHOLE, attention_2=None), "tensor attention.2 is missing"),
        (broken(WHOLE, entropy_1=None), "tensor entropy.1 is missing"),
        (broken(WHOLE, attention_1=torch.ones(3, 3, 2, 3, 3) / 3), "expected [3, 3, 2, 3, 4]"),
        (broken(WHOLE, attention_1=torch.ones(3, 3, 2, 3, 4)), "attention.1 holds no shares that sum to 1"),
        (broken(WHOLE, attention_1=torch.full((3, 3, 2, 3, 4), torch.nan)), "attention.1 holds what is no number"),
        (broken(WHOLE, entropy_1=torch.ones(3, 3, 2, 3).int()), "entropy.1 holds what is no number"),
        (broken(WHOLE, entropy_1=torch.ones(3, 3, 2)), "entropy.1 is [3, 3, 2], expected"),
        (
            broken(WHOLE, entropy_1=torch.ones(3, 3, 1, 3), attention_1=torch.ones(3, 3, 1, 3, 4) / 4),
            "blocks are of models with different layers and heads",
        ),
    ],
)
def test_a_broken_atlas_is_refused(
    tmp_path: Path, content: bytes, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    assert command.main(["--atlas", str(path)]) == 2
    said = capsys.readouterr().err
    assert message in said and str(path) in said


def test_the_whole_one_is_not_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(broken(WHOLE))
    assert command.main(["--atlas", str(path)]) == 0
    assert command.main(["--atlas", str(tmp_path)]) == 2  # a folder
    assert command.main(["--atlas", str(tmp_path / "none")]) == 2
    said = capsys.readouterr().err
    assert "is a folder, not a stored atlas" in said and "there is no such stored atlas" in said
