"""`python -m snitun_sync.master`."""

import sys

from .cli import console

sys.exit(console())
