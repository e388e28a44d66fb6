"""What the client says of itself, in JSON's types and in numbers. Loaded when somebody asks."""

from __future__ import annotations

import time

from ..net.figures import counter, counters, families, figures, gauge, utc_text
from ..net.sockets import host_text

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ..net.openmetrics import Family
    from ..net.tunnel import Tunnel
    from ..protocol.ticket import Ticket
    from .client import Client
    from .endpoints import Route

PREFIX = "snitun_client"
# No clock is right that is before the day when this was written: 2026-11-01.
EARLIEST = 1793491200
# Clocks of two machines may differ by that much.
SLACK_S = 300.0


def clock_doubt(ticket: Ticket | None, *, was_accepted: bool) -> str:
    """Return why this machine's clock may be wrong, or ""."""
    now = time.time()
    if now < EARLIEST:
        return f"it says {utc_text(now)}, before this program was written"
    if ticket is None:
        return ""
    created = ticket.created
    if created is not None and created > now + SLACK_S:
        return f"it says {utc_text(now)}, and the ticket was made at {utc_text(created)}"
    if was_accepted and ticket.valid is not None and ticket.valid < now - SLACK_S:
        return f"by it the ticket expired at {utc_text(ticket.valid)}, but the relay accepted it"
    return ""


def report(client: Client) -> dict[str, Any]:
    """Return what /status shows."""
    settings, ticket, now = client.settings, client.ticket, client.loop.now
    tunnel = client._serving
    retry_in_s = round(client.retry_at - now, 1) if client.retry_at else None
    return {
        **figures(client, "snitun-client"),
        "state": client.state.value,
        "since": utc_text(client.state_since),
        "hostname": (ticket.hostname or None) if ticket is not None else None,
        "relay": tunnel.peer if tunnel is not None else _text(client.server),
        "master": client.master.report() if client.master is not None else None,
        "proxy": _text(settings.proxy),
        "endpoints": [_endpoint(route) for route in client.endpoints.routes],
        "tunnel": _tunnel(tunnel, now) if tunnel is not None else None,
        "attempts": client.attempts,
        "failures": client.history.failures,
        "retry_in_s": retry_in_s,
        "endings": [
            {
                "time": utc_text(ending.time),
                "proven_s": None if ending.proven_s is None else round(ending.proven_s, 1),
                "reason": ending.reason,
                "count": ending.count,
            }
            for ending in client.history.endings
        ],
        "refused_channels": client.limits.refused,
        "ticket": _ticket(ticket) if ticket is not None else None,
        "clock_doubt": clock_doubt(ticket, was_accepted=tunnel is not None) or None,
        "probe": client.probe.report() if client.probe is not None else None,
    }


def _text(value: object) -> str | None:
    return None if value is None else str(value)


def _ticket(ticket: Ticket) -> dict[str, Any]:
    return {
        "created": utc_text(ticket.created),
        "valid": utc_text(ticket.valid),
        "expires_in_s": None if ticket.valid is None else round(ticket.valid - time.time()),
        "protocol_version": ticket.protocol_version,
        "cipher": ticket.cipher,
        "throttling": ticket.throttling,
    }


def _endpoint(route: Route) -> dict[str, Any]:
    connector, certificate, health = route.connector, route.certificate, route.health
    failures, failure = connector.failures, connector.failure
    return {
        "names": list(route.settings.names),
        "address": str(connector),
        "is_down": bool(route.doubt()),
        "opened": route.opened,
        "failures": failures,
        "failure": failure or None,
        "health": {"checked": utc_text(health.checked_at), "failure": health.failure or None}
        if health is not None
        else None,
        "certificate": {
            "names": list(certificate.names),
            "valid_until": utc_text(certificate.not_after),
            "failure": certificate.failure or None,
        }
        if certificate is not None
        else None,
    }


def _tunnel(tunnel: Tunnel, now: float) -> dict[str, Any]:
    assert tunnel.proven_at is not None
    round_trip_s = tunnel.round_trip_s
    local = remote = None
    if tunnel.sock is not None:
        try:
            local = host_text(*tunnel.sock.getsockname()[:2])
            remote = host_text(*tunnel.sock.getpeername()[:2])
        except OSError:
            pass  # reset a moment ago
    return {
        "proven_for_s": round(now - tunnel.proven_at, 1),
        "silent_for_s": round(now - tunnel.received_at, 1),
        "round_trip_ms": None if round_trip_s is None else round(round_trip_s * 1000, 2),
        "local_address": local,
        "relay_address": remote,
    }


def metrics(client: Client) -> list[Family]:
    """Return what /metrics shows."""
    now, ticket, master = client.loop.now, client.ticket, client.master
    tunnel, probe = client._serving, client.probe
    is_doubtful = bool(clock_doubt(ticket, was_accepted=tunnel is not None))
    found = [
        *families(client, PREFIX, "the endpoint"),
        counter(f"{PREFIX}_attempts", "Connections to the relay that were tried.", client.attempts),
        counter(f"{PREFIX}_tunnels_proven", "Tunnels that were proven.", client.proven),
        counters(
            f"{PREFIX}_failures",
            "Attempts and tunnels that failed, by reason.",
            "reason",
            client.history.failures,
        ),
        counters(
            f"{PREFIX}_channels_refused",
            "Channels that were refused, by the limit that was reached, or the reason.",
            "limit",
            client.limits.refused,
        ),
        gauge(f"{PREFIX}_clock_doubtful", "Whether the clock seems to be wrong.", is_doubtful),
    ]
    routes = {",".join(route.settings.names): route for route in client.endpoints.routes}
    opened = {name: route.opened for name, route in routes.items()}
    failed = {name: route.connector.failures for name, route in routes.items()}
    down = [({"names": name}, bool(route.doubt())) for name, route in routes.items()]
    expiries = [
        ({"names": name}, route.certificate.not_after)
        for name, route in routes.items()
        if route.certificate is not None and route.certificate.not_after
    ]
    for name, text, numbers in (
        ("connections", "Devices that were brought to an endpoint.", opened),
        ("failures", "Connections to an endpoint that could not be opened.", failed),
    ):
        found.append(counters(f"{PREFIX}_endpoint_{name}", text, "names", numbers))
    text = "Whether an endpoint is known to be down."
    found.append((f"{PREFIX}_endpoint_down", "gauge", "", text, down))
    name, text = (
        f"{PREFIX}_certificate_expiry_timestamp_seconds",
        "When it expires, UTC Unix seconds.",
    )
    found.append((name, "gauge", "seconds", text, expiries))
    if tunnel is not None:
        name, text = f"{PREFIX}_tunnel_silence_seconds", "Time since the relay's last byte."
        found.append(gauge(name, text, now - tunnel.received_at, "seconds"))
        if tunnel.round_trip_s is not None:
            name, text = f"{PREFIX}_round_trip_seconds", "How long the relay's last pong took."
            found.append(gauge(name, text, tunnel.round_trip_s, "seconds"))
    if master is not None:
        name, text = f"{PREFIX}_master_success", "Whether it gave a ticket when it was asked last."
        found.append(gauge(name, text, not master.failure))
        if master.renew_at:
            name, text = f"{PREFIX}_master_asked_in_seconds", "When it is asked again."
            found.append(gauge(name, text, max(0.0, master.renew_at - now), "seconds"))
    if ticket is not None and ticket.valid is not None:
        name = f"{PREFIX}_ticket_expiry_timestamp_seconds"
        text = "When the ticket expires, UTC Unix seconds."
        found.append(gauge(name, text, ticket.valid, "seconds"))
    if probe is not None and probe.checked_at is not None:
        text = "Whether the last self-probe got through."
        found.append(gauge(f"{PREFIX}_probe_success", text, not probe.failure))
    return found
