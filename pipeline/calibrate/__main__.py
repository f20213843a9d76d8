"""`python -m pipeline.calibrate`; the command itself is in pipeline/calibrate/command.py."""

import sys

from pipeline.calibrate.command import main

sys.exit(main())
