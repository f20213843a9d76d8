"""A transformer that has grown: the same flows to begin with, and every new layer can learn."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from shapes.dit import SIZES, Flow
from shapes.dit_training import finished_weights
from shapes.forward import Plan, TrainingForward
from shapes.growth import OUTPUTS, deepened, layers_of
from tests.tiny import CONFIG, random_embeds, tiny_model
from utils.errors import InputError
from wan.transformer.model import CausalWanModel

MODEL = Path(__file__).parents[1] / "checkpoints" / "shapes" / "Wan2.1-T2V-shapes"
FILE = "diffusion_pytorch_model.safetensors"


def flows(net: CausalWanModel) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    clean = torch.randn(2, 3, 16, 4, 6, generator=generator)
    noisy = torch.randn(2, 1, 2, 3, 16, 4, 6, generator=generator)
    times = torch.tensor([[[900.0, 300.0]], [[600.0, 0.0]]])
    found: Tensor = TrainingForward(net)(clean, noisy, times, random_embeds(net.config, 2), Plan(2))
    return found


def grown(layers: int) -> CausalWanModel:
    net = CausalWanModel(replace(CONFIG, num_layers=layers))
    net.load_state_dict(deepened(tiny_model().state_dict(), layers))
    return net


@pytest.mark.parametrize("layers", [3, 4, 5, 7])
def test_a_deeper_transformer_computes_what_the_shallower_did(layers: int) -> None:
    with torch.no_grad():
        assert torch.equal(flows(grown(layers)), flows(tiny_model()))


@pytest.mark.parametrize(
    ("old", "layers", "order"),
    [(4, 6, "011233"), (3, 4, "0122"), (3, 6, "001122"), (2, 5, "00111"), (1, 3, "000"), (3, 3, "012")],
)
def test_copies_stand_evenly_behind_their_layers(old: int, layers: int, order: str) -> None:
    weights = {f"blocks.{i}.modulation": torch.full((1,), float(i)) for i in range(old)} | {"head": torch.ones(1)}
    found = deepened(weights, layers)
    assert found.keys() == {"head", *(f"blocks.{i}.modulation" for i in range(layers))}
    assert "".join(f"{found[f'blocks.{i}.modulation'].item():.0f}" for i in range(layers)) == order
    assert layers_of(found) == layers


def test_every_new_layer_learns_from_the_first_step_on() -> None:
    net = grown(6).requires_grad_(True)
    torch.autograd.backward(flows(net).square().mean())
    for place in (1, 3, 5):
        names = tuple(f"blocks.{place}.{output}" for output in OUTPUTS)
        outputs = [parameter for name, parameter in net.named_parameters() if name.startswith(names)]
        assert len(outputs) == 6
        for parameter in outputs:
            assert not parameter.any() and parameter.grad is not None and parameter.grad.abs().max() > 0


def test_a_finished_model_of_fewer_layers_is_gone_on_with(tmp_path: Path) -> None:
    weights = load_file(MODEL / FILE)
    assert layers_of(weights) == SIZES.num_layers
    fewer = {name: value for name, value in weights.items() if not name.startswith("blocks.")}
    fewer |= {name: value for name, value in weights.items() if name.startswith(("blocks.0.", "blocks.1."))}
    save_file(fewer, tmp_path / FILE)
    shallow = CausalWanModel(replace(SIZES, num_layers=2))
    shallow.load_state_dict(fewer)
    deep = Flow().model
    deep.load_state_dict(finished_weights(tmp_path))
    with torch.no_grad():
        assert torch.equal(flows(deep), flows(shallow))


def test_a_finished_model_of_more_layers_is_refused(tmp_path: Path) -> None:
    weights = load_file(MODEL / FILE)
    save_file(deepened(weights, SIZES.num_layers + 1), tmp_path / FILE)
    with pytest.raises(InputError, match=r"--start-from: .* is of another model"):
        finished_weights(tmp_path)
    shutil.copy(MODEL / FILE, tmp_path)
    assert finished_weights(tmp_path).keys() == weights.keys()
