"""What a service answers to questions: /ready, /status and /metrics (see admin.py)."""

from __future__ import annotations

import json

from .openmetrics import CONTENT_TYPE, render

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .admin import Answer
    from .service import Service


def pages(service: Service) -> dict[str, Callable[[], Answer]]:
    """Return the pages of `service` by their paths."""

    def ready() -> Answer:
        reason = service.ready()
        if reason:
            return 503, "text/plain", f"not ready: {reason}\n"
        return 200, "text/plain", "ready\n"

    def status() -> Answer:
        return 200, "application/json", json.dumps(service.report()) + "\n"

    def metrics() -> Answer:
        return 200, CONTENT_TYPE, render(service.metrics())

    return {"/ready": ready, "/status": status, "/metrics": metrics}
