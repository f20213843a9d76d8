"""Reading checkpoints, finding the generator, filling a module, merging a LoRA, and the Diffusers layout."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.small_checkpoints import MODEL_CONFIG, dit_shapes, lora_weights, random_weights
from utils.errors import InputError
from wan.checkpoints.diffusers_layout import read_generator, read_model_config, to_wan
from wan.checkpoints.files import download_hint, read_json
from wan.checkpoints.filling import load_into
from wan.checkpoints.lora import merge_lora
from wan.checkpoints.published import REPOSITORIES
from wan.checkpoints.reading import read_tensors
from wan.checkpoints.state import generator_state, strip_wrappers

HERE = Path("file.pt")
TENSORS = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.ones(4)}


def message_of(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        read_tensors(path)
    return str(caught.value)


def assert_same(found: Mapping[str, object], wanted: Mapping[str, Tensor]) -> None:
    assert set(found) == set(wanted)
    for name, tensor in wanted.items():
        value = found[name]
        assert isinstance(value, Tensor)
        assert torch.equal(value, tensor), name


# --------------------------------------------------------------------------------------------------------------------
# Reading


@pytest.mark.parametrize("name", ["x.pt", "x.pth", "x.safetensors"])
def test_reads_every_format(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if path.suffix == ".safetensors":
        save_file(TENSORS, path)
    else:
        torch.save(TENSORS, path)
    assert_same(read_tensors(path), TENSORS)


def test_reads_the_legacy_pickle_format(tmp_path: Path) -> None:
    path = tmp_path / "old.pt"
    torch.save(TENSORS, path, _use_new_zipfile_serialization=False)
    assert_same(read_tensors(path), TENSORS)


def write_shards(folder: Path, stem: str = "diffusion_pytorch_model") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{stem}-0000{i}-of-00002.safetensors" for i in (1, 2)]
    save_file({"a.weight": TENSORS["a.weight"]}, folder / names[0])
    save_file({"b": TENSORS["b"]}, folder / names[1])
    index = folder / f"{stem}.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"a.weight": names[0], "b": names[1]}}))
    return index


def test_reads_shards_by_their_index_and_by_their_folder(tmp_path: Path) -> None:
    index = write_shards(tmp_path)
    assert_same(read_tensors(index), TENSORS)
    assert_same(read_tensors(tmp_path), TENSORS)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "Wan2.1-T2V-14B"
    index = write_shards(folder)
    (folder / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    message = message_of(index)
    assert "diffusion_pytorch_model-00002-of-00002.safetensors does not exist" in message
    assert f"bash hfd.sh Wan-AI/Wan2.1-T2V-14B {tmp_path}" in message


def test_an_index_that_promises_more_than_the_shards_hold(tmp_path: Path) -> None:
    index = write_shards(tmp_path)
    content = json.loads(index.read_text())
    content["weight_map"]["c"] = content["weight_map"]["b"]
    index.write_text(json.dumps(content))
    assert "promises tensors that its shards lack: c" in message_of(index)


@pytest.mark.parametrize("name", REPOSITORIES)
def test_a_missing_file_names_its_repository_and_the_command(name: str) -> None:
    message = message_of(Path("/data/weights") / name / "models" / "x.pt")
    assert f"/data/weights/{name}/models/x.pt does not exist" in message
    assert f"It comes from {REPOSITORIES[name]}" in message
    assert message.endswith(f"\nbash hfd.sh {REPOSITORIES[name]} /data/weights")


def test_the_command_leaves_out_the_current_directory() -> None:
    hint = download_hint(Path("Self-Forcing/checkpoints/self_forcing_dmd.pt"))
    assert hint.endswith("\nbash hfd.sh gdhe17/Self-Forcing")


def test_the_repository_is_that_of_the_innermost_folder() -> None:
    hint = download_hint(Path("Self-Forcing/wan_models/Wan2.1-T2V-1.3B/config.json"))
    assert hint.endswith("\nbash hfd.sh Wan-AI/Wan2.1-T2V-1.3B Self-Forcing/wan_models")


def test_a_missing_file_of_an_unknown_folder() -> None:
    assert message_of(Path("/nowhere/x.pt")).startswith("/nowhere/x.pt does not exist. Check the path")


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.99])
def test_a_truncated_file(tmp_path: Path, name: str, share: float) -> None:
    whole, path = tmp_path / f"whole_{name}", tmp_path / name
    tensors = {"a": torch.randn(200, 50)}
    if whole.suffix == ".pt":
        torch.save(tensors, whole)
    else:
        save_file(tensors, whole)
    content = whole.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    message = message_of(path)
    assert f"{path} is truncated or damaged ({int(share * len(content))} bytes" in message
    assert ("zip directory" if path.suffix == ".pt" else "header") in message
    assert "download it again" in message


@pytest.mark.parametrize("share", [0.02, 0.5, 0.99])
def test_a_truncated_legacy_pickle(tmp_path: Path, share: float) -> None:
    path = tmp_path / "x.pt"
    torch.save({"a": torch.randn(200, 50)}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    assert "is truncated or damaged" in message_of(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty (0 bytes)"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 5676070424\n", "is a Git LFS pointer"),
        (b"\n<!DOCTYPE html><html><body>Log in</body></html>", "is a web page (HTML)"),
        (b"<html><body>404</body></html>", "is a web page (HTML)"),
    ],
)
@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
def test_files_that_are_no_checkpoint(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert f"{path} {message}" in message_of(path)


def test_a_file_of_anything_else(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(b"hello world " * 20)
    message = message_of(path)
    assert "neither a safetensors file nor one that torch.save wrote" in message
    assert "b'hello world " in message


def test_a_folder_lists_what_to_name_instead(tmp_path: Path) -> None:
    for name in ("a.pt", "b.pt"):
        torch.save(TENSORS, tmp_path / name)
    message = message_of(tmp_path)
    assert f"{tmp_path} is a folder without diffusion_pytorch_model.safetensors" in message
    assert "Name one of its files: a.pt, b.pt." in message


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_needs_code_is_refused(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "x.pt"
    content = {"generator": TENSORS, "args": argparse.Namespace(lr=1)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    message = message_of(path)
    assert f"{path} is a pickle that needs code to be opened (argparse.Namespace)" in message
    assert "truncated" not in message


def test_a_pickle_of_a_list(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save([torch.ones(2)], path)
    assert "holds a list, not a mapping" in message_of(path)


@pytest.mark.parametrize(("content", "message"), [("{", "is not valid JSON"), ("[1]", "holds a JSON list")])
def test_json_that_is_broken(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(InputError, match=message):
        read_json(path)


# --------------------------------------------------------------------------------------------------------------------
# Containers and names


@pytest.mark.parametrize(
    ("present", "use_ema", "taken"),
    [
        (("generator", "generator_ema"), True, "generator_ema"),
        (("generator", "generator_ema"), False, "generator"),
        (("generator_ema",), False, "generator_ema"),
        (("generator",), True, "generator"),
        (("critic", "model"), True, "model"),
        (("state_dict", "optimizer"), False, "state_dict"),
        (("model", "state_dict"), False, "model"),
    ],
)
def test_the_container_rule(present: tuple[str, ...], use_ema: bool, taken: str) -> None:
    mapping = {name: {"model.w": torch.full((1,), float(i))} for i, name in enumerate(present)}
    assert generator_state(mapping, use_ema, HERE)["w"].item() == present.index(taken)


def test_a_container_that_is_none_is_not_there() -> None:
    mapping = {"generator_ema": None, "generator": {"w": torch.ones(1)}}
    assert set(generator_state(mapping, True, HERE)) == {"w"}


def test_the_mapping_itself_is_the_last_choice() -> None:
    assert_same(generator_state(TENSORS, True, HERE), TENSORS)


@pytest.mark.parametrize(
    "name",
    [
        "blocks.0.x",
        "model.blocks.0.x",
        "module.model.blocks.0.x",
        "_orig_mod.blocks.0.x",
        "model.diffusion_model.blocks.0.x",
        "model._fsdp_wrapped_module.blocks.0.x",
        "model._fsdp_wrapped_module.blocks.0._fsdp_wrapped_module.x",
        "_fsdp_wrapped_module.model.blocks.0._checkpoint_wrapped_module.x",
    ],
)
def test_wrappers_are_stripped(name: str) -> None:
    assert strip_wrappers(name) == "blocks.0.x"


def test_names_that_only_look_like_wrappers_stay() -> None:
    assert strip_wrappers("modulation") == "modulation"
    assert strip_wrappers("head.model.weight") == "head.model.weight"


def test_duplicates_after_stripping_are_refused() -> None:
    with pytest.raises(InputError, match=r"file.pt: two tensors are called 'w' without their wrapper prefixes"):
        generator_state({"generator": {"model.w": torch.ones(1), "w": torch.ones(1)}}, False, HERE)


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"critic": {"w": torch.ones(1)}, "step": 7}, "holds no generator: .* Its top level is critic, step"),
        ({"generator": {"w": torch.ones(1), "step": 7}}, "file.pt: 'step' is a int; a tensor is wanted"),
        ({}, "file.pt holds no tensors"),
    ],
)
def test_files_without_a_generator(mapping: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        generator_state(mapping, False, HERE)


# --------------------------------------------------------------------------------------------------------------------
# Filling a module


def meta_module() -> nn.Sequential:
    with torch.device("meta"):
        return nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Linear(5, 2))


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return random_weights({k: list(v.shape) for k, v in module.state_dict().items()}, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loading_casts_and_freezes(dtype: torch.dtype) -> None:
    module = meta_module()
    state = state_of(module)
    load_into(module, state, HERE, dtype, "cpu")
    for name, parameter in module.named_parameters():
        assert parameter.dtype == dtype
        assert not parameter.requires_grad
        assert torch.equal(parameter, state[name].to(dtype))
        assert parameter.data_ptr() != state[name].data_ptr()
    assert module(torch.ones(1, 3, dtype=dtype)).isfinite().all()
    assert len(state) == 6


def test_loading_does_not_keep_the_file(tmp_path: Path) -> None:
    module, path = meta_module(), tmp_path / "x.safetensors"
    save_file(state_of(module), path)
    load_into(module, generator_state(read_tensors(path), False, path), path, torch.float32, "cpu")
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert str(path) not in maps.read_text()
    path.write_bytes(b"\0" * path.stat().st_size)
    assert torch.equal(module[0].weight, state_of(module)["0.weight"])


def test_two_names_of_one_tensor_share_one_copy() -> None:
    with torch.device("meta"):
        module = nn.ModuleDict({"a": nn.Embedding(4, 3), "b": nn.Embedding(4, 3)})
    table = torch.randn(4, 3)
    load_into(module, {"a.weight": table, "b.weight": table}, HERE, torch.bfloat16, "cpu")
    assert module["a"].weight.data_ptr() == module["b"].weight.data_ptr()


def test_a_state_may_be_consumed() -> None:
    module = meta_module()
    state = state_of(module)
    kept = state["0.weight"]
    load_into(module, state, HERE, torch.bfloat16, "cpu", consume=True)
    assert not state
    assert torch.equal(module[0].weight, kept.bfloat16())


def test_the_meta_device_is_a_device() -> None:
    module = meta_module()
    load_into(module, module.state_dict(), HERE, torch.bfloat16, "meta")
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}


def test_differences_are_counted_and_named_before_anything_is_loaded() -> None:
    module = meta_module()
    state = state_of(module)
    for name in ("0.bias", "1.bias"):
        del state[name]
    state["2.weight"] = torch.ones(2, 7)
    state |= {f"extra.{i}": torch.ones(1) for i in range(7)}
    with pytest.raises(InputError) as caught:
        load_into(module, state, HERE, torch.float32, "cpu")
    message = str(caught.value)
    assert "file.pt does not fit Sequential: of its 6 tensors 2 missing: 0.bias, 1.bias; " in message
    assert "7 unexpected: extra.0, extra.1, extra.2, extra.3, extra.4, ... (7 in all); " in message
    assert "1 of another shape: 2.weight (file [2, 7], model [2, 5])" in message
    assert all(parameter.is_meta for parameter in module.parameters())


# --------------------------------------------------------------------------------------------------------------------
# LoRA

SHAPES = dit_shapes(MODEL_CONFIG)


def model_and_lora(rank: int = 4) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return random_weights(SHAPES, generator), lora_weights(SHAPES, rank, generator)


@pytest.mark.parametrize(("alpha", "scale"), [(None, 1.0), (4.0, 1.0), (8.0, 2.0), (1.0, 0.25)])
def test_lora_is_added_in_float32(alpha: float | None, scale: float) -> None:
    state, lora = model_and_lora()
    before = {name: tensor.clone() for name, tensor in state.items()}
    given = dict(state)
    assert merge_lora(state, lora, 4, alpha, HERE) == 3 * 10
    name = "blocks.1.cross_attn.v"
    factors = (lora[f"base_model.model.{name}.lora_{factor}.weight"].double() for factor in "BA")
    wanted = before[f"{name}.weight"].double() + scale * torch.linalg.multi_dot(list(factors))
    torch.testing.assert_close(state[f"{name}.weight"].double(), wanted, rtol=0, atol=1e-6)
    assert torch.equal(state["head.head.weight"], before["head.head.weight"])
    assert_same(given, before)


def test_lora_of_half_precision_files_is_merged_in_float32() -> None:
    state, lora = model_and_lora()
    wanted = dict(state := {name: tensor.bfloat16() for name, tensor in state.items()})
    lora = {name: tensor.bfloat16() for name, tensor in lora.items()}
    merge_lora(state, lora, None, None, HERE)
    name = "blocks.0.ffn.2"
    a, b = (lora[f"base_model.model.{name}.lora_{factor}.weight"].float() for factor in "AB")
    assert state[f"{name}.weight"].dtype == torch.float32
    torch.testing.assert_close(state[f"{name}.weight"], wanted[f"{name}.weight"].float() + b @ a)


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name,
        lambda name: name.replace(".weight", ".default.weight"),
        lambda name: name.removeprefix("base_model.model."),
        lambda name: name.replace("base_model.model.", "base_model.model.model._fsdp_wrapped_module."),
        lambda name: f"model.{name}",
    ],
)
def test_lora_names(rename: object) -> None:
    assert callable(rename)
    state, lora = model_and_lora()
    expected, _ = model_and_lora()
    merge_lora(expected, lora, None, None, HERE)
    assert merge_lora(state, {rename(name): tensor for name, tensor in lora.items()}, None, None, HERE) == 30
    assert_same(state, expected)


def test_lora_container_is_the_generators() -> None:
    state, lora = model_and_lora()
    expected, _ = model_and_lora()
    merge_lora(expected, lora, None, None, HERE)
    other = {name: 2 * tensor for name, tensor in lora.items()}
    merge_lora(state, {"critic_lora": other, "generator_lora": lora, "step": 3}, None, None, HERE)
    assert_same(state, expected)


def only(lora: Mapping[str, Tensor], *parts: str) -> dict[str, object]:
    return {name: tensor for name, tensor in lora.items() if any(part in name for part in parts)}


def test_lora_faults_change_nothing_and_are_named() -> None:
    state, lora = model_and_lora()
    layer = "blocks.0.self_attn.q"
    a, b = f"base_model.model.{layer}.lora_A.weight", f"base_model.model.{layer}.lora_B.weight"
    faults: list[tuple[dict[str, object], int | None, str]] = [
        ({}, None, r"file\.pt: the LoRA touches no layer"),
        ({"generator_lora": {}}, None, "the LoRA touches no layer"),
        ({"critic_lora": lora}, None, "has no generator_lora; it holds critic_lora"),
        (
            {name.replace("blocks.2.", "blocks.9."): tensor for name, tensor in lora.items()},
            None,
            r"names 10 of 30 layers that the model lacks: blocks\.9\.self_attn\.q, .* \(10 in all\)",
        ),
        (only(lora, "lora_A"), None, "30 layers have one LoRA factor without the other.*lora_A alone"),
        ({**lora, a: torch.ones(4, 5)}, None, rf"LoRA of '{layer}' does not fit: lora_A \[4, 5\], lora_B \[64, 4\]"),
        ({**lora, b: torch.ones(64, 3)}, None, rf"LoRA of '{layer}' does not fit: .* weight \[64, 64\]"),
        (dict(lora), 256, r"adapter\.rank is 256, but file\.pt has rank 4"),
        (
            {**lora, "x.lora_magnitude_vector": torch.ones(1)},
            None,
            "names are not known .* x.lora_magnitude_vector. It is DoRA",
        ),
        ({**lora, f"model.{a}": torch.ones(4, 64)}, None, rf"has lora_A of '{layer}' twice"),
    ]
    before = dict(state)
    for mapping, rank, message in faults:
        with pytest.raises(InputError, match=message):
            merge_lora(state, mapping, rank, None, HERE)
        assert all(state[name] is before[name] for name in before)


# --------------------------------------------------------------------------------------------------------------------
# The Diffusers layout


@pytest.fixture(scope="module")
def diffusers_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=16,
        text_dim=32,
        freq_dim=32,
        ffn_dim=128,
        num_layers=3,
        eps=1e-5,
    )
    folder = tmp_path_factory.mktemp("diffusers")
    model.save_pretrained(folder / "transformer")
    return folder


def test_the_diffusers_layout_has_wans_names_and_shapes(diffusers_folder: Path) -> None:
    state = read_generator(diffusers_folder, False)
    assert {name: list(tensor.shape) for name, tensor in state.items()} == SHAPES
    assert set(read_generator(diffusers_folder / "transformer", False)) == set(SHAPES)


def test_every_tensor_of_the_diffusers_layout_is_where_wans_converter_expects_it(diffusers_folder: Path) -> None:
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    there = read_tensors(diffusers_folder / "transformer" / "diffusion_pytorch_model.safetensors")
    back = convert_wan_transformer_to_diffusers(dict(read_generator(diffusers_folder, False)))
    assert_same(there, back)


def test_names_without_counterpart_are_left_to_the_strict_comparison() -> None:
    names = ["condition_embedder.image_embedder.norm1.weight", "blocks.0.attn2.add_k_proj.weight", "blocks.0.what"]
    assert list(to_wan({name: torch.ones(1) for name in names})) == names


def test_the_diffusers_config_is_translated(diffusers_folder: Path) -> None:
    config = read_model_config(diffusers_folder)
    wanted = {k: v for k, v in MODEL_CONFIG.items() if not k.startswith("_") and k != "text_len"} | {"eps": 1e-5}
    assert {key: config[key] for key in wanted} == wanted
    assert config["qk_norm"] is True
    assert read_model_config(diffusers_folder / "transformer") == config


def test_the_native_layout_may_be_sharded(tmp_path: Path) -> None:
    write_shards(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(MODEL_CONFIG))
    assert_same(read_generator(tmp_path, False), TENSORS)
    assert read_model_config(tmp_path) == {k: v for k, v in MODEL_CONFIG.items() if not k.startswith("_")}


def test_shards_without_their_index(tmp_path: Path) -> None:
    write_shards(tmp_path).unlink()
    with pytest.raises(InputError, match=r"diffusion_pytorch_model\.safetensors\.index\.json does not exist"):
        read_generator(tmp_path, False)


def test_an_image_to_video_transformer_is_refused(tmp_path: Path) -> None:
    config = {"num_attention_heads": 12, "attention_head_dim": 128, "num_layers": 30, "image_dim": 1280}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="image_dim is 1280: an image-to-video model"):
        read_model_config(tmp_path)


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    folder = tmp_path / "Wan2.1-T2V-1.3B"
    for read in (lambda path: read_generator(path, False), read_model_config):
        with pytest.raises(InputError, match=re.escape(f"bash hfd.sh Wan-AI/Wan2.1-T2V-1.3B {tmp_path}")):
            read(folder)
