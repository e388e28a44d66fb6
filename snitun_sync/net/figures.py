"""What all services report of themselves: memory, channels, bytes. Only for who asks."""

from __future__ import annotations

import os
import time

from .. import __version__
from .loop import utc_time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from .bridge import Bridge
    from .openmetrics import Family
    from .service import Service

# So many channels are listed one by one, the oldest first.
CHANNELS_LISTED = 200


def utc_text(seconds: float | None) -> str | None:
    """Return UTC Unix seconds as RFC 3339 has them; None stays None."""
    return None if seconds is None else time.strftime("%Y-%m-%dT%H:%M:%SZ", utc_time(seconds))


def channel_figures(bridge: Bridge, now: float) -> dict[str, Any]:
    """Return how one device's channel goes; `now` is the loop's time."""
    channel = bridge.channel
    return {
        "id": channel.id.hex()[:8],
        "device": bridge.device,
        "state": bridge.state.value,
        "age_s": round(now - bridge.opened_at, 1),
        "idle_s": round(now - bridge.active_at, 1),
        "received_bytes": channel.received_bytes,
        "sent_bytes": channel.sent_bytes,
        "held_bytes": bridge.held_bytes,
        "is_paused": channel.is_paused,
    }


def figures(service: Service, program: str) -> dict[str, Any]:
    """Return the part of /status that every service has; `program` is its name."""
    bridges, reason = service.bridges, service.ready()
    received, sent = bridges.carried_bytes()
    oldest = sorted(bridges.all, key=lambda bridge: bridge.opened_at)[:CHANNELS_LISTED]
    return {
        "program": program,
        "is_ready": not reason,
        "reason": reason or None,
        "summary": service.summary(),
        "version": __version__,
        "started": utc_text(service.started),
        "channels": {
            "open": len(bridges.all),
            "opened": bridges.opened,
            "aborted": bridges.aborted,
            "received_bytes": received,
            "sent_bytes": sent,
            "list": [channel_figures(bridge, service.loop.now) for bridge in oldest],
        },
        "memory": {
            "held_bytes": bridges.held_bytes,
            "budget_bytes": bridges.limit_bytes,
            "resident_bytes": resident_bytes(),
        },
    }


def gauge(name: str, text: str, value: float, unit: str = "") -> Family:
    """Return a metric that goes up and down."""
    return name, "gauge", unit, text, [({}, value)]


def counter(name: str, text: str, value: float) -> Family:
    """Return a metric that only grows."""
    return name, "counter", "", text, [({}, value)]


def counters(name: str, text: str, label: str, values: dict[str, int], unit: str = "") -> Family:
    """Return one that only grows, for each value of a label."""
    return name, "counter", unit, text, [({label: key}, n) for key, n in values.items()]


def families(service: Service, prefix: str, far: str) -> list[Family]:
    """Return the metrics that every service has; `far` is who is behind the bridges' sockets."""
    bridges = service.bridges
    received, sent = bridges.carried_bytes()
    carried = f"Payload of all channels, from the tunnel to {far} (received) and back (sent)."
    directions = {"received": received, "sent": sent}
    is_ready, started = not service.ready(), service.started
    return [
        (f"{prefix}_build", "info", "", "The release.", [({"version": __version__}, 1)]),
        gauge(f"{prefix}_ready", "Whether devices are served, as far as is known here.", is_ready),
        gauge(f"{prefix}_channels", "Channels that are open.", len(bridges.all)),
        counter(f"{prefix}_channels_opened", "Connections of devices.", bridges.opened),
        counter(
            f"{prefix}_channels_aborted",
            "Channels that were cut, by an error, a limit or the end of their tunnel.",
            bridges.aborted,
        ),
        counters(f"{prefix}_channel_bytes", carried, "direction", directions, "bytes"),
        gauge(f"{prefix}_held_bytes", "Payload that waits.", bridges.held_bytes, "bytes"),
        gauge(f"{prefix}_budget_bytes", "How much may wait.", bridges.limit_bytes, "bytes"),
        gauge("process_resident_memory_bytes", "Resident memory.", resident_bytes(), "bytes"),
        gauge("process_start_time_seconds", "Start, UTC Unix seconds.", started, "seconds"),
        gauge("process_open_fds", "Descriptors that are open.", open_descriptors()),
    ]


def resident_bytes() -> int:
    """Return this process's resident memory, 0 where /proc/self/statm can't be read (proc(5))."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


def open_descriptors() -> int:
    """Return how many descriptors this process has, 0 where that can't be seen."""
    try:
        return len(os.listdir("/proc/self/fd")) - 1  # one is this very look
    except OSError:
        return 0
