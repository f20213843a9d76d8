"""LoRA files of other programs: their names, and who says how strong they are."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from pipeline.config.config import as_dict, load_config
from pipeline.runtime.calibrated import checkpoint_identity
from pipeline.runtime.loading import needed_files
from tests.small_checkpoints import MODEL_CONFIG, SmallCheckpoints, dit_shapes, lora_weights, random_weights
from utils.errors import InputError
from wan.checkpoints.diffusers_layout import diffusers_layer
from wan.checkpoints.lora import merge_lora
from wan.checkpoints.reading import read_tensors

SHAPES = dit_shapes(MODEL_CONFIG)
STATE = random_weights(SHAPES, torch.Generator().manual_seed(0))
PEFT = "base_model.model."
LORA = {
    name.removeprefix(PEFT): tensor
    for name, tensor in lora_weights(SHAPES, 4, torch.Generator().manual_seed(1)).items()
}
LAYER = "blocks.1.cross_attn.v"
HERE = Path("file.pt")
Rename = Callable[[str], str]


def merged(
    content: Mapping[str, object], rank: int | None = None, alpha: float | None = None, path: Path = HERE
) -> dict[str, Tensor]:
    state = dict(STATE)
    merge_lora(state, content, rank, alpha, path)
    return state


def strength(state: Mapping[str, Tensor], layer: str = LAYER) -> float:
    """By what B·A was multiplied."""
    b_a = LORA[f"{layer}.lora_B.weight"] @ LORA[f"{layer}.lora_A.weight"]
    change = state[f"{layer}.weight"] - STATE[f"{layer}.weight"]
    return float((change * b_a).sum() / (b_a * b_a).sum())


def down_up(name: str) -> str:
    return name.replace("lora_A", "lora_down").replace("lora_B", "lora_up")


def diffusers(name: str) -> str:
    layer, _, rest = name.partition(".lora_")
    return f"{diffusers_layer(layer)}.lora_{rest}"


def kohya(name: str) -> str:
    layer, _, rest = name.partition(".lora_")
    return f"{layer.replace('.', '_')}.lora_{rest}"


NAMINGS: dict[str, Rename] = {
    "bare": lambda name: name,
    "bare, down and up": down_up,
    "bare Diffusers": diffusers,
    "ComfyUI": lambda name: f"diffusion_model.{name}",
    "ComfyUI, down and up": lambda name: f"diffusion_model.{down_up(name)}",
    "ComfyUI of peft": lambda name: f"base_model.model.diffusion_model.{name}",
    "Diffusers": lambda name: f"transformer.{diffusers(name)}",
    "Diffusers, older": lambda name: f"transformer.{diffusers(name)}".replace("lora_A", "lora.down").replace(
        "lora_B", "lora.up"
    ),
    "Diffusers' prefix": lambda name: f"transformer.{name}",
    "peft": lambda name: f"{PEFT}{name}",
    "peft of Diffusers": lambda name: f"{PEFT}{diffusers(name)}".replace(".weight", ".default.weight"),
    "peft, other adapter": lambda name: f"{PEFT}{name}".replace(".weight", ".my-adapter.weight"),
    "peft, no leaf": lambda name: f"{PEFT}{name}".replace(".weight", ""),
    "kohya": lambda name: f"lora_unet_{down_up(kohya(name))}",
    "kohya, two underscores": lambda name: f"lora_unet__{down_up(kohya(name))}",
    "kohya of Diffusers": lambda name: f"lora_unet_{down_up(kohya(diffusers(name)))}",
    "kohya's transformer": lambda name: f"lora_transformer_{down_up(kohya(name))}",
    "LyCORIS": lambda name: f"lycoris_{down_up(kohya(name))}",
    "wrapped": lambda name: f"{PEFT}model._fsdp_wrapped_module.{name.replace('blocks.1', 'blocks.1._orig_mod')}",
}


@pytest.mark.parametrize("rename", NAMINGS.values(), ids=NAMINGS)
@pytest.mark.parametrize("container", [None, "generator_lora", "lora", "state_dict"])
def test_namings(rename: Rename, container: str | None) -> None:
    content: dict[str, object] = {rename(name): tensor for name, tensor in LORA.items()}
    assert len(content) == len(LORA)
    if container is not None:
        content = {container: content, "critic_lora": {}, "step": 7}
    found, wanted = merged(content), merged(LORA)
    assert all(torch.equal(found[name], wanted[name]) for name in STATE)
    assert strength(found) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(
    "spell", ["diffusion_model.{}.alpha", "transformer.{}.alpha", "{}.alpha", "lora_unet_{}.alpha"]
)
@pytest.mark.parametrize("number", [torch.tensor(2.0), torch.tensor([2], dtype=torch.int64), 2])
def test_every_layer_may_have_its_own_alpha(spell: str, number: object) -> None:
    flat = LAYER.replace(".", "_") if "unet" in spell else LAYER
    found = merged({**LORA, spell.format(flat): number})
    assert strength(found) == pytest.approx(0.5, abs=1e-4)
    assert strength(found, "blocks.0.ffn.0") == pytest.approx(1, abs=1e-4)


def test_differences_of_weights_and_biases_are_added() -> None:
    content = {
        f"diffusion_model.{LAYER}.lora_down.weight": LORA[f"{LAYER}.lora_A.weight"],
        f"diffusion_model.{LAYER}.lora_up.weight": LORA[f"{LAYER}.lora_B.weight"],
        f"diffusion_model.{LAYER}.diff_b": torch.full((64,), 0.25),
        "diffusion_model.blocks.0.self_attn.norm_q.diff": torch.full((64,), 0.5),
    }
    found = merged(content)
    torch.testing.assert_close(found[f"{LAYER}.bias"], STATE[f"{LAYER}.bias"] + 0.25)
    norm = "blocks.0.self_attn.norm_q.weight"
    torch.testing.assert_close(found[norm], STATE[norm] + 0.5)
    assert strength(found) == pytest.approx(1, abs=1e-4)


def test_a_lora_of_a_convolution() -> None:
    a, b = torch.randn(4, 16, 1, 2, 2), torch.randn(64, 4, 1, 1, 1)
    found = merged({"patch_embedding.lora_down.weight": a, "patch_embedding.lora_up.weight": b})
    wanted = STATE["patch_embedding.weight"] + torch.einsum("or,rixyz->oixyz", b[..., 0, 0, 0], a)
    torch.testing.assert_close(found["patch_embedding.weight"], wanted)


# --------------------------------------------------------------------------------------------------------------------
# Strength


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"r": 4, "lora_alpha": 8}, 2.0),
        ({"r": 4, "lora_alpha": 8, "use_rslora": True}, 4.0),
        ({"r": 4, "lora_alpha": 8, "alpha_pattern": {"cross_attn.v": 1}}, 0.25),
        ({"r": 9, "lora_alpha": 8, "rank_pattern": {name.rpartition(".lora")[0]: 4 for name in LORA}}, 2.0),
        ({"r": 64, "lora_alpha": 8}, 1.0),  # of another file
    ],
)
@pytest.mark.parametrize("place", ["adapter_config.json", "header"])
def test_settings_beside_the_file(tmp_path: Path, settings: dict[str, object], wanted: float, place: str) -> None:
    path = tmp_path / "adapter_model.safetensors"
    if place == "header":
        metadata = {"lora_adapter_metadata": json.dumps({f"transformer.{key}": v for key, v in settings.items()})}
        save_file(LORA, path, metadata)
    else:
        save_file({f"{PEFT}{name}": tensor for name, tensor in LORA.items()}, path)
        (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    for source in (path, tmp_path):
        if place != "header" or source == path:
            assert strength(merged(read_tensors(source), path=source)) == pytest.approx(wanted, abs=1e-3)


def test_an_alpha_in_the_file_comes_before_what_lies_beside_it(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 8}))
    found = merged({**LORA, f"{LAYER}.alpha": torch.tensor(4.0)}, path=tmp_path / "x.pt")
    assert strength(found) == pytest.approx(1, abs=1e-4)
    assert strength(found, "blocks.0.ffn.0") == pytest.approx(2, abs=1e-4)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"peft_type": "LOHA", "r": 4, "lora_alpha": 4}, "the adapter is LOHA; a LoRA is wanted"),
        ({"use_dora": True, "r": 4, "lora_alpha": 4}, "the adapter is DoRA"),
        ({"r": 4, "lora_alpha": "8"}, "lora_alpha must be a number above 0, got '8'"),
        ({"r": 4, "lora_alpha": 8, "alpha_pattern": [1]}, "alpha_pattern must map"),
    ],
)
def test_settings_that_make_no_sense(tmp_path: Path, settings: dict[str, object], told: str) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match=r"adapter_config\.json") as caught:
        merged(LORA, path=tmp_path / "x.pt")
    assert told in str(caught.value)


ALPHA_2 = {f"{name.removesuffix('.lora_A.weight')}.alpha": torch.tensor(2.0) for name in LORA if "lora_A" in name}


@pytest.mark.parametrize("rank", [None, 4])
@pytest.mark.parametrize(("alpha", "wanted"), [(None, 0.5), (2.0, 0.5), (4.0, 1.0), (1.0, 0.25)])
def test_a_given_alpha_counts_and_is_said_if_it_is_not_the_files(
    caplog: pytest.LogCaptureFixture, rank: int | None, alpha: float | None, wanted: float
) -> None:
    with caplog.at_level(logging.WARNING):
        assert strength(merged({**LORA, **ALPHA_2}, rank, alpha)) == pytest.approx(wanted, abs=1e-4)
    told = f"adapter.alpha is {alpha}"
    assert bool(caplog.records) == (wanted != 0.5)
    if wanted != 0.5:
        assert f"{told[:-2]}, which with rank 4 of file.pt gives B·A times {wanted:g}; its own, rank 4" in caplog.text
        assert "leave out adapter.rank and adapter.alpha" in caplog.text


@pytest.mark.parametrize("content", [LORA, {**LORA, **ALPHA_2}])
@pytest.mark.parametrize(("rank", "alpha"), [(256, 256.0), (4, 256.0), (None, 256.0), (256, None), (8, 4.0)])
def test_a_rank_or_an_alpha_of_another_file_is_refused(
    content: dict[str, Tensor], rank: int | None, alpha: float | None
) -> None:
    state = dict(STATE)
    with pytest.raises(InputError) as caught:
        merge_lora(state, content, rank, alpha, HERE)
    message = str(caught.value)
    own = "alpha 4, give B·A times 1" if len(content) == len(LORA) else "alpha 2, give B·A times 0.5"
    assert f"its own, rank 4 and {own}" in message
    assert "leave out adapter.rank and adapter.alpha (on the command line: adapter=null)" in message
    assert all(state[name] is STATE[name] for name in STATE)
    assert strength(merged(content)) == pytest.approx(1 if len(content) == len(LORA) else 0.5, abs=1e-4)


def test_ranks_may_differ_from_layer_to_layer() -> None:
    content = dict(LORA)
    for factor, tensor in (("A", torch.randn(9, 64)), ("B", torch.randn(64, 9))):
        content[f"blocks.0.self_attn.q.lora_{factor}.weight"] = tensor
    merged(content)
    with pytest.raises(InputError, match=r"adapter\.rank is 4, but file\.pt has rank 4, 9"):
        merged(content, 4, None)


# --------------------------------------------------------------------------------------------------------------------
# Several


def test_loras_add_up_each_by_its_strength() -> None:
    other = lora_weights(SHAPES, 8, torch.Generator().manual_seed(2))
    content = {**LORA, f"{LAYER}.diff": torch.ones(64, 64), f"{LAYER}.diff_b": torch.ones(64)}
    state = dict(STATE)
    merge_lora(state, {"generator_lora": other, "critic_lora": LORA, "step": 3}, 8, 8.0, HERE)
    merge_lora(state, content, None, None, HERE, 0.5)
    merge_lora(state, LORA, None, None, HERE, -2.0)
    factors = {
        name: (LORA[f"{name}.lora_A.weight"], LORA[f"{name}.lora_B.weight"]) for name in (LAYER, "blocks.0.ffn.2")
    }
    for name, (a, b) in factors.items():
        first = other[f"{PEFT}{name}.lora_B.weight"] @ other[f"{PEFT}{name}.lora_A.weight"]
        expected = STATE[f"{name}.weight"] + first + (0.5 - 2.0) * b @ a + 0.5 * (name == LAYER)
        torch.testing.assert_close(state[f"{name}.weight"], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(state[f"{LAYER}.bias"], STATE[f"{LAYER}.bias"] + 0.5)


TWO = "loras=[{path: a.pt, strength: 0.8}, {path: b.pt}]"
SELF_FORCING = Path(__file__).parents[1] / "configs" / "self_forcing_inference.yaml"


def test_the_setting_names_files_and_strengths() -> None:
    config = load_config(SELF_FORCING, ["model_root=/w", "lora_ckpt=/first.pt", "adapter={rank: 4}", TWO])
    assert [(lora.setting, lora.path, lora.strength) for lora in config.lora_files] == [
        ("lora_ckpt", Path("/first.pt"), 1.0),
        ("loras[0].path", Path("/w/a.pt"), 0.8),
        ("loras[1].path", Path("/w/b.pt"), 1.0),
    ]
    assert [lora.adapter is None for lora in config.lora_files] == [False, True, True]
    assert load_config(as_dict(config)) == config
    assert needed_files(config)[Path("/w/b.pt")] == "loras[1].path"
    assert load_config(SELF_FORCING, [TWO, "loras=null"]).loras == ()
    assert load_config(SELF_FORCING, ["loras=[{path: ~/a.pt}]"]).loras[0].path == str(Path.home() / "a.pt")


def test_a_stack_is_part_of_the_weights_identity(checkpoints: SmallCheckpoints) -> None:
    """By which a calibration is told from one with other weights."""
    stacks = ["", ", strength: 0.5", ", strength: -1"]
    given = [[], *([f"loras=[{{path: {checkpoints.longlive_lora}{strength}}}]"] for strength in stacks)]
    configs = [load_config(SELF_FORCING, [f"model_root={checkpoints.root}", *one]) for one in given]
    assert len({checkpoint_identity(config) for config in configs}) == 4


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("loras=a.pt", "loras: expected a list of sections with the keys path, strength, got the text 'a.pt'"),
        ("loras={path: a.pt}", "loras: expected a list of sections with the keys path, strength, got a section"),
        ("loras=[a.pt]", "loras[0]: expected a section with the keys path, strength, got the text 'a.pt'"),
        ("loras=[{strength: 1}]", "loras[0].path: missing, expected text"),
        ("loras=[{path: 3}]", "loras[0].path: expected text, got 3 (int)"),
        ("loras=[{path: ''}]", "loras[0].path: the path is empty"),
        (
            "loras=[{path: a.pt}, {path: b.pt, strenght: 1}]",
            "loras[1].strenght: unknown key; did you mean loras[1].strength",
        ),
        ("loras=[{path: a.pt, alpha: 4}]", "loras[0].alpha: unknown key"),
        ("loras=[{path: a.pt, strength: high}]", "loras[0].strength: expected a number, got the text 'high'"),
        (
            "loras=[{path: a.pt, strength: 1e9}]",
            "strength must be from -100 to 100 (1: as trained), got 1e+09 for a.pt",
        ),
        ("loras=[{path: a.pt, strength: .inf}]", "loras[0].strength: expected a number, got inf"),
        ("loras=[{path: a.pt}, {path: ./x/../a.pt}]", "loras[1].path: /w/x/../a.pt is merged already (loras[0].path)"),
    ],
)
def test_a_list_of_loras_that_cannot_be(given: str, told: str) -> None:
    with pytest.raises(InputError) as caught:
        load_config(SELF_FORCING, ["model_root=/w", given])
    assert told in str(caught.value)


# --------------------------------------------------------------------------------------------------------------------
# What is not known


@pytest.mark.parametrize(
    ("extra", "told"),
    [
        ({f"{LAYER}.dora_scale": torch.ones(1)}, ["dora_scale", "It is DoRA"]),
        ({f"{LAYER}.hada_w1_a": torch.ones(1)}, ["hada_w1_a", "It is LoHa"]),
        ({f"{LAYER}.lokr_w1": torch.ones(1)}, ["lokr_w1", "It is LoKr"]),
        ({f"{LAYER}.lora_B.bias": torch.ones(1)}, ["lora_B.bias", "biases of factors"]),
        ({"x\x1b[31m.weight": torch.ones(1)}, [r"1 of 61 names are not known", r"x\x1b[31m.weight"]),
        ({f"a{i}.weight": torch.ones(1) for i in range(9)}, ["9 of 69 names", "a4.weight, ... (9 in all)"]),
        ({f"{LAYER}.alpha": torch.ones(3)}, [f"'{LAYER}.alpha' is the alpha of a layer, and no number"]),
        ({f"{LAYER}.alpha": torch.tensor(float("nan"))}, ["and no number"]),
        ({f"{LAYER}.lora_A.weight": torch.ones(4, 64, dtype=torch.int8)}, ["holds int8 numbers"]),
        ({f"{LAYER}.lora_A.weight": torch.full((4, 64), float("nan"))}, [f"'LoRA of {LAYER}' hold infinities or NaN"]),
        ({f"{LAYER}.diff_b": torch.ones(3)}, [f"diff_b of '{LAYER}' does not fit: it has [3], the model [64]"]),
        ({f"transformer.{LAYER}.lora_A.weight": torch.ones(4, 64)}, [f"lora_A of '{LAYER}' twice"]),
        (
            {f"blocks.0.cross_attn.k_img.lora_{factor}.weight": torch.ones(4, 4) for factor in "AB"},
            ["1 of 31 layers that the model lacks", "an image-to-video model", "wan.checkpoints.identify"],
        ),
        ({f"lora_unet_blocks_0_x.lora_{factor}.weight": torch.ones(4, 4) for factor in "AB"}, ["lacks: blocks_0_x"]),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_is_not_known_is_named(extra: dict[str, Tensor], told: list[str]) -> None:
    state = dict(STATE)
    with pytest.raises(InputError) as caught:
        merge_lora(state, {**LORA, **extra}, None, None, HERE)
    message = str(caught.value)
    assert all(part in message for part in told), message
    assert "\x1b" not in message
    assert all(state[name] is STATE[name] for name in STATE)


def test_a_whole_model_given_as_a_lora() -> None:
    with pytest.raises(InputError, match=r"file\.pt: 96 of 96 names are not known to be those of a LoRA") as caught:
        merged({"generator": STATE})
    assert "python -m wan.checkpoints.identify file.pt" in str(caught.value)


def test_names_and_shapes_are_enough_to_check() -> None:
    state = {name: tensor.to("meta") for name, tensor in STATE.items()}
    assert merge_lora(state, {**LORA, **ALPHA_2}, 4, 2.0, HERE) == 30
    assert all(tensor.is_meta for tensor in state.values())
