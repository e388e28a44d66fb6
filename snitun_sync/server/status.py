"""What the relay says of itself, in JSON's types and in numbers. Loaded when somebody asks."""

from __future__ import annotations

from ..net.figures import families, figures, utc_text

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ..net.openmetrics import Family
    from .server import Server

PREFIX = "snitun_server"
# So many clients are listed one by one, by name.
CLIENTS_LISTED = 1000


def report(server: Server) -> dict[str, Any]:
    """Return what /status shows."""
    reason, now = server.ready(), server.loop.now
    clients = []
    for name in sorted(server.routes)[:CLIENTS_LISTED]:
        registration = server.routes[name]
        tunnel, payload = registration.tunnel, registration.payload
        clients.append(
            {
                "hostname": name,
                "address": tunnel.peer,
                "up_for_s": round(now - (tunnel.proven_at or now), 1),
                "silent_for_s": round(now - tunnel.received_at, 1),
                "channels": len(tunnel.mux.channels),
                "protocol_version": payload.protocol_version,
                "cipher": payload.cipher,
                "valid": utc_text(payload.valid),
            }
        )
    return {
        "program": "snitun-server",
        "is_ready": not reason,
        "reason": reason or None,
        "summary": server.summary(),
        **figures(server),
        "tunnels": len(server.tunnels),
        "tunnels_opened": server.opened_tunnels,
        "hostnames": len(server.routes),
        "takeovers": server.takeovers,
        "arrivals": len(server.arrivals),
        "accepted": server.accepted,
        "refused_clients": server.refused_clients,
        "refused_devices": server.refused_devices,
        "clients": clients,
    }


def metrics(server: Server) -> list[Family]:
    """Return what /metrics shows."""
    gauges = (
        ("tunnels", "Connections of clients.", len(server.tunnels)),
        ("hostnames", "Names that lead to a client.", len(server.routes)),
        ("arrivals", "Connections of which nothing is known yet.", len(server.arrivals)),
    )
    counters = (
        ("accepted", "Connections of devices and clients.", server.accepted),
        ("tunnels_opened", "Clients that answered their challenge.", server.opened_tunnels),
        ("takeovers", "Names that went from one client to another.", server.takeovers),
        ("refused_clients", "Clients without a good token or key.", server.refused_clients),
        ("refused_devices", "Devices that no client serves.", server.refused_devices),
    )
    return [
        *families(server, PREFIX, "devices"),
        *((f"{PREFIX}_{name}", "gauge", "", text, [({}, value)]) for name, text, value in gauges),
        *(
            (f"{PREFIX}_{name}", "counter", "", text, [({}, value)])
            for name, text, value in counters
        ),
    ]
