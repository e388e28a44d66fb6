"""`python -m snitun_sync.server`."""

import sys

from .cli import console

sys.exit(console())
