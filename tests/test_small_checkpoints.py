"""The small checkpoints have the layouts of the published ones and go through the loaders."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.small_checkpoints import (
    KEYS_FILE,
    SmallCheckpoints,
    dit_shapes,
    main,
    vae_shapes,
    write_small_checkpoints,
)
from wan.checkpoints.diffusers_layout import read_generator, read_model_config
from wan.checkpoints.lora import merge_lora
from wan.checkpoints.reading import read_tensors
from wan.text import TextEncoder
from wan.vae.vae import VAE

FULL = json.loads(KEYS_FILE.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallCheckpoints:
    return write_small_checkpoints(tmp_path_factory.mktemp("checkpoints"))


def test_the_shapes_are_those_of_the_published_files_when_scaled_up() -> None:
    full = {"dim": 1536, "ffn_dim": 8960, "freq_dim": 256, "in_dim": 16, "out_dim": 16, "num_layers": 30}
    assert dit_shapes({**full, "text_dim": 4096}) == FULL["wan21_t2v_1_3b_dit"]
    assert vae_shapes(96) == FULL["wan21_vae_pth"]


def test_every_generator_has_the_models_names(small: SmallCheckpoints) -> None:
    config = read_model_config(small.model_folder)
    shapes = dit_shapes(config)
    files = [
        small.model_folder,
        small.self_forcing,
        small.longlive_base,
        small.causal_chunkwise,
        small.causal_framewise,
    ]
    states = [read_generator(path, False) for path in files]
    for state in states:
        assert {name: list(tensor.shape) for name, tensor in state.items()} == shapes
    heads = [state["head.head.weight"] for state in states]
    assert all(not torch.equal(heads[0], head) for head in heads[1:])


def test_the_containers_are_those_of_the_published_files(small: SmallCheckpoints) -> None:
    assert list(read_tensors(small.self_forcing)) == ["generator_ema"]
    assert list(read_tensors(small.longlive_base)) == ["generator"]
    assert list(read_tensors(small.longlive_lora)) == ["generator_lora", "critic_lora"]
    framewise = read_tensors(small.causal_framewise)["generator_ema"]
    assert isinstance(framewise, dict)
    assert all(name.startswith("model._fsdp_wrapped_module.") for name in framewise)


def test_the_lora_merges_into_the_base(small: SmallCheckpoints) -> None:
    state = read_generator(small.longlive_base, False)
    before = dict(state)
    assert merge_lora(state, read_tensors(small.longlive_lora), 4, 4.0, small.longlive_lora) == 30
    assert all(tensor.isfinite().all() for tensor in state.values())
    assert sum(not torch.equal(state[name], before[name]) for name in state) == 30


def test_the_text_encoder_tells_prompts_apart(small: SmallCheckpoints) -> None:
    encoder = TextEncoder.load(small.text_encoder, small.tokenizer, torch.float32, "cpu")
    first, second = encoder.encode(["A golden dog is running.", "A woman walking at night."])
    assert first.shape[1] == second.shape[1] == small.config["text_dim"]
    assert (first[0] - second[0]).abs().mean() > 0.01


def test_the_tokenizer_loses_nothing(small: SmallCheckpoints) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(small.tokenizer, local_files_only=True)
    for text in ("A golden dog, 4 years old!", "日本語 and émoji 🦊", "x"):
        ids = tokenizer(text).input_ids
        assert ids[-1] == 1
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert len(tokenizer("The camera is moving through the forest at sunset.").input_ids) < 20


def test_decoded_noise_is_a_picture(small: SmallCheckpoints) -> None:
    vae = VAE.load(small.vae, torch.float32, "cpu")
    latents = torch.randn(1, 2, 16, 4, 6, generator=torch.Generator().manual_seed(0))
    video = vae.decoder().decode(latents)
    assert video.isfinite().all()
    assert video.std(dim=(-2, -1)).min() > 0.05
    assert (video.abs() == 1).float().mean() < 0.5


def test_a_seed_is_a_set_of_weights(small: SmallCheckpoints, tmp_path: Path) -> None:
    again, other = write_small_checkpoints(tmp_path / "a", seed=0), write_small_checkpoints(tmp_path / "b", seed=1)
    assert again.transformer.read_bytes() == small.transformer.read_bytes()
    assert other.transformer.read_bytes() != small.transformer.read_bytes()


def test_the_rank_is_a_parameter(tmp_path: Path) -> None:
    lines: list[str] = []
    assert main([str(tmp_path), "--lora_rank", "2"], lines.append) == 0
    assert "lora.pt" in lines[0]
    lora = read_tensors(tmp_path / "LongLive-1.3B" / "models" / "lora.pt")["generator_lora"]
    assert isinstance(lora, dict)
    assert lora["base_model.model.blocks.0.self_attn.q.lora_A.weight"].shape[0] == 2


def test_the_command_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.small_checkpoints", str(tmp_path / "x")]
    result = subprocess.run(
        command, cwd=Path(__file__).resolve().parents[1], capture_output=True, text=True, check=True
    )
    assert "diffusion_pytorch_model.safetensors" in result.stdout
    assert (tmp_path / "x" / "Wan2.1-T2V-1.3B" / "Wan2.1_VAE.pth").is_file()
