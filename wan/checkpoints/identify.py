"""What a file is: `python -m wan.checkpoints.identify FILE [FILE ...]`

Says of checkpoints which model they hold and of what sizes, in whose names and which container, in what precision, how
they are quantised, which setting takes them, and what is missing. Where the format allows, headers alone are read.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from utils.errors import InputError, shown
from wan.checkpoints.contents import Contents, Numbers
from wan.checkpoints.diffusers_layout import read_model_config
from wan.checkpoints.files import NAME_LIMIT, some_names
from wan.checkpoints.headers import TensorInfo
from wan.checkpoints.kinds import HEAD_DIM, PUBLISHED, ModelFile, model_file, transformer_names
from wan.checkpoints.lora import CONTAINERS as LORA_CONTAINERS
from wan.checkpoints.lora import LoraLayer, read_lora
from wan.checkpoints.lora_names import PART, naming
from wan.checkpoints.lora_settings import LoraSettings
from wan.checkpoints.published import SPECS, config_files, published_as
from wan.checkpoints.quantisation import is_no_weight, scale_names
from wan.checkpoints.reading import read_tensors
from wan.checkpoints.state import (
    GENERATOR_PREFIXES,
    TEXT_ENCODER_PREFIXES,
    VAE_PREFIXES,
    opened,
    strip_wrappers,
)

SETTINGS = {
    "transformer": "generator_ckpt: {path}",
    "VAE": "vae_ckpt: {path}",
    "text encoder": "text_encoder_ckpt: {path}",
    "preview decoder": "decoder: taehv:{path}",
}
NEEDED = {
    "transformer": "a config.json with its sizes in the folder of model_name, a VAE and a text encoder",
    "VAE": "nothing; with vae_ckpt absent, it is looked for in the folder of model_name",
    "text encoder": "tokenizer.json in google/umt5-xxl of the folder of model_name",
    "preview decoder": "nothing, where no video starts from given frames",
}
# Layouts beside those of wan/checkpoints/published.py, by container and the prefix of names.
OTHER_LAYOUTS = {
    ("", "model.diffusion_model."): "ComfyUI's checkpoints",
    ("", "diffusion_model."): "ComfyUI's diffusion models",
    ("", ""): "Wan-AI's own and others that are the mapping itself",
}
Tensors = Mapping[str, TensorInfo]


def describe(path: Path) -> list[str]:
    """Lines that say what the file (or folder) is. Raises InputError if it cannot be looked into."""
    contents = Contents.of(path)
    lines = [f"{shown(path)}", f"  container: {contents.container}"]
    if contents.path != path:
        lines.append(f"  found: {shown(contents.path)}")
    lines += [f"  fault: {fault}" for fault in contents.faults]
    lora = _lora_names(contents.tree)
    if lora is not None:
        return lines + [f"  {line}" for line in _lora_lines(contents.path, *lora)]
    groups = list(_groups(contents.tree))
    for chain, prefix, tensors in groups:
        lines += [f"  {line}" for line in _model_lines(contents.path, chain, prefix, tensors)]
    return lines


def _groups(tree: Mapping[str, object]) -> Iterator[tuple[str, str, Tensors]]:
    """The models in a file: the containers that lead to each, the prefix of its names, and its tensors by name."""
    found = {" / ".join(chain): inner for chain, inner in (opened(tree, use_ema) for use_ema in (False, True))}
    for chain, inner in found.items():
        tensors = {name: info for name, info in inner.items() if isinstance(info, TensorInfo)}
        parts = [
            next((prefix for prefix in prefixes if any(name.startswith(prefix) for name in tensors)), None)
            for prefixes in (GENERATOR_PREFIXES, VAE_PREFIXES, TEXT_ENCODER_PREFIXES)
        ]
        for prefix in [part for part in parts if part is not None] or [""]:
            yield chain, prefix, {name[len(prefix) :]: tensors[name] for name in tensors if name.startswith(prefix)}


def _model_lines(path: Path, chain: str, prefix: str, tensors: Tensors) -> Iterator[str]:
    bare = {strip_wrappers(name): info for name, info in tensors.items() if not is_no_weight(name)}
    scales = set(scale_names(bare).values())
    found = model_file({name: info.shape for name, info in bare.items() if name not in scales})
    if found is None:
        yield f"what: unknown; {len(tensors)} tensors: {some_names(tensors) or 'none, or in containers not known here'}"
        return
    yield f"what: {_what(found, path)}"
    wrapped = next(iter(tensors))
    wrappers = prefix + wrapped[: len(wrapped) - len(strip_wrappers(wrapped))]
    begin = f", each after {shown(wrappers, NAME_LIMIT)}" if wrappers else ""
    yield f"names: {found.layout}{begin}{f', in {shown(chain)}' if chain else ''}"
    if found.model == "transformer":
        yield from _published(path)
        if found.layout == "Wan" and not published_as(path):
            yield from _layout(chain, wrappers)
    numbers = Numbers.of(bare)
    yield f"precision: {numbers.words()}"
    if numbers.quantisation or not numbers.read_here:
        read = "read here, and dequantised when it is loaded" if numbers.read_here else "not read here"
        yield f"quantisation: {numbers.quantisation or 'numbers that cannot be weights'}; {read}"
    yield from _use(path, found, numbers, chain)


def _published(path: Path) -> Iterator[str]:
    """Which checkpoint the name tells of, and what it is for."""
    known = published_as(path)
    if not known:
        return
    yield f"published as: {' or '.join(spec.name for spec in known)}, by its name"
    yield f"configurations: {config_files(known)}"
    yield f"made for: {' or '.join(dict.fromkeys(spec.schedule.words() for spec in known))}"
    yield f"licence of the weights: {known[0].licence}; read the card of {known[0].repository}"


def _layout(chain: str, wrappers: str) -> Iterator[str]:
    """Which checkpoints have such a container and such names, where the file's name tells of none."""
    known = [spec for spec in SPECS if (spec.container, spec.prefix) == (chain, wrappers)]
    names = "; ".join(spec.name for spec in known) or OTHER_LAYOUTS.get((chain, wrappers))
    if names:
        yield f"layout: that of {names}"
    if known:
        yield f"configurations: of the one that it is, {config_files(known)}"


def _what(found: ModelFile, path: Path) -> str:
    sizes = dict(found.sizes)
    of = f"{found.published}, " if found.published else "of no published size, "
    if found.model == "transformer":
        dim = sizes.get("dim", 0)
        told = f"{of}{sizes['num_layers']} layers, {_heads(found, path)}, width {dim}"
        return f"transformer (DiT), {told}, feed-forward {sizes.get('ffn_dim', 0)}; {found.variant or 'text to video'}"
    told = ", ".join(f"{name} {size}" for name, size in sizes.items())
    return f"{found.model}, {of}{told}{f'; {found.variant}' if found.variant else ''}"


def _heads(found: ModelFile, path: Path) -> str:
    """The heads, which no tensor's shape shows: of the config.json beside the file, or as all published ones have."""
    config = path.parent / "config.json"
    try:
        beside = read_model_config(path.parent) if config.is_file() else {}
    except InputError:
        beside = {}
    if beside.get("dim") == found.sizes.get("dim") and isinstance(beside.get("num_heads"), int):
        return f"{beside['num_heads']} heads (config.json beside it)"
    return f"{found.sizes['dim'] // HEAD_DIM} heads of {HEAD_DIM}" if found.published else "heads not told by the file"


def _use(path: Path, found: ModelFile, numbers: Numbers, chain: str) -> Iterator[str]:
    setting = SETTINGS[found.model].format(path=shown(path))
    ema = " with use_ema: true" if chain.split(" / ")[0].endswith("ema") and found.model == "transformer" else ""
    if found.usable and numbers.read_here:
        yield f"setting: {setting}{ema}"
        yield f"needs: {NEEDED[found.model]}"
    else:
        why = found.variant or ("tensors do not fit" if numbers.read_here else "the quantisation is not read here")
        yield f"setting: none takes it ({why})"
    yield f"missing: {some_names(found.missing) if found.missing else 'nothing'}"
    if found.unexpected:
        yield f"unexpected: {some_names(found.unexpected)}"


def _lora_names(tree: Mapping[str, object]) -> tuple[str, list[str]] | None:
    """The container of a LoRA and the names in it; None where the file holds none."""
    chain = []
    while (name := next((name for name in LORA_CONTAINERS if isinstance(tree.get(name), Mapping)), None)) is not None:
        chain.append(name)
        inner = tree[name]
        assert isinstance(inner, Mapping)
        tree = inner
    matches = [PART.fullmatch(name) for name in tree]
    factors = [match for match in matches if match is not None and (match["factor"] or match["older"])]
    return (" / ".join(chain), list(tree)) if factors else None


def _lora_lines(path: Path, chain: str, names: Sequence[str]) -> Iterator[str]:
    yield f"names: {naming(names)}{f', in {shown(chain)}' if chain else ''}"
    blocks = [int(number) for name in names for number in re.findall(r"blocks[._](\d{1,4})[._]", name)]
    try:
        layers = read_lora(read_tensors(path), transformer_names(max(blocks, default=-1) + 1), path)
        settings = LoraSettings.beside(path)
    except InputError as error:
        yield "what: LoRA that does not fit a text-to-video transformer of this family"
        yield f"fault: {error}"
        return
    yield f"what: LoRA for a transformer of {max(blocks, default=-1) + 1} layers{_made_for(layers, blocks)}"
    yield f"rank: {_some(sorted({layer.rank for layer in layers if layer.rank}))}"
    alphas = sorted({layer.scale * layer.rank for layer in layers if layer.rank})
    by = "in every layer" if any(name.endswith(".alpha") for name in names) else None
    by = by or (f"in {shown(settings.source.name)}" if settings else "not said, so the rank")
    yield f"alpha: {_some(alphas)} ({by}); B·A times {_some(sorted({layer.scale for layer in layers}))}"
    yield f"layers: {len(layers)}"
    yield from _published(path)
    yield f"setting: lora_ckpt: {shown(path)}, or path in loras; adapter.rank and adapter.alpha may be left out"
    yield "needs: the generator that it was made for, as generator_ckpt"
    yield "missing: nothing"


def _made_for(layers: Sequence[LoraLayer], blocks: Sequence[int]) -> str:
    """The model that the width of the factors shows."""
    widths = {layer.a.shape[1] for layer in layers if layer.a is not None and layer.name.endswith("self_attn.q")}
    if len(widths) != 1:
        return ""
    width = widths.pop()
    known = [name for (dim, _, count), name in PUBLISHED.items() if dim == width and count == max(blocks) + 1]
    return f" and width {width}{f' ({known[0]})' if known else ''}"


def _some(values: Sequence[float]) -> str:
    few = ", ".join(f"{value:g}" for value in values[:4])
    return few if len(values) <= 4 else f"{few}, ... ({len(values)} in all)"


def main(argv: Sequence[str] | None = None, report: Callable[[str], object] = print) -> int:
    """The command line; 0 if every file could be looked into, else 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="a file, an index of shards, or a folder")
    status = 0
    for path in parser.parse_args(argv).files:
        try:
            report("\n".join(describe(path)))
        except InputError as error:
            sys.stderr.write(f"error: {error}\n")
            status = 2
    return status


if __name__ == "__main__":
    sys.exit(main())
