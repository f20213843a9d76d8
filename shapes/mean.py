"""The mean of finished models, tensor by tensor.

    python -m shapes.mean MODEL MODEL... --out FOLDER

Runs that each begin with the weights of one before end near each other, on different sides of what all of them look
for: their mean is often better than any of them ("model soups", arXiv 2203.05482). All must have the same text
encoder; it and the VAE are the first one's. The result is written to FOLDER/Wan2.1-T2V-shapes, which may be one of
those that were averaged.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from shapes.export import write_model
from shapes.finished import finished_text_encoder, finished_transformer, finished_vae
from shapes.runs import fingerprint
from utils import command
from utils.errors import InputError


def write_mean(models: Sequence[Path], folder: Path) -> Path:
    """Write the mean of the models in these folders; returns where it is. Raises InputError before it writes."""
    texts = [finished_text_encoder(model, "MODEL") for model in models]
    for model, text in zip(models, texts, strict=True):
        if fingerprint(text) != fingerprint(texts[0]):
            raise InputError(f"MODEL: {model} has another text encoder than {models[0]}; leave one of them out")
    transformers = [finished_transformer(model, "MODEL") for model in models]
    mean = {name: torch.stack([one[name] for one in transformers]).mean(0) for name in transformers[0]}
    return write_model(folder, texts[0], mean, finished_vae(models[0], "MODEL"))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+", metavar="MODEL", help="folder of a finished model")
    parser.add_argument("--out", type=Path, required=True, help="folder that gets the mean's")
    args = parser.parse_args(argv)
    if len(args.models) == 1:
        parser.error(f"MODEL: {args.models[0]} alone; give two or more")
    print(write_mean(args.models, args.out))
    return 0


if __name__ == "__main__":
    raise SystemExit(command.run(main, log_format=None))
