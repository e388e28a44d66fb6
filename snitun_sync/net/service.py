"""What client and relay have in common: a loop with a life.

Service.run()                        here, until it ends or is stopped
Service.start() … wait() … stop()    on a thread of its own
with Service(…) as service: …        the same
"""

from __future__ import annotations

import logging
import threading
import time

from ..errors import (
    ConfigurationError,
    LostError,
    MisuseError,
    SniTunError,
    UsageError,
    wrong_setting,
)
from ..protocol.aes import load
from ..protocol.names import parse_address
from .bridges import Bridges
from .loop import Loop
from .sockets import check_congestion_control
from .tuning import LEAST_BUDGET_BYTES, STOP_S

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, MutableMapping
    from types import TracebackType
    from typing import Any, TypeVar

    from ..protocol.aes import Aes
    from .admin import Admin
    from .bridge import Bridge
    from .notify import Notifier
    from .openmetrics import Family
    from .tunnel import Tunnel

    Self = TypeVar("Self", bound="Service")

log = logging.getLogger("snitun_sync")


def bounded(value: float, option: str, least: float, most: float, unit: str) -> float:
    """Return the value of an option. Raises ConfigurationError where it is out of its bounds."""
    if not least <= value <= most:
        raise wrong_setting(option, f"{value:g} {unit}; expected {least:g} to {most:g}")
    return value


def budget(size: int) -> int:
    """Return a checked value of --budget."""
    return int(bounded(size, "--budget", LEAST_BUDGET_BYTES, 2**40, "bytes"))


def channel_idle(seconds: float) -> float:
    """Return a checked value of --channel-idle."""
    return bounded(seconds, "--channel-idle", 1, 10**7, "seconds")


class Service:
    """Base of Client and Server. It can be run once; all its methods may be called from any thread.

    Subclasses say what happens on the loop's thread: `_open` (sockets that listen;
    still on the caller's thread), `_begin`, `_begin_drain`, `_begin_stop`; and how they
    are: `ready`, `summary`, `report`, `metrics`.
    """

    def __init__(
        self,
        *,
        budget_bytes: int,
        crypto: str = "",
        congestion_control: str = "",
        admin: str = "",
        admin_token: str = "",
    ) -> None:
        """`budget_bytes` bounds the payload that all channels together may hold.

        `admin` is where questions are answered (see admin.py), `admin_token` what those who
        ask must know. Raises ConfigurationError where `crypto` or `congestion_control` can't be
        had.
        """
        if congestion_control:
            check_congestion_control(congestion_control)
        if admin_token and not admin:
            raise UsageError("--admin-token-file: only with --admin")
        admin_address = None
        if admin:
            from .admin import check  # noqa: PLC0415  not everybody wants it

            admin_address = parse_address(admin, "--admin", can_be_unix=True, can_be_any=True)
            check(admin_address, admin_token)
        self.congestion_control = congestion_control
        self.aes: Aes = load(crypto)
        self.loop = Loop()
        self.bridges = Bridges(budget_bytes)
        self.tunnels: set[Tunnel] = set()
        self.admin: Admin | None = None
        """Who answers questions, where that was asked for."""
        if admin_address is not None:
            from .admin import Admin  # noqa: PLC0415
            from .pages import pages  # noqa: PLC0415

            self.admin = Admin(self.loop, admin_address, pages(self), token=admin_token)
        self._notifier: Notifier | None = None
        self._is_announced = False  # to the service manager: it was ready once
        self.started = time.time()
        """UTC, Unix seconds."""
        self._ident: int | None = None
        self._begun = threading.Lock()  # taken once, by whoever comes first: a start or a stop
        self._is_started = self._is_draining = self._is_stopping = False
        self._ended = threading.Event()
        self.error: SniTunError | None = None
        """What ended the service by itself; None while it lives and after `stop`."""

    # --- for the caller ------------------------------------------------------------

    def run(self) -> None:
        """Run on this thread until the service ends or `stop` is called; it may have been.

        Raises the SniTunError that ended it, if one did.
        """
        self._ident = threading.get_ident()
        if self._prepare():
            self._run()
        self.wait()

    def start(self: Self) -> Self:
        """Run on a thread of its own; return at once. Raises what `_open` raises."""
        if self._prepare():
            thread = threading.Thread(target=self._run, name=type(self).__name__, daemon=True)
            try:
                thread.start()
            except RuntimeError:
                self._free()
                raise
        return self

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until the service has ended; return False if `timeout_s` seconds passed before.

        Raises the SniTunError that ended it, if one did.
        """
        if not self._ended.wait(timeout_s):
            return False
        if self.error is not None:
            raise self.error
        return True

    def stop(self, grace_s: float = 0.0) -> None:
        """End the service well, in a few seconds at most, and wait for it.

        Open channels get `grace_s` seconds more to end by themselves, unless it is called once
        more; new ones get no more. On the loop's own thread, or in a signal handler above
        `run`, it doesn't wait.
        """
        if self._begun.acquire(blocking=False):
            self._free()
        if grace_s > 0:
            self.loop.call_soon_threadsafe(self._drain, grace_s)
        else:
            self.loop.call_soon_threadsafe(self._stop)
        if threading.get_ident() != self._ident:
            self._ended.wait()

    def notify_manager(self, environment: MutableMapping[str, str]) -> None:
        """Tell the service manager that `environment` names how it goes (see notify.py).

        Before the service runs. It finds nothing of it in `environment` any more.
        """
        from .notify import Notifier  # noqa: PLC0415  only under systemd

        self._notifier = Notifier.from_environment(self.loop, environment)

    def reload(self, read: Callable[[], object]) -> None:
        """Read settings again by `read`; on the loop's thread. As it stops, that is over."""
        if self._is_draining or self._is_stopping:
            return
        notifier = self._notifier if self._is_announced else None
        if notifier is not None:
            notifier.reloading()
        try:
            read()
            log.info("the settings were read again")
        except ConfigurationError as error:
            log.error("%s; the former settings stay", error)
        except Exception:
            log.exception("defect in reading the settings; the former ones stay")
        if notifier is not None:
            notifier.ready(self.summary())

    def __enter__(self: Self) -> Self:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    # --- for subclasses ------------------------------------------------------------

    def _on_loop(self, callback: Callable[..., object], *args: Any) -> None:
        """Call `callback(*args)` at once on the loop's own thread, soon from any other."""
        if threading.get_ident() == self._ident:
            callback(*args)
        else:
            self.loop.call_soon_threadsafe(callback, *args)

    def _open(self) -> None:
        """Open what can fail at once; on the caller's thread."""

    def _begin(self) -> None:
        """The loop is about to run."""
        if self.admin is not None:
            self.admin.begin()
        if self._notifier is not None:
            self._notifier.begin()

    def _begin_drain(self) -> bool:
        """Take nothing new any more; return whether there is something to wait for."""
        return False

    def _is_drained(self) -> bool:
        """Tell whether nothing is left to wait for."""
        return not self.bridges.all

    def _begin_stop(self) -> None:
        """Accept and open nothing any more; finish all tunnels."""

    def ready(self) -> str:
        """Return why nobody is served, as far as this side can know; "" if somebody could be."""
        raise NotImplementedError

    def is_up(self) -> bool:
        """Tell whether the service manager may be told that it is there."""
        return not self.ready()

    def summary(self) -> str:
        """Return how it goes in one line, for people."""
        raise NotImplementedError

    def report(self) -> dict[str, Any]:
        """Return how it goes, in JSON's types."""
        raise NotImplementedError

    def metrics(self) -> list[Family]:
        """Return how it goes, in numbers."""
        raise NotImplementedError

    def tell(self) -> None:
        """How it goes has changed: tell the service manager."""
        notifier = self._notifier
        if notifier is None:
            return
        if self._is_announced or not self.is_up():
            notifier.status(self.summary())
        else:
            self._is_announced = True
            notifier.ready(self.summary())

    def _end(self, error: SniTunError | None) -> None:
        """End by itself, for the reason given, once channels have delivered what they hold."""
        self.error = self.error or error
        self._stop()

    def fail(self, error: Exception) -> None:
        """A defect: a callback of this service raised `error` (see Loop)."""
        self._end(SniTunError(f"a defect: {error!r}"))

    def channel_closed(self, bridge: Bridge) -> None:
        """A bridge is closed (see tunnel.Owner)."""
        self._stop_if_done()

    def tunnel_closed(self) -> None:
        """A tunnel has ended and left `tunnels`."""
        self._stop_if_done()

    # --- inside --------------------------------------------------------------------

    def _prepare(self) -> bool:
        """Open what can fail; return False if the service was stopped before it was started."""
        if not self._begun.acquire(blocking=False):
            if self._is_started:
                raise MisuseError(f"this {type(self).__name__} has been started already")
            return False
        self._is_started = True
        try:
            if self.admin is not None:
                self.admin.open()
            self._open()
        except BaseException:
            self._free()
            raise
        return True

    def _run(self) -> None:
        self._ident = threading.get_ident()
        try:
            self._begin()
            self.loop.run()
        except Exception as error:
            log.exception("defect in %s", type(self).__name__)
            self.error = self.error or SniTunError(f"a defect: {error!r}")
        finally:
            self._free()

    def _free(self) -> None:
        try:
            self._close()
        finally:
            self._ended.set()

    def _drain(self, grace_s: float) -> None:
        if self._is_draining or self._is_stopping:
            self._stop()
            return
        self._is_draining = True
        if self._notifier is not None:
            self._notifier.stopping()
        if self._begin_drain():
            if self.bridges.all:
                log.info("stopping: %d channels have %g s to end", len(self.bridges.all), grace_s)
            self.loop.call_later(grace_s, self._stop)
            self._stop_if_done()
        else:
            self._stop()

    def _stop(self) -> None:
        if not self._is_stopping:
            self._is_stopping = True
            if self._notifier is not None and not self._is_draining:
                self._notifier.stopping()
            self.loop.call_later(STOP_S, self.loop.stop)
            self._begin_stop()
            self._stop_if_done()

    def _stop_if_done(self) -> None:
        if self._is_stopping:
            if not self.tunnels and not self.bridges.all:
                self.loop.stop()
        elif self._is_draining and self._is_drained():
            self._stop()

    def _close(self) -> None:
        """Free what is left."""
        for bridge in tuple(self.bridges.all):
            bridge.abort(LostError("stopped"))
        for tunnel in tuple(self.tunnels):
            tunnel.end(LostError("stopped"))
        for part in (self.admin, self._notifier):
            if part is not None:
                part.close()
        self.loop.close()
