"""What the relay says of itself, in JSON's types and in numbers. Loaded when somebody asks."""

from __future__ import annotations

from ..net.figures import counter, families, figures, gauge, utc_text

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
    now, clients = server.loop.now, []
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
    parts: dict[str, Any] = {}
    if server.follower is not None:
        parts["revocations"] = server.follower.report()
    if server.fixed_routes is not None:
        parts["routes"] = server.fixed_routes.report()
    return {
        **figures(server, "snitun-server"),
        "tunnels": len(server.tunnels),
        "tunnels_opened": server.opened_tunnels,
        "hostnames": len(server.routes),
        "takeovers": server.takeovers,
        "arrivals": len(server.arrivals),
        "accepted": server.accepted,
        "refused_clients": server.refused_clients,
        "refused_devices": server.refused_devices,
        **parts,
        "clients": clients,
    }


def metrics(server: Server) -> list[Family]:
    """Return what /metrics shows."""
    return [
        *families(server, PREFIX, "devices"),
        gauge(f"{PREFIX}_tunnels", "Connections of clients.", len(server.tunnels)),
        gauge(f"{PREFIX}_hostnames", "Names that lead to a client.", len(server.routes)),
        gauge(f"{PREFIX}_arrivals", "Connections not known yet.", len(server.arrivals)),
        counter(f"{PREFIX}_accepted", "Connections that came in.", server.accepted),
        counter(f"{PREFIX}_tunnels_opened", "Clients that came up.", server.opened_tunnels),
        counter(f"{PREFIX}_takeovers", "Names that changed the client.", server.takeovers),
        counter(
            f"{PREFIX}_refused_clients",
            "Clients without good token and key.",
            server.refused_clients,
        ),
        counter(
            f"{PREFIX}_refused_devices", "Devices that no client serves.", server.refused_devices
        ),
        *(server.follower.metrics(PREFIX) if server.follower is not None else ()),
        *(server.fixed_routes.metrics(PREFIX) if server.fixed_routes is not None else ()),
    ]
