"""Checkpoints outside the published layouts: names, containers, quantisation, and what cannot be read."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.small_checkpoints import (
    MODEL_CONFIG,
    SmallCheckpoints,
    dit_shapes,
    lora_weights,
    random_weights,
    text_encoder_shapes,
    write_safetensors,
    write_small_checkpoints,
)
from utils.errors import InputError, shown
from utils.memory import PeakTracker
from wan.checkpoints.diffusers_layout import diffusers_layer, read_generator, read_model_config
from wan.checkpoints.filling import load_into, loading_bytes
from wan.checkpoints.kinds import require_sizes
from wan.checkpoints.lora import merge_lora
from wan.checkpoints.published import FSDP
from wan.checkpoints.quantisation import expanded
from wan.checkpoints.reading import read_tensors
from wan.checkpoints.state import generator_state, stripped_tensors
from wan.config import ModelConfig
from wan.text import PromptTokenizer, TextEncoder
from wan.transformer.model import CausalWanModel
from wan.vae.modules import VAEConfig
from wan.vae.vae import VAE

STATE = random_weights(dit_shapes(MODEL_CONFIG), torch.Generator().manual_seed(0))
SIZES = ModelConfig.from_mapping(MODEL_CONFIG)
HERE = Path("file.safetensors")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallCheckpoints:
    return write_small_checkpoints(tmp_path_factory.mktemp("checkpoints"))


def prefixed(prefix: str, state: Mapping[str, Tensor] = STATE) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def diffusers_names(state: Mapping[str, Tensor] = STATE) -> dict[str, Tensor]:
    """As Diffusers has them; test_checkpoint.py compares its layout with Diffusers itself."""
    renamed = {}
    for name, tensor in state.items():
        stem, _, leaf = name.rpartition(".")
        modulation = {"modulation": "scale_shift_table"}.get(leaf)
        block = "" if stem == "head" else f"{stem}."
        renamed[f"{block}{modulation}" if modulation else f"{diffusers_layer(stem)}.{leaf}"] = tensor
    return renamed


def save(content: Mapping[str, object], path: Path) -> Path:
    """By torch.save, or as safetensors if all of it is tensors and the name does not end in .pt."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".pt" or not all(isinstance(value, Tensor) for value in content.values()):
        torch.save(dict(content), path)
    else:
        save_file({name: tensor.contiguous() for name, tensor in content.items()}, path)  # type: ignore[attr-defined]
    return path


def assert_is_the_model(found: Mapping[str, Tensor]) -> None:
    assert set(found) == set(STATE)
    assert all(torch.equal(found[name], tensor) for name, tensor in STATE.items())


def fault_of(call: Callable[[], object]) -> str:
    with pytest.raises(InputError) as caught:
        call()
    message = str(caught.value)
    assert "\x1b" not in message and len(message) < 2500
    return message


# --------------------------------------------------------------------------------------------------------------------
# Names and containers of generators


@pytest.mark.parametrize(
    "content",
    [
        diffusers_names(),
        prefixed("transformer.", diffusers_names()),
        prefixed("model.diffusion_model."),
        prefixed("diffusion_model."),
        prefixed("diffusion_model.", diffusers_names()),
        prefixed("module.model._orig_mod."),
        prefixed("_forward_module.generator.model."),
        {name.replace("blocks.1.", "blocks.1._orig_mod.module."): tensor for name, tensor in STATE.items()},
        {
            **prefixed("model.diffusion_model."),
            "vae.decoder.conv1.weight": torch.ones(1),
            "text_encoders.x": torch.ones(1),
        },
        {**prefixed("generator.model."), "critic.model.head.head.bias": torch.ones(5)},
        {"state_dict": {"generator": prefixed("model."), "critic": {"x": torch.ones(1)}}, "step": 3},
        {"module": prefixed("")},
        {"state_dict": prefixed("generator.model."), "epoch": 3},
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
@pytest.mark.parametrize("name", ["x.pt", "x.bin"])
def test_a_generator_under_any_names(tmp_path: Path, content: Mapping[str, object], name: str) -> None:
    assert_is_the_model(read_generator(save(content, tmp_path / name), False))


@pytest.mark.parametrize("prefix", ["", "model.", FSDP])
@pytest.mark.parametrize("container", ["generator_ema", "generator", "model", "state_dict", ""])
@pytest.mark.parametrize("names", [dict, diffusers_names])
def test_published_containers_with_and_without_wrappers(
    tmp_path: Path, container: str, prefix: str, names: Callable[..., dict[str, Tensor]]
) -> None:
    named = prefixed(prefix, names(STATE))
    beside = {"critic": {"x": torch.ones(1)}, "generator_lora": {"y": torch.ones(1)}, "step": 7}
    path = save({container: named, **beside} if container else named, tmp_path / "x.pt")
    assert_is_the_model(read_generator(path, container == "generator_ema"))
    assert_is_the_model(read_generator(path, container != "generator_ema"))  # the one there is


@pytest.mark.parametrize("prefix", ["", "model.", FSDP, "model.diffusion_model."])
def test_shards_of_safetensors_with_wrappers(tmp_path: Path, prefix: str) -> None:
    names = list(STATE)
    files = {name: f"diffusion_pytorch_model-0000{i % 2 + 1}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save(prefixed(prefix, {name: STATE[name] for name in names if files[name] == file}), tmp_path / file)
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {f"{prefix}{name}": file for name, file in files.items()}}))
    assert_is_the_model(read_generator(tmp_path, False))
    assert_is_the_model(read_generator(index, False))


@pytest.mark.parametrize("use_ema", [True, False])
def test_the_average_is_chosen_among_flat_names_and_nested_ones(tmp_path: Path, use_ema: bool) -> None:
    averaged = {name: tensor + 1 for name, tensor in STATE.items()}
    flat = prefixed("generator.model.") | prefixed("generator_ema.model.", averaged)
    nested = {"state_dict": {"generator": dict(STATE), "ema": averaged}}
    for content in (flat, nested):
        found = read_generator(save(content, tmp_path / "x.pt"), use_ema)
        assert torch.equal(found["head.head.bias"], STATE["head.head.bias"] + use_ema)


@pytest.mark.parametrize("name", ["x.ckpt", "x.bin", "x", "x.safetensors", "x.pt", "x.SFT", "x.json"])
def test_the_content_decides_not_the_suffix(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    for write in (save_file, torch.save):
        write(STATE, path)
        assert_is_the_model(read_generator(path, False))
    torch.save(STATE, path, _use_new_zipfile_serialization=False)
    assert_is_the_model(read_generator(path, False))


@pytest.mark.parametrize(
    "name",
    [
        *("model.pt", "model.safetensors", "diffusion_pytorch_model.bin", "pytorch_model.bin", "ema.ckpt", "any.pth"),
        *("transformer/diffusion_pytorch_model.safetensors", "transformer/model.pt"),
    ],
)
def test_folders(tmp_path: Path, name: str) -> None:
    save(STATE, tmp_path / name)
    assert_is_the_model(read_generator(tmp_path, False))


@pytest.mark.parametrize("stem", ["model", "other"])
def test_a_folder_of_shards_beside_other_files(tmp_path: Path, stem: str) -> None:
    names = sorted(STATE)
    parts = [names[:40], names[40:]]
    for i, part in enumerate(parts):
        save(prefixed("model.", {name: STATE[name] for name in part}), tmp_path / f"{stem}-{i}-of-02.bin")
    weight_map = {f"model.{name}": f"{stem}-{i}-of-02.bin" for i, part in enumerate(parts) for name in part}
    (tmp_path / f"{stem}.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_is_the_model(read_generator(tmp_path, False))


def test_the_usual_name_comes_before_others(tmp_path: Path) -> None:
    save({"x": torch.ones(1)}, tmp_path / "Wan2.1_VAE.pth")
    save({"x": torch.ones(1)}, tmp_path / "models_t5.pth")
    assert "Name one of its files: Wan2.1_VAE.pth, models_t5.pth" in fault_of(lambda: read_generator(tmp_path, False))
    save(STATE, tmp_path / "diffusion_pytorch_model.safetensors")
    assert_is_the_model(read_generator(tmp_path, False))


def tar(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        archive.add(Path(__file__), "x")


def zip_of_files(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("folder/\x1b[31mmodel.txt", "x")


def script(path: Path) -> None:
    torch.jit.script(torch.nn.Linear(2, 3)).save(path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (lambda path: path.write_bytes(b"GGUF" + b"\0" * 40), "is a GGUF file"),
        (lambda path: path.write_bytes(b"\0" * 4096), "it begins with zeros: a download that has not finished"),
        (lambda path: path.write_bytes(b"\x1f\x8b" + b"x" * 40), "is a gzip archive; unpack it"),
        (lambda path: path.write_bytes(b"\x89HDF\r\n" + b"x" * 40), "is an HDF5 file"),
        (lambda path: path.write_text('{"dim": 3}'), "is JSON, and no index of shards"),
        (lambda path: path.write_text('{"weight_map": {"a": ["x"]}}'), "is JSON, and no index of shards"),
        (lambda path: path.write_text('{"weight_map": {"a": "../x.pt"}}'), "names a shard outside its folder: ../x.pt"),
        (lambda path: path.write_text(json.dumps({"weight_map": {"a": path.name}})), "no checkpoint but JSON"),
        (tar, "is a tar archive"),
        (zip_of_files, r"is a zip archive, not a file of torch.save; unpack it. It holds folder/\x1b[31mmodel.txt"),
        (script, "is a TorchScript program"),
        (
            lambda path: torch.save(torch.nn.Linear(2, 3), path),
            "needs code to be opened (torch.nn.modules.linear.Linear)",
        ),
        (lambda path: torch.save({"x": STATE}, path, pickle_protocol=4), "pickle protocol 4 or later"),
        (lambda path: path.write_bytes(pickle.dumps({"x": 1})), "pickle protocol 4 or later"),
        (lambda path: torch.save({"x": io.BytesIO}, path), "needs code to be opened (_io.BytesIO)"),
        (lambda path: write_safetensors(path, {"x": ("F6_E2M3", [8])}), "numbers of a type that is not read here"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_cannot_be_read_says_why_and_never_how_to_run_its_code(
    tmp_path: Path, write: Callable[[Path], object], reason: str
) -> None:
    path = tmp_path / "x.safetensors"
    write(path)
    message = fault_of(lambda: read_generator(path, False))
    assert reason in message, message
    assert "weights_only" not in message and "add_safe_globals" not in message and "Re-running" not in message


# --------------------------------------------------------------------------------------------------------------------
# Quantised files


def scaled(state: Mapping[str, Tensor], leaf: str, shape: Callable[[Tensor], list[int]]) -> dict[str, Tensor]:
    """FP8 with a scale beside every matrix of a block: ones, rows or blocks of `shape`."""
    quantised = dict(state)
    for name, weight in state.items():
        if weight.ndim != 2 or "block" not in name or "embedding" in name or "bias" in name:
            continue
        scale = torch.rand(shape(weight)) + 0.5
        factor = expanded(scale, weight.shape)
        assert factor is not None
        quantised[name] = (weight / factor).to(torch.float8_e4m3fn)
        quantised[f"{name.removesuffix('.weight')}.{leaf}"] = scale
    return quantised


KINDS: list[tuple[str, Callable[[Tensor], list[int]]]] = [
    ("scale_weight", lambda weight: []),
    ("scale_weight", lambda weight: [1]),
    ("weight_scale", lambda weight: [weight.shape[0], 1]),
    ("weight_scale", lambda weight: [weight.shape[0]]),
    ("scale_weight", lambda weight: [weight.shape[0], 2, 1]),
    ("weight_scale_inv", lambda weight: [weight.shape[0] // 8, weight.shape[1] // 4]),
]


@pytest.mark.parametrize(("leaf", "shape"), KINDS)
@pytest.mark.parametrize("names", [dict, diffusers_names])
def test_scaled_fp8_is_dequantised(
    tmp_path: Path, leaf: str, shape: Callable[[Tensor], list[int]], names: Callable[..., dict[str, Tensor]]
) -> None:
    extra = {
        "scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn),
        "blocks.0.ffn.0.scale_input": torch.ones([]),
        "blocks.0.ffn.0.comfy_quant": torch.zeros(9, dtype=torch.uint8),
    }
    path = save(prefixed("diffusion_model.", names(scaled(STATE, leaf, shape)) | extra), tmp_path / "x.safetensors")
    with torch.device("meta"):
        model, twin = CausalWanModel(SIZES), CausalWanModel(SIZES)
    state = read_generator(path, False)
    load_into(model, state, path, torch.float32, "cpu")
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, STATE[name], rtol=0.07, atol=0.02)
    half = {name: tensor.to("meta") for name, tensor in state.items()}
    load_into(twin, half, path, torch.bfloat16, "meta")  # as a dry run checks


@pytest.mark.parametrize("scales", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_loading_takes_is_foreseen(scales: bool, dtype: torch.dtype) -> None:
    plain = {f"blocks.{i}.weight": torch.ones(64, 8 * size) for i, size in enumerate((1, 9, 4))}
    state = scaled(plain, "scale_weight", lambda weight: []) if scales else plain
    with torch.device("meta"):
        model = torch.nn.ModuleDict()
        model["blocks"] = torch.nn.Sequential(*(torch.nn.Linear(*w.shape[::-1], bias=False) for w in plain.values()))
    with PeakTracker() as tracker:
        load_into(model, state, HERE, dtype, "cpu")
    at_work = 64 * 72 if scales else 0  # the FP8 numbers of the largest, which a GPU gets too
    assert loading_bytes(state, dtype) == pytest.approx(tracker.peak + at_work, rel=0.01)
    assert loading_bytes(state, dtype) >= dtype.itemsize * sum(weight.numel() for weight in plain.values())


def test_scaled_fp8_in_a_container_with_wrappers(tmp_path: Path) -> None:
    named = prefixed(FSDP, scaled(STATE, "weight_scale", lambda weight: [weight.shape[0], 1]))
    state = read_generator(save({"generator_ema": named}, tmp_path / "x.pt"), True)
    with torch.device("meta"):
        model = CausalWanModel(SIZES)
    load_into(model, state, HERE, torch.float32, "cpu")
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, STATE[name], rtol=0.07, atol=0.02)


def test_a_lora_is_merged_into_what_fp8_means(tmp_path: Path) -> None:
    lora = lora_weights(dit_shapes(MODEL_CONFIG), 4, torch.Generator().manual_seed(1))
    state, plain = scaled(STATE, "scale_weight", lambda weight: []), dict(STATE)
    merge_lora(state, lora, None, None, HERE)
    merge_lora(plain, lora, None, None, HERE)
    assert set(state) == set(STATE)
    torch.testing.assert_close(state["blocks.1.ffn.2.weight"], plain["blocks.1.ffn.2.weight"], rtol=0.07, atol=0.02)


def test_scales_that_do_not_fit(tmp_path: Path) -> None:
    state = dict(STATE) | {"blocks.0.ffn.0.scale_weight": torch.ones(5, 7)}
    with torch.device("meta"):
        model = CausalWanModel(SIZES)
    message = fault_of(lambda: load_into(model, state, HERE, torch.float32, "cpu"))
    assert "1 with scales that do not fit them: blocks.0.ffn.0.weight ([5, 7] for [128, 64])" in message


@pytest.mark.parametrize("names", ["Wan", "transformers"])
def test_a_scaled_text_encoder(tmp_path: Path, small: SmallCheckpoints, names: str) -> None:
    whole = TextEncoder.load(small.text_encoder, small.tokenizer, torch.float32, "cpu")
    state = {name: tensor.float() for name, tensor in torch.load(small.text_encoder, weights_only=True).items()}
    if names == "transformers":
        state = {name: tensor for name, tensor in whole.module.state_dict().items() if "embed_tokens" not in name}
    content = scaled(state, "scale_weight", lambda weight: []) | {
        "spiece_model": torch.zeros(100, dtype=torch.uint8),
        "scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn),
    }
    assert any(tensor.dtype == torch.float8_e4m3fn for name, tensor in content.items() if name.endswith("q.weight"))
    path = save(content, tmp_path / "umt5_xxl_fp8_e4m3fn_scaled.safetensors")
    found = TextEncoder.load(path, small.tokenizer, torch.float32, "cpu").encode(["A cat runs."])[0]
    wanted = whole.encode(["A cat runs."])[0]
    assert (found - wanted).abs().mean() < 0.1 * wanted.abs().mean()
    TextEncoder.load(path, small.tokenizer, torch.bfloat16, "meta")


def test_a_scaled_embedding_has_its_scale_under_both_names(tmp_path: Path, small: SmallCheckpoints) -> None:
    state = torch.load(small.text_encoder, weights_only=True)
    table = state["token_embedding.weight"].float()
    content = {**state, "token_embedding.weight": (table / 4).to(torch.float8_e4m3fn)}
    path = save({**content, "token_embedding.weight_scale": torch.tensor(4.0)}, tmp_path / "x.safetensors")
    module = TextEncoder.load(path, small.tokenizer, torch.float32, "cpu").module
    torch.testing.assert_close(module.get_parameter("shared.weight"), table, rtol=0.07, atol=0.02)


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        (
            {"ffn.0.weight": ("I8", [128, 64]), "ffn.0.weight_scale": ("F32", [128, 1])},
            ["int8 numbers", "int8 with scales"],
        ),
        ({"ffn.0.weight": ("U8", [4096, 1]), "ffn.0.weight.absmax": ("F32", [64])}, ["uint8", "bitsandbytes"]),
        (
            {"ffn.0.weight": ("U8", [9, 1]), "ffn.0.weight.quant_state.bitsandbytes__nf4": ("U8", [9])},
            ["uint8", "NF4 of bitsandbytes"],
        ),
        ({"ffn.0.weight": ("I8", [128, 64]), "ffn.0.SCB": ("F32", [128])}, ["int8", "INT8 of bitsandbytes"]),
        ({"ffn.0.qweight": ("I32", [8, 64]), "ffn.0.qzeros": ("I32", [1, 8])}, ["int32", "GPTQ or AWQ"]),
        (
            {
                "ffn.0.weight": ("U8", [128, 32]),
                "ffn.0.weight_scale": ("F8_E4M3", [128, 4]),
                "ffn.0.weight_scale_2": ("F32", []),
            },
            ["uint8", "NVFP4"],
        ),
        (
            {"ffn.0.weight": ("F8_E4M3", [128, 64]), "ffn.0.weight_scale": ("U8", [128, 2])},
            ["uint8", "MXFP8"],
        ),
        ({"ffn.0.weight": ("F4", [128, 64]), "ffn.0.weight_scale": ("F32", [])}, ["float4", "float4"]),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_other_quantisations_are_named(
    tmp_path: Path, tensors: dict[str, tuple[str, list[int]]], told: list[str]
) -> None:
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"head.weight": ("BF16", [4, 4])} | {f"blocks.0.{name}": t for name, t in tensors.items()})
    message = fault_of(lambda: read_generator(path, False))
    assert all(word in message for word in told), message
    assert "cannot be weights" in message and "The file is quantised" in message
    assert "Take a file in bf16, fp16, fp32 or FP8." in message


# --------------------------------------------------------------------------------------------------------------------
# Numbers that cannot be weights


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: torch.ones(5, dtype=torch.int8), "holds int8 numbers"),
        (lambda: torch.ones(5, dtype=torch.uint8), "holds uint8 numbers"),
        (lambda: torch.ones(5, dtype=torch.int64), "holds int64 numbers"),
        (lambda: torch.ones(5, dtype=torch.bool), "holds bool numbers"),
        (lambda: torch.ones(5, dtype=torch.complex64), "holds complex64 numbers"),
        (lambda: torch.quantize_per_tensor(torch.ones(5), 0.1, 0, torch.qint8), "holds qint8 numbers"),
        (lambda: torch.eye(5).to_sparse(), "is sparse_coo, not dense"),
        (lambda: torch.eye(5).to_sparse_csr(), "is sparse_csr, not dense"),
        (lambda: torch.empty(5, device="meta"), "has no numbers (it was saved from the meta device)"),
    ],
    ids=[*("int8", "uint8", "int64", "bool", "complex", "quantised", "sparse", "CSR", "meta")],
)
@pytest.mark.parametrize("part", ["generator", "VAE", "text encoder"])
def test_tensors_that_cannot_be_weights(
    tmp_path: Path, small: SmallCheckpoints, make: Callable[[], Tensor], told: str, part: str
) -> None:
    path = tmp_path / "x.pt"
    whole = {"generator": small.transformer, "VAE": small.vae, "text encoder": small.text_encoder}[part]
    state = dict(read_tensors(whole))
    name = next(iter(state))
    torch.save({**state, name: make()}, path)
    load = {
        "generator": lambda: read_generator(path, False),
        "VAE": lambda: VAE.load(path, torch.float32, "meta"),
        "text encoder": lambda: TextEncoder.load(path, small.tokenizer, torch.float32, "meta"),
    }
    assert f"{path}: tensor '{name}' {told}" in fault_of(load[part])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_no_numbers(value: float, dtype: torch.dtype) -> None:
    state = {name: tensor.clone() for name, tensor in STATE.items()}
    state["blocks.2.ffn.0.weight"][100, 3] = value
    with torch.device("meta"):
        model = CausalWanModel(SIZES)
    message = fault_of(lambda: load_into(model, state, HERE, dtype, "cpu"))
    assert "file.safetensors: the weights 'blocks.2.ffn.0.weight' hold infinities or NaN" in message
    assert all(parameter.is_meta for parameter in model.parameters())


def test_large_weights_are_numbers() -> None:
    module = torch.nn.Linear(4, 4, bias=False, device="meta")
    load_into(module, {"weight": torch.full((4, 4), 3e38)}, HERE, torch.float32, "cpu")


# --------------------------------------------------------------------------------------------------------------------
# Absurd sizes and hostile text


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_layers", 10_000_000),
        ("dim", 10**12),
        ("ffn_dim", 2**62),
        ("text_len", 10**9),
        ("num_layers", 300),
    ],
)
def test_absurd_sizes_are_refused(key: str, value: object) -> None:
    message = fault_of(lambda: ModelConfig.from_mapping({**MODEL_CONFIG, key: value}))
    assert f"model.{key}: must be at most" in message


@pytest.mark.parametrize(("key", "value"), [("patch_size", [2, 2, 2]), ("patch_size", [1, 4, 4]), ("freq_dim", 3)])
def test_sizes_that_cannot_be_run_are_refused(key: str, value: object) -> None:
    assert f"model.{key}: must be " in fault_of(lambda: ModelConfig.from_mapping({**MODEL_CONFIG, key: value}))


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("num_layers", 250, "num_layers is 250 there and 3 in the file"),
        ("dim", 128, "dim is 128 there and 64 in the file"),
        ("ffn_dim", 256, "ffn_dim is 256 there and 128 in the file"),
        ("text_dim", 64, "text_dim is 64 there and 32 in the file"),
        ("out_dim", 32, "out_dim is 32 there and 16 in the file"),
    ],
)
def test_sizes_are_compared_with_the_file_before_a_model_is_built(key: str, value: int, told: str) -> None:
    sizes = ModelConfig.from_mapping({**MODEL_CONFIG, key: value})
    message = fault_of(lambda: require_sizes(STATE, sizes, HERE, "folder/config.json"))
    assert f"file.safetensors does not fit folder/config.json: {told}" in message
    require_sizes(STATE, SIZES, HERE, "folder/config.json")


def test_files_of_other_models_are_called_that(small: SmallCheckpoints) -> None:
    image = {**STATE, "img_emb.proj.0.weight": torch.ones(4)}
    states = [
        (image, "image to video"),
        (read_tensors(small.vae), "a VAE"),
        (read_tensors(small.text_encoder), "a text"),
    ]
    for state, told in states:
        message = fault_of(lambda state=state: require_sizes(state, SIZES, HERE, "config.json"))
        assert f"file.safetensors is of another model ({told}" in message


def test_what_is_neither_a_file_nor_a_folder(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for read in (lambda path: read_generator(path, False), read_tensors):
        assert "pipe is neither a file nor a folder" in fault_of(lambda read=read: read(tmp_path / "pipe"))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("[" * 100_000, "config.json is nested too deeply to be read"),
        ('{"a":' * 50_000 + "1" + "}" * 50_000, "config.json is nested too deeply to be read"),
        ('{"dim": ' + "9" * 10_000 + "}", "config.json is not valid JSON"),
        ('{"attention_head_dim": "x", "num_attention_heads": 3, "num_layers": 1}', "must be there as integers"),
        ('{"attention_head_dim": 8, "num_attention_heads": 3}', "must be there as integers"),
    ],
    ids=["list", "object", "digits", "text", "absent"],
)
def test_hostile_configurations(tmp_path: Path, content: str, told: str) -> None:
    (tmp_path / "config.json").write_text(content)
    assert told in fault_of(lambda: read_model_config(tmp_path))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_files_of_any_size_are_not_read(tmp_path: Path, name: str) -> None:
    with (tmp_path / name).open("wb") as file:
        file.write(b'{"dim": ')
        file.truncate(1 << 40)  # sparse
    read = read_model_config if name == "config.json" else PromptTokenizer.load
    assert f"{name} has {1 << 40} bytes; no file of its kind has more than" in fault_of(lambda: read(tmp_path))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"base_dim": 10**9}, "is no Wan 2.1 VAE: it has widths"),
        ({"dim_mult": [1, 2]}, "is no Wan 2.1 VAE"),
        ({"num_res_blocks": 10**7}, "is no Wan 2.1 VAE"),
        ({"dim_mult": "abc"}, "dim_mult: expected a list"),
        ({"z_dim": "16"}, "z_dim: expected an integer"),
    ],
)
def test_vae_configurations(change: dict[str, object], told: str) -> None:
    assert told in fault_of(lambda: VAEConfig.from_mapping(change, HERE))


def test_a_tokenizer_whose_ids_have_gaps_counts_its_largest(tmp_path: Path, small: SmallCheckpoints) -> None:
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({"</s>": 0, "<pad>": 1, "a": 999_999}, unk_token="a")).save(
        str(tmp_path / "tokenizer.json")
    )
    message = fault_of(lambda: TextEncoder.load(small.text_encoder, tmp_path, torch.float32, "meta"))
    assert "has 1000000 tokens and" in message


def test_names_in_messages_are_escaped_and_cut(tmp_path: Path) -> None:
    assert shown("a\nb\x1b[31m\udc80é") == r"a\nb\x1b[31m\udc80é"
    assert shown("x" * 1000, 20) == f"{'x' * 11}...{'x' * 6}"
    long = "y" * 10_000
    with torch.device("meta"):
        model = CausalWanModel(SIZES)
    state = dict(STATE) | {"evil\x1b[31m\nname": torch.ones(1), long: torch.ones(1)}
    message = fault_of(lambda: load_into(model, state, HERE, torch.float32, "cpu"))
    assert r"evil\x1b[31m\nname" in message and long not in message
    for mapping in ({"x\x1b": 3}, {f"{long}\x1b": torch.ones(1, dtype=torch.int8)}, {"\x1b": {"a": 1}}, {long: {}}):
        fault_of(lambda mapping=mapping: generator_state(mapping, False, Path("\x1b.pt")))
    fault_of(lambda: stripped_tensors({"model.\x1b": torch.ones(1), "\x1b": torch.ones(1)}, HERE))


def test_the_text_encoder_of_another_kind_of_t5(tmp_path: Path, small: SmallCheckpoints) -> None:
    shapes = text_encoder_shapes(9, 8)
    shapes["blocks.0.pos_embedding.embedding.weight"] = [0]
    path = save(random_weights(shapes, torch.Generator()), tmp_path / "x.pt")
    assert "is not a UMT5 encoder" in fault_of(lambda: TextEncoder.load(path, small.tokenizer, torch.float32, "meta"))
