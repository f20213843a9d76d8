"""The text encoder against the conformance vector and transformers itself; tokens, cleaning, padding."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.small_checkpoints import SmallCheckpoints, small_tokenizer, write_small_checkpoints
from utils.errors import InputError
from wan.checkpoints.text_names import to_transformers
from wan.text import PromptTokenizer, TextEncoder, clean_prompt, encoder_bytes, infer_config, load_encoder, pad

DATA = Path(__file__).parent / "data"
HERE = Path("file.pth")


@pytest.fixture(scope="module")
def vector() -> dict[str, Tensor]:
    return load_file(DATA / "vectors" / "text_encoder.safetensors")


@pytest.fixture(scope="module")
def weights(vector: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("weights."): t for name, t in vector.items() if name.startswith("weights.")}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallCheckpoints:
    return write_small_checkpoints(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="module")
def encoder(small: SmallCheckpoints) -> TextEncoder:
    return TextEncoder.load(small.text_encoder, small.tokenizer, torch.float32, "cpu")


@pytest.fixture(scope="module")
def tokenizer(small: SmallCheckpoints) -> PromptTokenizer:
    return PromptTokenizer.load(small.tokenizer)


# --------------------------------------------------------------------------------------------------------------------
# Cleaning and tokens


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("  A  cat\t and\n a dog  ", "A cat and a dog"),
        ("Tom &amp;amp; Jerry", "Tom & Jerry"),
        ("<i>Tom &amp;amp; Jerry</i>", "<i>Tom & Jerry</i>"),  # ftfy leaves entities beside tags alone
        ("&lt;b&gt;bold&lt;/b&gt;", "<b>bold</b>"),
        ("cafÃ© au lait", "café au lait"),
        ("â€œquotedâ€\x9d", '"quoted"'),
        ("no&nbsp;break", "no break"),
        ("日本語　の　町", "日本語 の 町"),
        ("", ""),
    ],
)
def test_cleaning(text: str, clean: str) -> None:
    assert clean_prompt(text) == clean


def test_every_row_has_exactly_max_length_ids(tokenizer: PromptTokenizer) -> None:
    ids, mask = tokenizer(["A dog.", ""])
    assert ids.shape == mask.shape == (2, 512)
    assert ids.dtype == mask.dtype == torch.int64
    for row, keep in zip(ids, mask, strict=True):
        length = int(keep.sum())
        assert row[length - 1] == 1
        assert keep[:length].all()
        assert not row[length:].any()
    assert int(mask[1].sum()) == 1


def test_tokens_are_those_of_transformers(small: SmallCheckpoints, tokenizer: PromptTokenizer) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(small.tokenizer, local_files_only=True)
    prompts = ["A golden dog is running through the snow, 8 people looking on.", "日本語 🦊", "word " * 700]
    batch = theirs(prompts, padding="max_length", truncation=True, max_length=512, return_tensors="pt")
    ids, mask = tokenizer(prompts)
    assert torch.equal(ids, batch.input_ids)
    assert torch.equal(mask, batch.attention_mask)


def test_a_cut_prompt_keeps_its_end_and_warns_once(
    tokenizer: PromptTokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        ids, mask = tokenizer(["a " * 600, "a short one"])
    assert ids[0, -1] == 1
    assert mask[0].all()
    assert len(caplog.records) == 1
    assert "A prompt of 601 tokens is longer than 512; its last 89 tokens are cut: a a a" in caplog.text


def test_a_prompt_that_just_fits_does_not_warn(tokenizer: PromptTokenizer, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        _, mask = tokenizer(["a " * 511])
    assert mask[0].all()
    assert not caplog.records


def test_tokenizer_files_that_are_missing_or_wrong(tmp_path: Path) -> None:
    folder = tmp_path / "Wan2.1-T2V-1.3B" / "google" / "umt5-xxl"
    folder.mkdir(parents=True)
    with pytest.raises(InputError, match=r"tokenizer\.json does not exist. It comes from Wan-AI/Wan2\.1-T2V-1\.3B"):
        PromptTokenizer.load(folder)
    (folder / "spiece.model").write_bytes(b"x")
    with pytest.raises(InputError, match=r"has spiece\.model but no tokenizer\.json(.|\n)*bash hfd\.sh"):
        PromptTokenizer.load(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"tokenizer\.json cannot be read as a tokenizer"):
        PromptTokenizer.load(folder)


def test_a_tokenizer_of_another_family(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InputError, match="has no </s> or no <pad>"):
        PromptTokenizer.load(tmp_path)


# --------------------------------------------------------------------------------------------------------------------
# The encoder


def test_the_vector(weights: dict[str, Tensor], vector: dict[str, Tensor]) -> None:
    encoder = TextEncoder(load_encoder(weights, torch.float32, "cpu", HERE), PromptTokenizer(small_tokenizer(), HERE))
    embeds = encoder.embed(vector["input_ids"], vector["attention_mask"])
    assert (embeds - vector["expect.prompt_embeds"]).abs().max() < 2e-4
    assert not embeds[vector["attention_mask"] == 0].any()


def test_the_sizes_are_read_off_the_tensors(weights: dict[str, Tensor]) -> None:
    assert infer_config(to_transformers(weights), HERE) == {
        "vocab_size": 96,
        "d_model": 24,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 2,
        "num_heads": 4,
        "relative_attention_num_buckets": 32,
    }


def independent_encoder(weights: dict[str, Tensor]) -> torch.nn.Module:
    """UMT5EncoderModel of the vector's sizes, filled tensor by tensor without any of the loader's code."""
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(vocab_size=96, d_model=24, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    model = UMT5EncoderModel(config).eval()

    def put(target: torch.nn.Module, name: str) -> None:
        target.weight.data.copy_(weights[f"{name}.weight"])

    put(model.shared, "token_embedding")
    put(model.encoder.embed_tokens, "token_embedding")
    put(model.encoder.final_layer_norm, "norm")
    for i, block in enumerate(model.encoder.block):
        attention, feed = block.layer[0], block.layer[1]
        put(attention.layer_norm, f"blocks.{i}.norm1")
        put(feed.layer_norm, f"blocks.{i}.norm2")
        for part in "qkvo":
            put(getattr(attention.SelfAttention, part), f"blocks.{i}.attn.{part}")
        put(attention.SelfAttention.relative_attention_bias, f"blocks.{i}.pos_embedding.embedding")
        put(feed.DenseReluDense.wi_0, f"blocks.{i}.ffn.gate.0")
        put(feed.DenseReluDense.wi_1, f"blocks.{i}.ffn.fc1")
        put(feed.DenseReluDense.wo, f"blocks.{i}.ffn.fc2")
    return model


def test_equals_an_encoder_built_otherwise(weights: dict[str, Tensor], vector: dict[str, Tensor]) -> None:
    ids, mask = vector["input_ids"], vector["attention_mask"]
    ours = load_encoder(weights, torch.float32, "cpu", HERE)
    with torch.no_grad():
        theirs = independent_encoder(weights)(input_ids=ids, attention_mask=mask).last_hidden_state
        mine = ours(input_ids=ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)


def test_both_embedding_tables_are_one(weights: dict[str, Tensor]) -> None:
    module = load_encoder(weights, torch.float32, "cpu", HERE)
    shared, used = module.shared.weight, module.encoder.embed_tokens.weight
    assert shared.untyped_storage().data_ptr() == used.untyped_storage().data_ptr()
    assert torch.equal(used, weights["token_embedding.weight"])


def test_a_prompts_embedding_is_trimmed_and_that_of_512_tokens(encoder: TextEncoder) -> None:
    prompts = ["A golden dog is running through the snow.", "日本語"]
    embeds = encoder.encode(prompts)
    ids, mask = encoder.tokenizer(prompts)
    assert [len(embed) for embed in embeds] == mask.sum(dim=1).tolist()
    torch.testing.assert_close(pad(embeds, 512), encoder.embed(ids, mask), rtol=0, atol=1e-5)


def test_a_prompts_embedding_does_not_depend_on_its_neighbours(encoder: TextEncoder) -> None:
    alone = encoder.encode(["A golden dog."])[0]
    assert torch.equal(encoder.encode(["A long prompt " * 20, "A golden dog."])[1], alone)


def test_prompts_are_cleaned(encoder: TextEncoder) -> None:
    assert torch.equal(encoder.encode(["  A &amp;amp;  B "])[0], encoder.encode(["A & B"])[0])


def test_padding() -> None:
    padded = pad([torch.ones(2, 3), torch.ones(4, 3)], 5)
    assert padded.shape == (2, 5, 3)
    assert padded.sum(dim=2).tolist() == [[3, 3, 0, 0, 0], [3, 3, 3, 3, 0]]


def test_the_diffusers_layout_gives_the_same(tmp_path: Path, small: SmallCheckpoints, encoder: TextEncoder) -> None:
    folder = tmp_path / "text_encoder"
    folder.mkdir()
    state = {k: v.contiguous() for k, v in encoder.module.state_dict().items() if k != "encoder.embed_tokens.weight"}
    save_file(state, folder / "model.safetensors")
    whole = TextEncoder.load(folder, small.tokenizer, torch.float32, "cpu").encode(["A cat."])[0]
    assert torch.equal(whole, encoder.encode(["A cat."])[0])
    names = sorted(state)
    for i, part in enumerate((names[:5], names[5:])):
        save_file({name: state[name] for name in part}, folder / f"model-{i}.safetensors")
    weight_map = {name: f"model-{int(i >= 5)}.safetensors" for i, name in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "model.safetensors").unlink()
    sharded = TextEncoder.load(folder, small.tokenizer, torch.float32, "cpu").encode(["A cat."])[0]
    assert torch.equal(sharded, whole)


def test_half_precision_stays_half(small: SmallCheckpoints, encoder: TextEncoder) -> None:
    half = TextEncoder.load(small.text_encoder, small.tokenizer, torch.bfloat16, "cpu")
    embed = half.encode(["A cat."])[0]
    assert embed.dtype == torch.bfloat16
    assert (embed.float() - encoder.encode(["A cat."])[0]).abs().mean() < 0.05


@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.bfloat16, torch.float32])
def test_what_an_encoder_takes_is_not_what_its_file_has(
    tmp_path: Path, small: SmallCheckpoints, stored: torch.dtype
) -> None:
    state = torch.load(small.text_encoder, weights_only=True)
    path = tmp_path / "encoder.safetensors"
    save_file({name: tensor.to(stored) for name, tensor in state.items()}, path)
    numbers = sum(tensor.numel() for tensor in state.values())
    for dtype in (torch.bfloat16, torch.float32):
        assert encoder_bytes(path, dtype) == dtype.itemsize * numbers


def test_files_that_do_not_fit(tmp_path: Path, small: SmallCheckpoints, weights: dict[str, Tensor]) -> None:
    path = tmp_path / "models_t5.pth"
    load = (small.tokenizer, torch.float32, "cpu")
    torch.save({"decoder.conv1.weight": torch.ones(1)}, path)
    with pytest.raises(InputError, match=r"models_t5\.pth is not a UMT5 encoder: it lacks shared\.weight"):
        TextEncoder.load(path, *load)
    torch.save({name: t for name, t in weights.items() if name != "blocks.1.attn.o.weight"}, path)
    with pytest.raises(InputError, match=r"1 missing: encoder\.block\.1\.layer\.0\.SelfAttention\.o\.weight"):
        TextEncoder.load(path, *load)
    torch.save(weights, path)
    with pytest.raises(InputError, match=r"tokens and .*models_t5\.pth only 96 embeddings"):
        TextEncoder.load(path, *load)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty is a folder without .* It holds no checkpoint file"):
        TextEncoder.load(tmp_path / "empty", *load)


def test_all_242_tensors_of_the_published_file_fit() -> None:
    shapes = json.loads((DATA / "checkpoint_keys.json").read_text())["umt5_xxl_enc_bf16_pth"]
    assert len(shapes) == 242
    state = {name: torch.empty(shape, dtype=torch.bfloat16, device="meta") for name, shape in shapes.items()}
    module = load_encoder(state, torch.bfloat16, "meta", HERE)
    config = module.config
    assert (config.vocab_size, config.d_model, config.d_kv, config.d_ff) == (256384, 4096, 64, 10240)
    assert (config.num_layers, config.num_heads, config.relative_attention_num_buckets) == (24, 64, 32)
    assert config.relative_attention_max_distance == 128
    assert sum(parameter.numel() for parameter in module.parameters()) == sum(t.numel() for t in state.values())
