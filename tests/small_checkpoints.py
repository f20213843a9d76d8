"""A complete set of small checkpoints in the published layouts, made in seconds, for tests and for trying things out.

The weights are random: the videos are coloured noise. Every file has the container, the names, the dtype and the
place of the published one, so whatever runs with these runs with those. From the command line:
`python -m tests.small_checkpoints FOLDER` writes the set and prints what it wrote.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor

from utils import command
from wan.checkpoints.published import SPECS

KEYS_FILE = Path(__file__).parent / "data" / "checkpoint_keys.json"
FULL_VAE_WIDTH = 96  # the width in checkpoint_keys.json of which all other widths of the VAE are multiples
VAE_WIDTH = 8

# The keys of Wan's config.json, and text_dim, which that file leaves at its default of 4096.
MODEL_CONFIG: dict[str, object] = {
    "_class_name": "WanModel",
    "_diffusers_version": "0.30.0",
    "model_type": "t2v",
    "dim": 64,
    "ffn_dim": 128,
    "freq_dim": 32,
    "in_dim": 16,
    "out_dim": 16,
    "num_heads": 4,
    "num_layers": 3,
    "text_dim": 32,
    "text_len": 512,
    "eps": 1e-06,
}
TEXT_LAYERS, TEXT_HEADS, TEXT_BUCKETS = 2, 4, 32

# Enough common English that a caption of a few sentences stays well below 512 tokens.
WORDS = """
a an and are as at background beach behind big bird black blue bright brown camera car cat city close clouds cold dark
day dog down field fire flowers forest from front full golden grass green grey hair has he head her high his holding
house in into is it its lake large left light little long looking man moon mountain moving near night ocean of off old
on one over people person playing rain red right river road room running sand scene sea she shot sitting sky slow small
snow soft standing street sun sunlight sunset that the their through to tree trees two under up video view walking warm
water wave waves wearing while white wide wind window with woman wooden yellow young
""".split()  # noqa: SIM905
ENDINGS = ["ing", "ed", "er", "ly", "es", "tion", "al", "th", "an", "in", "on", "re", "st", "en", "or", "ar"]


@dataclass(frozen=True)
class SmallCheckpoints:
    """Where everything was written; the folders under `root` are those that hfd.sh makes."""

    root: Path
    model_folder: Path
    transformer: Path
    vae: Path
    text_encoder: Path
    tokenizer: Path
    self_forcing: Path
    longlive_base: Path
    longlive_lora: Path
    causal_chunkwise: Path
    causal_framewise: Path
    config: Mapping[str, object]


def dit_shapes(config: Mapping[str, object]) -> dict[str, list[int]]:
    """Names and shapes of Wan's transformer of any size, in the order of the published file."""
    dim, ffn, freq, text, layers, channels_in, channels_out = (
        int(str(config[key])) for key in ("dim", "ffn_dim", "freq_dim", "text_dim", "num_layers", "in_dim", "out_dim")
    )
    shapes = {"patch_embedding.weight": [dim, channels_in, 1, 2, 2], "patch_embedding.bias": [dim]}
    shapes |= _linear("text_embedding.0", text, dim) | _linear("text_embedding.2", dim, dim)
    shapes |= _linear("time_embedding.0", freq, dim) | _linear("time_embedding.2", dim, dim)
    shapes |= _linear("time_projection.1", dim, 6 * dim)
    for i in range(layers):
        block = f"blocks.{i}"
        shapes[f"{block}.modulation"] = [1, 6, dim]
        shapes |= _attention_shapes(f"{block}.self_attn", dim)
        shapes |= {f"{block}.norm3.weight": [dim], f"{block}.norm3.bias": [dim]}
        shapes |= _attention_shapes(f"{block}.cross_attn", dim)
        shapes |= _linear(f"{block}.ffn.0", dim, ffn) | _linear(f"{block}.ffn.2", ffn, dim)
    return shapes | {"head.modulation": [1, 2, dim]} | _linear("head.head", dim, 4 * channels_out)


def _linear(name: str, width_in: int, width_out: int) -> dict[str, list[int]]:
    return {f"{name}.weight": [width_out, width_in], f"{name}.bias": [width_out]}


def _attention_shapes(name: str, dim: int) -> dict[str, list[int]]:
    shapes: dict[str, list[int]] = {}
    for part in "qkvo":
        shapes |= _linear(f"{name}.{part}", dim, dim)
    return shapes | {f"{name}.norm_q.weight": [dim], f"{name}.norm_k.weight": [dim]}


def vae_shapes(width: int = VAE_WIDTH) -> dict[str, list[int]]:
    """Names and shapes of Wan2.1_VAE.pth with every width scaled from 96 to `width`."""
    full: dict[str, list[int]] = json.loads(KEYS_FILE.read_text(encoding="utf-8"))["wan21_vae_pth"]
    return {
        name: [size * width // FULL_VAE_WIDTH if size % FULL_VAE_WIDTH == 0 else size for size in shape]
        for name, shape in full.items()
    }


def preview_shapes(widths: Sequence[int] = (256, 128, 64, 64), encoder: bool = True) -> dict[str, list[int]]:
    """Names and shapes of taew2_1.pth, a decoder for previews, at any widths; of its encoder a layer."""
    shapes = {"decoder.1.weight": [widths[0], 16, 3, 3], "decoder.1.bias": [widths[0]]}
    for level, stride in enumerate((1, 2, 2)):
        width, first = widths[level], 3 + 6 * level
        for block in range(first, first + 3):
            for part, width_in in (("0", 2 * width), ("2", width), ("4", width)):
                shapes[f"decoder.{block}.conv.{part}.weight"] = [width, width_in, 3, 3]
                shapes[f"decoder.{block}.conv.{part}.bias"] = [width]
        shapes[f"decoder.{first + 4}.conv.weight"] = [stride * width, width, 1, 1]
        shapes[f"decoder.{first + 5}.weight"] = [widths[level + 1], width, 3, 3]
    shapes |= {"decoder.22.weight": [3, widths[3], 3, 3], "decoder.22.bias": [3]}
    return shapes | ({"encoder.0.weight": [64, 3, 3, 3], "encoder.0.bias": [64]} if encoder else {})


def text_encoder_shapes(vocabulary: int, dim: int) -> dict[str, list[int]]:
    """Names and shapes of a small models_t5_umt5-xxl-enc-bf16.pth."""
    shapes = {"token_embedding.weight": [vocabulary, dim]}
    for i in range(TEXT_LAYERS):
        block = f"blocks.{i}"
        shapes[f"{block}.norm1.weight"] = [dim]
        shapes |= {f"{block}.attn.{part}.weight": [dim, dim] for part in "qkvo"}
        shapes[f"{block}.norm2.weight"] = [dim]
        shapes |= {f"{block}.ffn.{part}.weight": [2 * dim, dim] for part in ("gate.0", "fc1")}
        shapes[f"{block}.ffn.fc2.weight"] = [dim, 2 * dim]
        shapes[f"{block}.pos_embedding.embedding.weight"] = [TEXT_BUCKETS, TEXT_HEADS]
    return shapes | {"norm.weight": [dim]}


def random_weights(shapes: Mapping[str, Sequence[int]], generator: torch.Generator) -> dict[str, Tensor]:
    """Float32 weights with which activations keep their size: 1 / sqrt(fan-in), norms near 1, small biases."""
    return {name: _random(name, shape, generator) for name, shape in shapes.items()}


def _random(name: str, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    noise = torch.randn(list(shape), generator=generator)
    if name.endswith("gamma") or ("norm" in name and name.endswith("weight")):
        return 1.0 + 0.05 * noise
    if name.endswith(("bias", "modulation")):
        return 0.1 * noise
    if "embedding.embedding" in name:
        return 0.5 * noise
    if name.startswith("token_embedding"):
        return noise
    return noise / math.sqrt(math.prod(shape[1:]))


def lora_weights(shapes: Mapping[str, Sequence[int]], rank: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Both factors of every linear layer in the blocks, under peft's names."""
    factors: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        layer = name.removesuffix(".weight")
        if name == layer or not name.startswith("blocks.") or len(shape) != 2:
            continue
        width_out, width_in = shape
        down = torch.randn(rank, width_in, generator=generator) / math.sqrt(width_in)
        up = torch.randn(width_out, rank, generator=generator) * 0.2 / math.sqrt(rank)
        factors[f"base_model.model.{layer}.lora_A.weight"] = down
        factors[f"base_model.model.{layer}.lora_B.weight"] = up
    return factors


def small_tokenizer() -> Tokenizer:
    """A Unigram tokenizer with UMT5's special tokens and a byte fallback, so that any text survives."""
    special = ["<pad>", "</s>", "<unk>"]
    letters = [chr(code) for code in range(33, 127)]
    pieces = ["▁", *letters, *ENDINGS, *(f"▁{word}" for word in WORDS)]
    scores = [(piece, -10.0 + 2.0 * min(len(piece) - 1, 4)) for piece in dict.fromkeys(pieces)]
    vocabulary = [*((token, 0.0) for token in special), *scores, *((f"<0x{i:02X}>", -30.0) for i in range(256))]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=2, byte_fallback=True))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(replacement="▁", prepend_scheme="always")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.add_special_tokens(special)
    return tokenizer


def write_safetensors(
    path: Path, tensors: Mapping[str, tuple[str, Sequence[int]]], metadata: Mapping[str, str] | None = None
) -> None:
    """A file of zeros with these types (as safetensors calls them) and shapes; sparse, so of any size at no cost."""
    header: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    for name, (kind, shape) in tensors.items():
        bits = {"BOOL": 8, "F4": 4}.get(kind) or int(re.findall(r"\d+", kind)[0])
        begin, end = end, end + math.prod(shape) * bits // 8
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + end)


def write_tokenizer(folder: Path) -> int:
    """Writes tokenizer.json and its two companions; returns the vocabulary's size."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = small_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    _write_json(folder / "special_tokens_map.json", names)
    _write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **names})
    return tokenizer.get_vocab_size()


def write_small_checkpoints(root: Path, seed: int = 0, lora_rank: int = 4) -> SmallCheckpoints:
    """Writes the whole set under `root` (about 8 MB); the same seed gives the same weights."""
    wan, live = root / "Wan2.1-T2V-1.3B", root / "LongLive-1.3B" / "models"
    paths = SmallCheckpoints(
        root=root,
        model_folder=wan,
        transformer=wan / "diffusion_pytorch_model.safetensors",
        vae=wan / "Wan2.1_VAE.pth",
        text_encoder=wan / "models_t5_umt5-xxl-enc-bf16.pth",
        tokenizer=wan / "google" / "umt5-xxl",
        self_forcing=root / "Self-Forcing" / "checkpoints" / "self_forcing_dmd.pt",
        longlive_base=live / "longlive_base.pt",
        longlive_lora=live / "lora.pt",
        causal_chunkwise=root / "Causal-Forcing" / "chunkwise" / "causal_forcing.pt",
        causal_framewise=root / "Causal-Forcing" / "framewise" / "causal_forcing.pt",
        config=MODEL_CONFIG,
    )
    generator = torch.Generator().manual_seed(seed)
    _write_wan(paths, generator)
    _write_generators(paths, lora_rank, generator)
    return paths


def write_published(root: Path, seed: int = 1, lora_rank: int = 4) -> None:
    """Writes the files of wan/checkpoints/published.py that are not under `root` yet, in the layout of each."""
    generator, shapes = torch.Generator().manual_seed(seed), dit_shapes(MODEL_CONFIG)
    for spec in SPECS:
        path = root / spec.path
        if not path.exists():
            weights = random_weights(shapes, generator)
            named = {f"{spec.prefix}{name}": tensor for name, tensor in weights.items()}
            _save(path, {spec.container: named} if spec.container else named)
        if spec.lora is not None and not (root / spec.folder / spec.lora).exists():
            _save(root / spec.folder / spec.lora, {"generator_lora": lora_weights(shapes, lora_rank, generator)})


def _write_wan(paths: SmallCheckpoints, generator: torch.Generator) -> None:
    vocabulary = write_tokenizer(paths.tokenizer)
    _write_json(paths.model_folder / "config.json", paths.config)
    save_file(random_weights(dit_shapes(paths.config), generator), paths.transformer)
    torch.save(random_weights(vae_shapes(), generator), paths.vae)
    text = random_weights(text_encoder_shapes(vocabulary, int(str(paths.config["text_dim"]))), generator)
    torch.save({name: tensor.bfloat16() for name, tensor in text.items()}, paths.text_encoder)


def _write_generators(paths: SmallCheckpoints, lora_rank: int, generator: torch.Generator) -> None:
    shapes = dit_shapes(paths.config)

    def write(path: Path, container: str, prefix: str) -> None:
        weights = random_weights(shapes, generator)
        _save(path, {container: {f"{prefix}{name}": tensor for name, tensor in weights.items()}})

    write(paths.self_forcing, "generator_ema", "model.")
    write(paths.longlive_base, "generator", "model.")
    write(paths.causal_chunkwise, "generator", "model.")
    write(paths.causal_framewise, "generator_ema", "model._fsdp_wrapped_module.")
    loras = {name: lora_weights(shapes, lora_rank, generator) for name in ("generator_lora", "critic_lora")}
    _save(paths.longlive_lora, loras)


def _save(path: Path, content: Mapping[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(dict(content), path)


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None, report: Callable[[str], None] = print) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Write small random checkpoints in the published layouts.")
    parser.add_argument("root", type=Path, help="folder to write to, made if it is not there")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lora_rank", type=int, default=4)
    args = parser.parse_args(argv)
    write_small_checkpoints(args.root, args.seed, args.lora_rank)
    write_published(args.root, args.seed + 1, args.lora_rank)
    report("\n".join(_listing(args.root)))
    return 0


def _listing(root: Path) -> Iterable[str]:
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        yield f"{path.stat().st_size:>10,} bytes  {path}"


if __name__ == "__main__":
    raise SystemExit(command.run(main, log_format=None))
