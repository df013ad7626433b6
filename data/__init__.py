"""Shards and their preparation. A `prepare.py` installs the handlers of `end_cleanly` here, before the imports that take longer."""

import sys

from runtime.errors import end_cleanly

if sys.argv[0].endswith("prepare.py"):
    end_cleanly()
