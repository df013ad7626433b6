"""The tools. Each is run as `python -m tools.NAME`, and installs the handlers of `end_cleanly` here."""

import sys

from runtime.errors import end_cleanly

if sys.argv[0] == "-m":  # Python is about to run one of them; a program that imports one handles its own signals
    end_cleanly()
