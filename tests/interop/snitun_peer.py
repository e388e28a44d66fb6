"""Run the published `snitun` package, whichever release this Python has, as a black box.

    python snitun_peer.py server|client    with the configuration as JSON on standard input

Prints READY once it listens or is connected, and runs until it is ended.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import logging
import sys
from typing import Any


async def serve(config: dict[str, Any]) -> None:
    """Be the relay, with one port for devices and clients."""
    from snitun.server.run import SniTunServerSingle

    server = SniTunServerSingle(
        [config["fernet_key"]], host=config["host"], port=config["port"], throttling=None
    )
    await server.start()
    print("READY", flush=True)
    await asyncio.Event().wait()


async def connect(config: dict[str, Any]) -> None:
    """Be the client."""
    from snitun.client import connector
    from snitun.client.client_peer import ClientPeer

    make = getattr(connector, "EndpointConnector", None) or connector.Connector
    peer = ClientPeer(config["host"], config["port"])
    accepted = inspect.signature(peer.start).parameters
    options = {name: config[name] for name in ("protocol_version", "cipher") if name in accepted}
    await peer.start(
        make(config["endpoint_host"], config["endpoint_port"]),
        config["token"].encode(),
        bytes.fromhex(config["aes_key"]),
        bytes.fromhex(config["aes_iv"]),
        **options,
    )
    print("READY", flush=True)
    await peer.wait()
    print("ENDED", flush=True)


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    asyncio.run((serve if sys.argv[1] == "server" else connect)(json.load(sys.stdin)))
