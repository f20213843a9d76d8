"""Storyboards to video: python interactive_inference.py --config_path configs/longlive_interactive_inference.yaml

As inference.py, for a `data_path` of storyboards (.jsonl): the prompt changes at the latent frames of
`switch_frame_indices`.
"""

from __future__ import annotations

from utils import interrupts

if __name__ == "__main__":
    interrupts.answer_at_once()

import sys
from collections.abc import Sequence

import inference


def main(argv: Sequence[str] | None = None) -> int:
    return inference.main(argv, __doc__)


if __name__ == "__main__":
    sys.exit(main())
