"""`python -m dummy.atlas`; the command itself is in pipeline/atlas.py, since it takes a whole pipeline to record."""

import sys

from pipeline.atlas import main

sys.exit(main())
