"""The tools. Each is run as `python -m tools.NAME`, and ends like a command: see `end_cleanly`."""

import sys

from runtime.errors import end_cleanly

if sys.argv[0] == "-m":  # Python is about to run one of them; what imports them has ways of its own
    end_cleanly()
