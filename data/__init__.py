"""Shards and their preparation. A `prepare.py` ends like a command from here on, before the imports that take seconds."""

import sys

from runtime.errors import end_cleanly

if sys.argv[0].endswith("prepare.py"):
    end_cleanly()
