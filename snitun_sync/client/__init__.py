"""The client on the appliance: `python -m snitun_sync.client`, or inside another program:

from snitun_sync.client import Client

with Client(ticket, endpoint="127.0.0.1:8443") as client:
    client.wait()
"""

from ..protocol.ticket import Ticket
from .client import Client

__all__ = ["Client", "Ticket"]
