"""snitun_sync: an end-to-end encrypted tunnel for appliances behind NAT.

The SniTun protocol without asyncio: one event loop on one thread and a few
worker threads for what blocks. Import what you need:

    from snitun_sync.client import Client     # on the appliance
    from snitun_sync.server import Server     # the relay
"""

__version__ = "0.1.0"
