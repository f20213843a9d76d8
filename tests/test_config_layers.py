"""Ranges and defaults of the model's and of Dummy Forcing's own settings (wan/config.py, dummy/config.py)."""

from __future__ import annotations

import pytest

from dummy.config import DummyForcingConfig, HeadRetentions, RetentionConfig
from utils.config import build
from utils.errors import InputError
from wan.config import WAN_1_3B, WAN_14B, ModelConfig


def test_presets_are_the_published_sizes() -> None:
    assert (WAN_1_3B.dim, WAN_1_3B.ffn_dim, WAN_1_3B.num_heads, WAN_1_3B.num_layers) == (1536, 8960, 12, 30)
    assert (WAN_14B.dim, WAN_14B.ffn_dim, WAN_14B.num_heads, WAN_14B.num_layers) == (5120, 13824, 40, 40)
    assert WAN_1_3B.head_dim == WAN_14B.head_dim == 128
    assert (WAN_1_3B.text_dim, WAN_1_3B.freq_dim, WAN_1_3B.text_len, WAN_1_3B.patch_size) == (4096, 256, 512, (1, 2, 2))


def test_config_json_of_wan_and_of_diffusers_give_the_preset() -> None:
    wan = {
        "_class_name": "WanModel",
        "_diffusers_version": "0.30.0",
        "dim": 1536,
        "eps": 1e-06,
        "ffn_dim": 8960,
        "freq_dim": 256,
        "in_dim": 16,
        "model_type": "t2v",
        "num_heads": 12,
        "num_layers": 30,
        "out_dim": 16,
        "text_len": 512,
    }
    diffusers = {
        "_class_name": "WanTransformer3DModel",
        "added_kv_proj_dim": None,
        "attention_head_dim": 128,
        "cross_attn_norm": True,
        "eps": 1e-06,
        "ffn_dim": 8960,
        "freq_dim": 256,
        "image_dim": None,
        "in_channels": 16,
        "num_attention_heads": 12,
        "num_layers": 30,
        "out_channels": 16,
        "patch_size": [1, 2, 2],
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 1024,
        "text_dim": 4096,
    }
    assert ModelConfig.from_mapping(wan) == ModelConfig.from_mapping(diffusers) == WAN_1_3B


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model_type": "i2v"}, "config.json.model_type: got 'i2v'; only text-to-video models (t2v) are supported"),
        ({"added_kv_proj_dim": 64}, "got an image-to-video transformer"),
        ({"qk_norm": False}, "config.json.qk_norm: got False; only models with qk_norm are supported"),
        ({"cross_attn_norm": False}, "config.json.cross_attn_norm: got False"),
        ({"num_layers": "2"}, "config.json.num_layers: expected an integer, got the text '2'"),
        ({"num_heads": 5}, "model.dim: 24 is not divisible by num_heads 5"),
        ({"num_heads": 8}, "model.dim: 24 / num_heads 8 gives the odd head width 3"),
        ({"num_layers": 0}, "model.num_layers: must be positive, got 0"),
        ({"patch_size": [1, 0, 2]}, "model.patch_size: must be positive, got (1, 0, 2)"),
    ],
)
def test_models_that_cannot_run_are_refused(changes: dict[str, object], expected: str) -> None:
    sizes: dict[str, object] = {"dim": 24, "ffn_dim": 48, "num_heads": 2, "num_layers": 1}
    assert ModelConfig.from_mapping(sizes).head_dim == 12
    with pytest.raises(InputError) as caught:
        ModelConfig.from_mapping({**sizes, **changes}, "config.json")
    assert expected in str(caught.value)


def test_a_size_left_out_of_config_json_is_named() -> None:
    with pytest.raises(InputError, match=r"^model\.ffn_dim: missing, expected an integer$"):
        ModelConfig.from_mapping({"dim": 24, "num_heads": 2, "num_layers": 1})


def test_retentions_default_to_the_paper_one_by_one() -> None:
    assert DummyForcingConfig(local_context_length=2).retentions(3) == HeadRetentions((1, 0), (0, 6), (0, 1))
    partial = DummyForcingConfig(retention=RetentionConfig(sink=(3, 1)))
    assert partial.retentions(1) == HeadRetentions((3, 1), (0, 1), (0, 1))
    forgetful = DummyForcingConfig(retention=RetentionConfig(neighbor=(0, 0), dummy=(0, 0)))
    assert forgetful.retentions(3) == HeadRetentions((1, 0), (0, 0), (0, 0))


def test_retention_is_read_from_yaml_in_part() -> None:
    config = build(DummyForcingConfig, {"retention": {"dummy": [1, 2]}})
    assert config.retentions(3) == HeadRetentions((1, 0), (0, 3), (1, 2))


def test_a_disabled_section_is_not_looked_at() -> None:
    assert not DummyForcingConfig(enabled=False, denoise_start=3, num_dummy=-1).enabled
