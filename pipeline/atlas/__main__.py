"""`python -m pipeline.atlas`; the command itself is in pipeline/atlas/command.py, since it takes a whole pipeline to
record."""

import sys

from pipeline.atlas.command import main

sys.exit(main())
