"""The ticket from a session master: asked for, renewed in time, kept for the next start.

    no ticket that can be used → ask → a tunnel with it → at two thirds of its life: ask
      ↑ refused, revoked, expired; used up (aes-gcm)         → another tunnel takes over

Lives are counted by the loop's clock from the moment when the answer came: a wrong clock of
this machine doesn't matter. Requests are made by a child process (fetch.py) from a worker
thread. Loaded only with --master.
"""

from __future__ import annotations

import logging
import os
import time
from functools import partial

from ..errors import (
    AuthenticationError,
    ConfigurationError,
    DeniedError,
    MasterError,
    RefusedError,
    RevokedError,
    SniTunError,
    TicketError,
    UsageError,
)
from ..net.fetch import Fetch
from ..net.https import parse_url
from ..net.loop import utc
from ..net.sockets import reason
from ..net.state import blocking_save
from ..program import check_certificates, read_text
from ..protocol.cipher import IV_SIZE, KEY_SIZE
from ..protocol.device import ID_CHARACTERS, is_device_id, parse_credential
from ..protocol.names import parse_address, shown
from ..protocol.ticket import RELAY_PORT, Ticket
from .retry import FIRST_S, Retry, fraction

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ..net.loop import Timer
    from ..net.workers import Workers
    from ..protocol.names import Address
    from .client import Client

    Found = tuple[dict[str, Any], str, str]
    """An answer, and the id and the secret of the device that it is for."""

log = logging.getLogger("snitun_sync")

# Renewed at a random moment between these shares of its life: not all clients come together.
RENEW_FROM, RENEW_TO = 0.60, 0.67
LEAST_RENEWAL_S = 10.0  # however short a life is
REVOKED_S = 900.0  # a revoked device asks again so often
LONGEST_RETRY_AFTER_S = 3600
MAX_SAID = 200  # characters of what the master says
KEPT_NAME = "ticket.json"


class MasterSettings:
    """Which session master to ask, and as whom."""

    def __init__(
        self, url: str, device_id: str, secret_file: str, ca_file: str, state_dir: str
    ) -> None:
        """Check and take the settings. Raises ConfigurationError, which names the option.

        `secret_file` has ID.SECRET, or the SECRET of `device_id`, and is read anew for each
        request; `ca_file` the certificates (PEM) that alone are trusted, "" stands for the
        system's; in `state_dir` the latest ticket is kept, nowhere if "".
        """
        self.url = str(parse_url(url, "--master"))
        if not secret_file:
            raise UsageError("--master: only with --device-secret-file")
        if device_id and not is_device_id(device_id):
            expected = f"the id of a device: {ID_CHARACTERS} of a-z and 2-7"
            raise UsageError(f"--device-id: {shown(device_id)}; expected {expected}")
        self._given_id, self.secret_file = device_id, secret_file
        self.device_id, _ = self.blocking_credential(is_first=True)
        check_certificates(ca_file, "--master-ca")
        self.ca_file, self.state_dir = ca_file, state_dir

    def __eq__(self, other: object) -> bool:
        return isinstance(other, MasterSettings) and vars(self) == vars(other)

    __hash__ = None  # type: ignore[assignment]

    def blocking_credential(self, *, is_first: bool = False) -> tuple[str, str]:
        """Return id and secret of the device, as they are in the file. Raises ConfigurationError.

        A file that others can read is worth a warning, but not with each request.
        """
        option = "--device-secret-file"
        text = read_text(self.secret_file, option, is_secret=is_first)
        try:
            return parse_credential(text, self._given_id)
        except ConfigurationError as error:
            raise ConfigurationError(f"{option}: {self.secret_file}: {error}") from None

    def kept_ticket(self) -> Ticket | None:
        """Return the ticket that is kept for this device and master, None if there is none.

        Raises ConfigurationError where what is kept is damaged, or can't be read.
        """
        import json  # noqa: PLC0415

        path = os.path.join(self.state_dir, KEPT_NAME)
        if not self.state_dir or not os.path.exists(path):
            return None
        text = read_text(path, "--state-dir")
        try:
            kept = json.loads(text)
            if kept["master"] != self.url or kept["device_id"] != self.device_id:
                return None
            return Ticket.from_fields(kept["ticket"])
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError, TicketError):
            raise ConfigurationError(f"--state-dir: {path} is damaged") from None

    def kept_text(self, ticket: Ticket) -> str:
        """Return what is kept of a ticket. It holds secrets."""
        import json  # noqa: PLC0415

        place = json.dumps({"master": self.url, "device_id": self.device_id})
        return f'{place[:-1]}, "ticket": {ticket.to_json()}}}\n'


class Master:
    """Has the ticket that counts; of the loop's thread."""

    def __init__(
        self,
        client: Client,
        workers: Workers,
        settings: MasterSettings,
        former: Ticket | None = None,
    ) -> None:
        """`client` connects when there is a ticket, and says what became of its attempts.

        `former` is the ticket that was there before this session master.
        """
        self._client, self._workers, self.settings = client, workers, settings
        self.ticket = former
        """The one that counts, or the last one that did."""
        self._can_serve = False  # another connection, for what is known here
        self._ends_at = 0.0  # this and all other times: the loop's
        self._server_at = 0  # which of its servers is next
        # The latest that was proven, its end, and its server.
        self._proven: tuple[Ticket, float, int] | None = None
        self._kept: Ticket | None = None
        self._keep_next: str | None = None
        self._is_keeping = self._has_complained = False
        self._retry = Retry(fraction, 0.0)
        self._timer: Timer | None = None
        self._fetch: Fetch | None = None  # the request that is under way
        self._is_renewal = False  # it is for a tunnel that takes over
        self._not_before = 0.0  # the master has said so
        self.renew_at = 0.0
        """When it is asked again, if the tunnel stays; 0 if no time is set."""
        self.answered_at: float | None = None
        """When it gave a ticket, UTC Unix seconds."""
        self.failure = ""
        """Why it gave none when it was asked last, "" if it did."""
        self.is_revoked = False
        """It has said that this device is revoked."""

    @property
    def is_usable(self) -> bool:
        """Whether another connection can be opened with the ticket."""
        return self._can_serve and self._client.loop.now < self._ends_at

    @property
    def proven_left_s(self) -> float:
        """How long the latest ticket that was proven is valid."""
        return self._proven[1] - self._client.loop.now if self._proven else 0.0

    @property
    def wait_s(self) -> float:
        """How long no attempt makes sense."""
        return 0.0 if self.is_usable else max(0.0, self._not_before - self._client.loop.now)

    @property
    def server(self) -> Address | None:
        """The relay that the next attempt goes to."""
        if self.ticket is None:
            return None
        servers = self.ticket.servers
        text = servers[self._server_at % len(servers)]
        return parse_address(text, "servers", default_port=RELAY_PORT)

    def report(self) -> dict[str, Any]:
        """Return what /status shows of it."""
        from ..net.figures import utc_text  # noqa: PLC0415

        left_s = self.renew_at - self._client.loop.now
        return {
            "url": self.settings.url,
            "device_id": self.settings.device_id,
            "answered": utc_text(self.answered_at),
            "asked_in_s": round(max(0.0, left_s), 1) if self.renew_at else None,
            "failure": self.failure or None,
        }

    # --- what the client tells ---------------------------------------------------------

    def begin(self) -> None:
        """Begin with the ticket that is kept, if it counts."""
        try:
            ticket = self._kept = self.settings.kept_ticket()
            if ticket is not None:
                self._client.check_cipher(ticket)
        except ConfigurationError as error:
            log.warning("%s; asking the session master", error)
            return
        if ticket is None or ticket.created is None or ticket.valid is None:
            return
        age_s, life_s = time.time() - ticket.created, ticket.valid - ticket.created
        if age_s >= life_s:
            return
        log.info("going on with the ticket that is kept in %s", self.settings.state_dir)
        self._kept = ticket
        if age_s < 0:  # made in this clock's future: nobody knows its age
            self._take(ticket, life_s, 0.0)
        else:
            self._take(ticket, life_s - age_s, life_s * _share() - age_s)

    def ask(self) -> None:
        """Ask for a ticket, and let the client connect with it; drop what is under way."""
        self._ask(is_renewal=False)

    def sent(self) -> None:
        """The ticket's token is about to be sent: aes-gcm is for a single connection."""
        if self.ticket is not None and self.ticket.cipher == "aes-gcm":
            self._can_serve = False

    def proven(self) -> None:
        """The relay has accepted the ticket: keep it."""
        ticket = self.ticket
        if ticket is None:
            return
        self._proven = ticket, self._ends_at, self._server_at
        if ticket.cipher == "aes-gcm":
            self._forget()
        elif ticket is not self._kept and self.settings.state_dir:
            self._kept = ticket
            self._keep(self.settings.kept_text(ticket))

    def attempt_failed(self, error: SniTunError, proven_s: float | None, delay_s: float) -> str:
        """An attempt or a tunnel is over: see what that means for the ticket.

        Return what comes next, where the client needn't try again for the sake of its tunnel,
        else "".
        """
        if proven_s is None:
            self._server_at += 1
        if not isinstance(error, (RefusedError, AuthenticationError, RevokedError)):
            return ""
        self._can_serve = False
        if self._proven is None or self._proven[0].cipher == "aes-gcm":
            return ""
        if self._proven[0] is self.ticket or isinstance(error, RevokedError):
            self._proven = None
            return ""
        # The new one isn't accepted (yet), the former one may be, when its tunnel is lost, or was.
        self.ticket, self._ends_at, self._server_at = self._proven
        self._can_serve = True
        delay_s += FIRST_S
        self._schedule(delay_s)
        if self._client._serving is None:
            return ""
        return f"the former ticket stays; another one in {delay_s:.1f} s"

    def close(self) -> None:
        """Ask no more; what is under way is ended and forgotten."""
        self._schedule(0.0)
        fetch, self._fetch = self._fetch, None
        if fetch is not None:
            fetch.cancel()

    # --- asking ------------------------------------------------------------------------

    def _schedule(self, delay_s: float) -> None:
        """Ask again in that time, whatever becomes of the tunnel; not at all if 0."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self.renew_at = 0.0
        if delay_s:
            self.renew_at = self._client.loop.now + delay_s
            self._timer = self._client.loop.call_later(delay_s, self._renew)

    def _renew(self) -> None:
        self._timer, self.renew_at = None, 0.0
        # Without a ticket that can be used, and without a tunnel, the client's attempts ask.
        if self.is_usable or self._client._serving is not None:
            self._ask(is_renewal=True)

    def _ask(self, *, is_renewal: bool) -> None:
        import json  # noqa: PLC0415

        self.close()
        self._is_renewal = is_renewal
        settings, others = self.settings, self._client.settings
        fields = {"aes_key": os.urandom(KEY_SIZE).hex(), "aes_iv": os.urandom(IV_SIZE).hex()}
        self._fetch = fetch = Fetch(
            settings.url,
            "--master",
            "/v1/token",
            json.dumps(fields),
            ca_file=settings.ca_file,
            proxy=others.proxy_url,
            proxy_password=others.proxy_password,
        )
        log.debug("asking the session master %s for a ticket", settings.url)
        job = partial(_blocking_ask, settings, fetch)
        if not self._workers.submit(job, partial(self._answered, fetch, fields)):
            self._failed(MasterError("no thread can be started to ask the session master"))

    def _answered(
        self,
        fetch: Fetch,
        fields: dict[str, Any],
        found: Found | None,
        error: Exception | None,
    ) -> None:
        if fetch is not self._fetch:
            return
        self._fetch = None
        try:
            if found is None:
                place = self.settings.url
                said = reason(error).removeprefix(f"{place.split('/')[2]}: ")
                raise MasterError(f"can't ask the session master {place}: {said}")
            ticket, life_s = self._ticket_of(fields, *found)
        except SniTunError as failure:
            self._failed(failure)
            return
        self.answered_at, self.failure, self.is_revoked = time.time(), "", False
        self._not_before = 0.0
        self._retry.reset()
        self._take(ticket, life_s, life_s * _share())
        text = "the session master gave a ticket for %s, valid until %s UTC"
        log.info(text, ticket.hostname or "this client", utc(ticket.valid or 0.0))
        self._client.connect()

    def _take(self, ticket: Ticket, left_s: float, renew_in_s: float) -> None:
        self.ticket, self._server_at = ticket, 0
        if self._proven is not None and self._client._serving is not None:
            # A renewal stays where the tunnel is, if it may: devices may have found that address.
            former, at = self._proven[0].servers, self._proven[2]
            if (server := former[at % len(former)]) in ticket.servers:
                self._server_at = ticket.servers.index(server)
        self._can_serve, self._ends_at = True, self._client.loop.now + left_s
        self._schedule(max(LEAST_RENEWAL_S, renew_in_s))

    def _ticket_of(
        self, fields: dict[str, Any], answer: dict[str, Any], device_id: str, secret: str
    ) -> tuple[Ticket, float]:
        """Return the ticket that an answer and our `fields` make, and its life in seconds.

        Raises MasterError.
        """
        import json  # noqa: PLC0415

        status, body, master = answer["status"], answer["body"], self.settings.url
        try:
            found = json.loads(body)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            found = {}
        if status != 200:
            self._note_status(status, answer["retry_after"], device_id)
            said = str(found.get("message") or "").replace(secret, "[secret]")[:MAX_SAID]
            text = f"the session master {master} answers {status}" + (said and f": {said!r}")
            if status == 401:
                text += f"; the secret is that of {self.settings.secret_file}"
            if 300 <= status < 400:
                text += "; it leads elsewhere, which isn't followed: is its URL right?"
            raise (DeniedError if status in (401, 403) else MasterError)(text)
        found.update(fields, device_id=device_id)
        try:
            ticket = Ticket.from_fields(found)
            self._client.check_cipher(ticket)
        except ConfigurationError as error:
            text = f"the session master {master} gives no ticket that can be used: {error}"
            raise MasterError(text) from None
        created = ticket.created
        if created is None or ticket.valid is None or ticket.valid <= created:
            raise MasterError(f"the session master {master} gives a token without a life")
        return ticket, ticket.valid - created

    def _note_status(self, status: int, retry_after: str, device_id: str) -> None:
        """Note what an answer without a ticket means for the next request."""
        now = self._client.loop.now
        if status in (401, 403):
            self.is_revoked = status == 403
        if status == 403:
            self._not_before = now + REVOKED_S
            self._can_serve, self._proven = False, None
            self._forget()
        elif retry_after.isascii() and retry_after.isdigit():
            self._not_before = now + min(int(retry_after[:9]), LONGEST_RETRY_AFTER_S)

    def _failed(self, error: SniTunError) -> None:
        """The master gave no ticket."""
        client, self.failure = self._client, str(error)
        if not self._is_renewal:
            client.attempt_failed(error)
            return
        now = client.loop.now
        delay_s = max(self._retry.delay_s(error, None), self._not_before - now)
        client.history.add(error, None)
        plan = f"it is asked again in {delay_s:.1f} s"
        client.history.say(str(error), plan, now, is_rare=self.is_revoked)
        self._schedule(delay_s)

    # --- what is kept --------------------------------------------------------------------

    def _forget(self) -> None:
        if self._kept is not None:
            self._kept = None
            self._keep("")

    def _keep(self, text: str) -> None:
        """Write the file on a worker thread, one after the other; "" removes it."""
        self._keep_next = text
        if not self._is_keeping:
            self._is_keeping = True
            self._keep_now()

    def _keep_now(self) -> None:
        job = partial(_blocking_keep, self.settings, self._keep_next or "")
        if self._workers.submit(job, self._has_kept):
            self._keep_next = None
        else:  # all threads are busy
            self._client.loop.call_later(FIRST_S, self._keep_now)

    def _has_kept(self, _: None, error: Exception | None) -> None:
        if error is not None and not self._has_complained:
            folder = self.settings.state_dir
            log.warning("--state-dir: the ticket can't be kept in %s: %s", folder, reason(error))
        self._has_complained = error is not None
        self._is_keeping = self._keep_next is not None
        if self._is_keeping:
            self._keep_now()


def _share() -> float:
    """Return after which share of its life a ticket is renewed."""
    return RENEW_FROM + (RENEW_TO - RENEW_FROM) * fraction()


def _blocking_ask(settings: MasterSettings, fetch: Fetch) -> Found:
    device_id, secret = settings.blocking_credential()
    headers = {
        "Authorization": f"Bearer {device_id}.{secret}",
        "Content-Type": "application/json",
    }
    return fetch.blocking_run(headers), device_id, secret


def _blocking_keep(settings: MasterSettings, text: str) -> None:
    """Replace the kept ticket as a whole, or remove it. Raises OSError."""
    path = os.path.join(settings.state_dir, KEPT_NAME)
    if text:
        blocking_save(path, text)
    elif os.path.exists(path):
        os.unlink(path)
