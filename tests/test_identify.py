"""`python -m wan.checkpoints.identify` on small files in every layout."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.small_checkpoints import (
    KEYS_FILE,
    MODEL_CONFIG,
    SmallCheckpoints,
    dit_shapes,
    lora_weights,
    preview_shapes,
    random_weights,
    write_safetensors,
    write_small_checkpoints,
)
from tests.test_checkpoint_layouts import STATE, diffusers_names, prefixed, save, scaled
from utils.errors import InputError
from wan.checkpoints.identify import describe, main

FULL = json.loads(KEYS_FILE.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallCheckpoints:
    return write_small_checkpoints(tmp_path_factory.mktemp("checkpoints"))


def said(path: Path) -> str:
    return "\n".join(describe(path))


def of_full_size(path: Path, key: str, prefix: str = "", kind: str = "BF16") -> Path:
    """A published file's names and shapes, sparse: of its size, and without a number."""
    write_safetensors(path, {f"{prefix}{name}": (kind, shape) for name, shape in FULL[key].items()})
    return path


@pytest.mark.parametrize(
    ("key", "told"),
    [
        (
            "wan21_t2v_1_3b_dit",
            [
                "transformer (DiT), Wan 2.1 1.3B, 30 layers, 12 heads of 128, width 1536, feed-forward 8960; text",
            ],
        ),
        ("wan21_vae_pth", ["VAE, Wan 2.1's, width 96, latent channels 16", "setting: vae_ckpt: "]),
        (
            "umt5_xxl_enc_bf16_pth",
            ["text encoder, UMT5-XXL, layers 24, tokens 256384, width 4096", "text_encoder_ckpt: "],
        ),
    ],
)
def test_published_files_of_full_size_are_told_by_their_headers(tmp_path: Path, key: str, told: list[str]) -> None:
    text = said(of_full_size(tmp_path / "no-suffix", key))
    assert all(part in text for part in told), text
    assert "bfloat16 (" in text and "missing: nothing" in text and "container: safetensors" in text


@pytest.mark.parametrize(
    ("file", "told"),
    [
        ("transformer", ["3 layers, 4 heads (config.json beside it), width 64", "names: Wan", "missing: nothing"]),
        ("model_folder", ["found: ", "diffusion_pytorch_model.safetensors"]),
        ("vae", ["VAE, of no published size, width 8", "container: PyTorch zip"]),
        ("text_encoder", ["layers 2", "bfloat16 (22 tensors)", "needs: tokenizer.json"]),
        ("self_forcing", ["each after model., in generator_ema", "published as: Self-Forcing,", "with use_ema: true"]),
        ("longlive_base", ["each after model., in generator", "configs/longlive_vbench.yaml", "generator_ckpt: "]),
        ("causal_framewise", ["model._fsdp_wrapped_module.", "published as: Causal Forcing, frame-wise"]),
        (
            "longlive_lora",
            [
                "names: peft, in generator_lora",
                "3 layers and width 64",
                "rank: 4",
                "alpha: 4 (not said",
                "LongLive, by",
                "lora_ckpt: ",
            ],
        ),
    ],
)
def test_the_small_set(small: SmallCheckpoints, file: str, told: list[str]) -> None:
    text = said(getattr(small, file))
    assert all(part in text for part in told), text


def write_lora(path: Path, prefix: str = "diffusion_model.", alpha: float | None = None) -> Path:
    lora = lora_weights(dit_shapes(MODEL_CONFIG), 4, torch.Generator().manual_seed(1))
    content = {name.replace("base_model.model.", prefix): tensor for name, tensor in lora.items()}
    if prefix == "lora_unet_":
        content = {}
        for name, tensor in lora.items():
            layer, _, rest = name.removeprefix("base_model.model.").partition(".lora_")
            flat = layer.replace(".", "_")
            content[f"lora_unet_{flat}.lora_{'down' if rest[0] == 'A' else 'up'}.weight"] = tensor
            if alpha is not None:
                content[f"lora_unet_{flat}.alpha"] = torch.tensor(alpha)
    return save(content, path)


def test_other_layouts(tmp_path: Path) -> None:
    bf16 = {name: tensor.bfloat16() for name, tensor in STATE.items()}
    cases = {
        "diffusers": (diffusers_names(), ["names: Diffusers", "missing: nothing"]),
        "comfy": (prefixed("model.diffusion_model."), ["each after model.diffusion_model.", "ComfyUI's checkpoints"]),
        "both.pt": (
            {"generator": bf16, "generator_ema": dict(STATE)},
            ["bfloat16 (96", "in generator_ema", "float32 (96"],
        ),
        "nested.pt": ({"state_dict": {"generator": bf16}}, ["in state_dict / generator"]),
        "fp8": (
            scaled(STATE, "scale_weight", lambda weight: []),
            ["FP8 (e4m3fn) with scales; read here", "generator_ckpt"],
        ),
        "part": (
            {n: t for n, t in STATE.items() if "head.head" not in n},
            ["missing: head.head.weight", "none takes it"],
        ),
        "more": ({**STATE, "a\x1b": torch.ones(1)}, [r"unexpected: a\x1b", "none takes it"]),
        "i2v": (
            {**STATE, "img_emb.proj.0.weight": torch.ones(4)},
            ["; image to video", "none takes it (image to video)"],
        ),
        "preview": (
            random_weights(preview_shapes(), torch.Generator()),
            ["preview decoder, taew2_1", "decoder: taehv:"],
        ),
        "odd.pt": ({"critic": {"x": torch.ones(1)}}, ["what: unknown"]),
        "else": ({"x": torch.ones(1)}, ["what: unknown; 1 tensors: x"]),
    }
    for name, (content, told) in cases.items():
        text = said(save(content, tmp_path / name))
        assert all(part in text for part in told), text
        assert "\x1b" not in text


def test_a_file_of_several_models(tmp_path: Path) -> None:
    shapes = {f"model.diffusion_model.{name}": shape for name, shape in FULL["wan21_t2v_1_3b_dit"].items()}
    shapes |= {f"vae.{name}": shape for name, shape in FULL["wan21_vae_pth"].items()}
    shapes |= {
        f"text_encoders.umt5xxl.transformer.{name}": shape for name, shape in FULL["umt5_xxl_enc_bf16_pth"].items()
    }
    write_safetensors(tmp_path / "all", {name: ("F16", shape) for name, shape in shapes.items()})
    text = said(tmp_path / "all")
    assert "Wan 2.1 1.3B" in text and "UMT5-XXL" in text and "VAE, Wan 2.1's" in text
    assert text.count("missing: nothing") == 3


def test_loras(tmp_path: Path) -> None:
    assert "names: ComfyUI" in said(write_lora(tmp_path / "comfy"))
    text = said(write_lora(tmp_path / "kohya", "lora_unet_", 2.0))
    assert "names: kohya" in text and "alpha: 2 (in every layer); B·A times 0.5" in text
    (tmp_path / "peft").mkdir()
    path = write_lora(tmp_path / "peft" / "adapter_model.safetensors", "base_model.model.")
    (path.parent / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 8}))
    text = said(path.parent)
    assert "alpha: 8 (in adapter_config.json); B·A times 2" in text and "found: " in text
    save_file({f"{i}.lora_A.weight": torch.ones(1, 1) for i in range(2)}, tmp_path / "other")
    assert "fault: " in said(tmp_path / "other") and "does not fit a text-to-video" in said(tmp_path / "other")


def gguf(path: Path) -> None:
    def text(value: str) -> bytes:
        return len(value.encode()).to_bytes(8, "little") + value.encode()

    def number(value: int, size: int) -> bytes:
        return value.to_bytes(size, "little")

    settings = text("general.architecture") + number(8, 4) + text("wan")
    settings += text("some.list") + number(9, 4) + number(4, 4) + number(2, 8) + number(1, 4) * 2
    settings += text("some.number") + number(6, 4) + number(0, 4)
    tensors = b""
    for name, shape in FULL["wan21_t2v_1_3b_dit"].items():
        kind = 12 if len(shape) == 2 else 0
        tensors += text(name) + number(len(shape), 4) + b"".join(number(size, 8) for size in reversed(shape))
        tensors += number(kind, 4) + number(0, 8)
    head = b"GGUF" + number(3, 4) + number(len(FULL["wan21_t2v_1_3b_dit"]), 8) + number(3, 8)
    path.write_bytes(head + settings + tensors)


def test_gguf(tmp_path: Path) -> None:
    gguf(tmp_path / "x.gguf")
    text = said(tmp_path / "x.gguf")
    assert "container: GGUF" in text and "Wan 2.1 1.3B" in text
    assert "GGUF Q4_K; not read here" in text and "none takes it (the quantisation is not read here)" in text
    whole = (tmp_path / "x.gguf").read_bytes()
    for content in (whole[:100], b"GGUF" + b"\xff" * 60, whole[:24] + b"\xff" * 60):
        (tmp_path / "bad").write_bytes(content)
        with pytest.raises(InputError, match="bad"):
            describe(tmp_path / "bad")


def test_shards_and_truncated_files(tmp_path: Path) -> None:
    path = of_full_size(tmp_path / "cut.safetensors", "wan21_vae_pth")
    with path.open("rb+") as file:
        file.truncate(100_000)
    assert "fault: the file has 100000 bytes, its header promises" in said(path)
    names = list(STATE)
    weight_map = {name: f"model-{i % 3}.safetensors" for i, name in enumerate(names)}
    for i in range(2):
        save({name: STATE[name] for name in names[i::3]}, tmp_path / f"model-{i}.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    text = said(tmp_path)
    assert "3 shards with their index" in text and "1 of 3 shards are not there" in text and "none takes it" in text


@pytest.mark.parametrize(
    "header",
    [
        b"[1]",
        b'{"x": 3}',
        b'{"x": {"dtype": "F32", "shape": ["a"]}}',
        b'{"x": {"dtype": [], "shape": [1]}}',
        b"{" * 90_000,
    ],
)
def test_headers_that_make_no_sense(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "x"
    path.write_bytes(len(header).to_bytes(8, "little") + (header if header[:1] == b"{" else b"{" + header[1:]))
    with pytest.raises(InputError, match="its header makes no sense"):
        describe(path)


def test_the_command_line(small: SmallCheckpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = tmp_path / "missing.pt"
    lines: list[str] = []
    assert main([str(small.vae), str(missing), str(small.longlive_lora)], lines.append) == 2
    assert len(lines) == 2 and lines[1].startswith(str(small.longlive_lora))
    assert capsys.readouterr().err.startswith(f"error: {missing} does not exist.")
    command = [sys.executable, "-m", "wan.checkpoints.identify", str(small.vae)]
    result = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True)
    assert result.stdout.startswith(str(small.vae)) and not result.stderr
