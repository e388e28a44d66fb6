"""The Fernet keys of a file that may change: the first one signs."""

from __future__ import annotations

import logging
import threading
import time

from ..errors import ConfigurationError
from ..program import file_stamp, read_fernet_keys
from ..protocol.token import Fernet

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..protocol.aes import Aes

LOOK_EACH_S = 1.0
# Relays that share the file look at it every second: they know a new key before it signs.
QUIET_S = 3.0
RETRY_S = 5.0

log = logging.getLogger("snitun_sync")


class Keys:
    """May be used from any thread."""

    def __init__(self, path: str, option: str, aes: Aes) -> None:
        """Read the file; `option` is what messages call it. Raises ConfigurationError."""
        self._path, self._option, self._aes = path, option, aes
        self._lock = threading.Lock()
        self._look_at = self._seen_at = 0.0
        self.failure = ""
        """Why what is in the file now doesn't count, "" if it does."""
        self.read()

    def read(self) -> None:
        """Read the file at once. Raises ConfigurationError, and the former keys stay."""
        stamp = file_stamp(self._path)
        keys = read_fernet_keys(self._path, self._option)
        self.fernet, self.newest = Fernet(keys, self._aes), keys[0]
        self._taken = self._seen = stamp
        self.failure = ""
        log.info("Fernet keys in %s: %d", self._path, len(keys))

    def look(self) -> None:
        """Read the file if it has changed, and stays as it is. Who uses the keys calls this."""
        now = time.monotonic()
        if now < self._look_at or not self._lock.acquire(blocking=False):
            return
        try:
            self._look_at = now + LOOK_EACH_S
            stamp = file_stamp(self._path)
            if stamp != self._seen:
                self._seen, self._seen_at = stamp, now
            if stamp != self._taken and now - self._seen_at >= QUIET_S:
                self.read()
        except ConfigurationError as error:
            self._look_at = now + RETRY_S
            if str(error) != self.failure:
                self.failure = str(error)
                log.error("%s; the former keys stay", error)
        finally:
            self._lock.release()
