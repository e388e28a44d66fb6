"""`python -m snitun_sync.client`."""

import sys

from .cli import console

sys.exit(console())
