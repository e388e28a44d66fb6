"""The session master in numbers. Loaded when somebody asks."""

from __future__ import annotations

from .. import __version__
from ..net.figures import gauge, open_descriptors, resident_bytes
from ..net.openmetrics import render

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from .keys import Keys
    from .store import Store

PREFIX = "snitun_master"


def exposition(
    store: Store, answers: Mapping[tuple[str, int], int], waiting: int, keys: Keys
) -> str:
    """Return what /metrics answers; `answers` counts them by path and status."""
    devices, revoked = store.counts()
    codes = [({"path": path, "code": str(code)}, n) for (path, code), n in answers.items()]
    tokens = answers.get(("/v1/token", 200), 0)
    states = [({"state": "active"}, devices - revoked), ({"state": "revoked"}, revoked)]
    return render(
        [
            (f"{PREFIX}_build", "info", "", "The release.", [({"version": __version__}, 1)]),
            (f"{PREFIX}_answers", "counter", "", "Requests, by what they were answered.", codes),
            (f"{PREFIX}_tokens", "counter", "", "Tokens given to devices.", [({}, tokens)]),
            (f"{PREFIX}_devices", "gauge", "", "Devices that are known.", states),
            gauge(f"{PREFIX}_revocations_serial", "Of the list of revocations.", store.serial()),
            gauge(f"{PREFIX}_waiting", "Relays that wait for another list.", waiting),
            gauge(
                f"{PREFIX}_keys_failed", "Whether the key file can't be used.", bool(keys.failure)
            ),
            gauge("process_resident_memory_bytes", "Resident memory.", resident_bytes(), "bytes"),
            gauge("process_open_fds", "Descriptors that are open.", open_descriptors()),
        ]
    )
