"""How many channels devices may have, how fast they may come, and who was refused."""

from __future__ import annotations

import logging

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..net.bridges import Bridges
    from ..net.loop import Loop
    from .settings import Settings

log = logging.getLogger("snitun_sync")

# A limit that is reached says so this often, and not for each channel.
LOG_EACH_S = 60.0
# Other reasons have a line for each device, as long as there are not more than these meanwhile.
LINES = 20


class Limits:
    """Who has come too late or too fast; the settings may be exchanged."""

    def __init__(self, loop: Loop, bridges: Bridges, settings: Settings) -> None:
        self._loop, self._bridges, self.settings = loop, bridges, settings
        self._allowance = 0.0  # new channels that may come at once: a second's worth of them
        self._filled_at = 0.0
        self.refused: dict[str, int] = {}
        """How many channels were refused, by the limit or the reason that did it."""
        self._log_until: dict[str, tuple[float, int]] = {}  # the time, and lines left until then
        self._unsaid: dict[str, int] = {}

    def lets_in(self) -> bool:
        """Tell whether one more channel may be opened now; count it, and log, if not."""
        settings, bridges = self.settings, self._bridges
        if len(bridges.all) >= settings.max_channels:
            return self._refuse("channels", f"--max-channels {settings.max_channels}")
        if bridges.is_full:
            return self._refuse("budget", f"--budget {settings.budget_bytes} bytes")
        rate = settings.max_new_channels
        if rate:
            now = self._loop.now
            self._allowance = min(rate, self._allowance + rate * (now - self._filled_at))
            self._filled_at = now
            if self._allowance < 1:
                return self._refuse("rate", f"--max-new-channels {rate} a second")
            self._allowance -= 1
        return True

    def refuse(self, name: str, why: str) -> None:
        """Count a device that is refused, by a short `name` of the reason, and log it."""
        if (count := self._count(name, LINES)) > 1:
            why += f"; {count - 1} more since the last such line"
        if count:
            log.warning("refused %s", why)

    def _refuse(self, name: str, limit: str) -> bool:
        if count := self._count(name, 1):
            log.warning("refused %d channels: %s is reached", count, limit)
        return False

    def _count(self, name: str, lines: int) -> int:
        """Count one; return how many a line of the log has to speak of, 0 for no line."""
        self.refused[name] = self.refused.get(name, 0) + 1
        self._unsaid[name] = self._unsaid.get(name, 0) + 1
        now = self._loop.now
        until, left = self._log_until.get(name, (0.0, 0))
        if now >= until:
            until, left = now + LOG_EACH_S, lines
        self._log_until[name] = until, max(0, left - 1)
        return self._unsaid.pop(name) if left else 0
