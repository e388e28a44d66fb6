"""What a client is told: checked as a whole before any of it counts."""

from __future__ import annotations

from ..errors import ConfigurationError, ExpiredError, UsageError, wrong_setting
from ..net.service import bounded, budget, channel_idle
from ..net.tuning import ANSWER_S, CHANNEL_IDLE_S, CLIENT_BUDGET_BYTES, CONNECT_S, KEEPALIVE_S
from ..protocol.names import Address, is_hostname, normal_hostname, parse_address, shown
from ..protocol.ticket import RELAY_PORT, Ticket

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from ..net.proxy import Proxy
    from ..tls import Certificate, TlsStream
    from .access import Access
    from .master import MasterSettings

ENDPOINT = "127.0.0.1:443"
# The name of an endpoint that stands for all others.
ANY = "*"
TLS_ALPN = "http/1.1"
PROXY_PROTOCOLS = ("v1", "v2")
# Handlers within the program: threads at a time, and connections that wait for one. Beyond
# that, devices are better told at once.
THREADS = 16
WAITING = 512
RECONNECT_SPREAD_S = 10.0
# As many devices as a small machine has memory and descriptors for.
MAX_CHANNELS = 4000
# The relay's own time limit for silence is 90 s at published ones.
LEAST_KEEPALIVE_S, MOST_KEEPALIVE_S = 1.0, 75.0
PROBE_PORT = 443


class EndpointSettings:
    """What a client is told about one endpoint."""

    def __init__(
        self,
        address: str | None,
        names: str | Sequence[str] = ANY,
        *,
        tls_cert: str = "",
        tls_key: str = "",
        tls_alpn: str = "",
        proxy_protocol: str = "",
        health_interval_s: float = 0.0,
        health_path: str = "",
        connect_timeout_s: float = CONNECT_S,
        source: str = "--",
    ) -> None:
        """Check and take the settings. Raises ConfigurationError, which names the option.

        `address`: HOST:PORT, [IPV6]:PORT or unix:/PATH, None for a handler within this program;
        `names`: the hostnames that lead there, `*.` before one for all that have one label more,
        `*` for whatever no other endpoint has; `tls_cert`, `tls_key`: files to terminate TLS
        with, `tls_alpn`: what it offers, such as "h2,http/1.1"; `proxy_protocol`: v1 or v2;
        `health_interval_s`: how often to see whether it is there, by a GET of `health_path` or
        else by connecting; `connect_timeout_s`: how long to wait for it; `source` goes before
        the options' names in messages.
        """
        self.source = source
        names = (names,) if isinstance(names, str) else tuple(names)
        is_option = source == "--"
        # What messages about names, and about the address, begin with.
        self._place = f"{source}endpoint" if is_option else source.strip()
        self.names = tuple(_pattern(name, self._place) for name in names)
        self.address: Address | None = None
        if address is not None:
            option = self._place if is_option else f"{source}address"
            self.address = parse_address(address, option, can_be_unix=True)
        if not tls_cert and (tls_key or tls_alpn):
            raise self._only("tls-key" if tls_key else "tls-alpn", "tls-cert")
        self.tls = (tls_cert, tls_key, self._alpn(tls_alpn or TLS_ALPN)) if tls_cert else None
        """Certificate's file, key's file and protocols, where TLS ends in the client."""
        if proxy_protocol and proxy_protocol not in PROXY_PROTOCOLS:
            raise self._wrong("proxy-protocol", f"{shown(proxy_protocol)}; expected v1 or v2")
        self.proxy_version = int(proxy_protocol[1:] or 0)
        """The version of the PROXY protocol; 0 for none."""
        if health_path and not health_interval_s:
            raise self._only("health-path", "health-interval")
        if health_path and (not health_path.startswith("/") or not _is_visible(health_path)):
            raise self._wrong(
                "health-path", f"{shown(health_path)}; expected a path such as /health"
            )
        self.health_path = health_path
        self.health_interval_s = health_interval_s and bounded(
            health_interval_s, f"{source}health-interval", 1, 86400, "seconds"
        )
        self.connect_timeout_s = bounded(
            connect_timeout_s, f"{source}connect-timeout", 0.1, 300, "seconds"
        )

    def __str__(self) -> str:
        return f"{', '.join(self.names)} at {self.address or 'this program'}"

    def preface(
        self, device: bytes = bytes(4), tls: TlsStream | None = None, **fields: Any
    ) -> bytes:
        """Return the header of the PROXY protocol, b"" without that.

        For a device's packed address (default: none, as for a check), the TLS that ended here, and
        the other fields of proxy_protocol.version_2.
        """
        if not self.proxy_version:
            return b""
        from ..protocol.proxy_protocol import version_1, version_2  # noqa: PLC0415  few need it

        if self.proxy_version == 1:
            return version_1(device)
        if tls is not None:
            fields.update(alpn=tls.alpn.encode(), tls_version=tls.version, tls_cipher=tls.cipher)
        return version_2(device, **fields)

    def _wrong(self, option: str, found: str) -> ConfigurationError:
        return wrong_setting(f"{self.source}{option}", found)

    def _only(self, option: str, other: str) -> ConfigurationError:
        return self._wrong(option, f"only with {'--' * (self.source == '--')}{other}")

    def _alpn(self, text: str) -> tuple[str, ...]:
        protocols = tuple(part.strip() for part in text.split(","))
        if not all(0 < len(name) < 256 and _is_visible(name) for name in protocols):
            raise self._wrong("tls-alpn", f"{shown(text)}; expected names such as h2,http/1.1")
        return protocols


def split_endpoint(text: str) -> tuple[str, str]:
    """Return address and name of `NAME=ADDRESS`, or of an address alone."""
    name, equals, address = text.partition("=")
    if not equals or ":" in name or "/" in name:  # the path of a unix socket may have a `=`
        return text, ANY
    return address, name


def _pattern(name: str, option: str) -> str:
    """Return a hostname, one that begins with `*.`, or `*`, in normal form."""
    name = normal_hostname(name)
    if name != ANY and not is_hostname(name[2:] if name.startswith("*.") else name):
        said = f"{shown(name)} is no name; expected HOSTNAME, *.HOSTNAME or *"
        raise wrong_setting(option, said)
    return name


def _is_visible(text: str) -> bool:
    return text.isascii() and text.isprintable() and " " not in text


class Settings:
    """A client's settings; all but `crypto`, `admin` and `admin_token` can change as it runs."""

    def __init__(
        self,
        ticket: Ticket | str | None = None,
        endpoint: str | Sequence[str] = ENDPOINT,
        *,
        endpoints: Sequence[EndpointSettings] = (),
        acme_endpoint: str = "",
        allow: Sequence[str] = (),
        allow_file: str = "",
        block: Sequence[str] = (),
        block_file: str = "",
        server: str = "",
        master: str = "",
        device_id: str = "",
        device_secret_file: str = "",
        master_ca: str = "",
        state_dir: str = "",
        proxy: str = "",
        proxy_password: str | None = None,
        once: bool = False,
        exit_on_refusal: bool = False,
        keepalive_s: float = KEEPALIVE_S,
        reconnect_spread_s: float = RECONNECT_SPREAD_S,
        probe_s: float = 0.0,
        probe_address: str = "",
        budget_bytes: int = CLIENT_BUDGET_BYTES,
        max_channels: int = MAX_CHANNELS,
        max_new_channels: int = 0,
        channel_idle_s: float = CHANNEL_IDLE_S,
        congestion_control: str = "",
        crypto: str = "",
        admin: str = "",
        admin_token: str = "",
        **of_endpoint: Any,
    ) -> None:
        """Check and take the settings. Raises ConfigurationError, which names the option.

        `ticket`: parsed or as text, None where a session master gives it;
        `endpoint`: HOST:PORT, [IPV6]:PORT or unix:/PATH, or several of them with the names
        that lead there, NAME=ADDRESS; `of_endpoint`: what else EndpointSettings takes, for all
        of them; `endpoints`: more, each with its own
        settings; `acme_endpoint`: where connections go that ask for acme-tls/1; `allow`, `block`:
        networks (CIDR) from which devices may come, or not, and files of them; `server`: the
        relay, instead of the ticket's; `master`, `device_id`, `device_secret_file`,
        `master_ca`, `state_dir`: see MasterSettings; `proxy`: http://… or socks5://… (see
        proxy.py), `proxy_password` overrides the URL's; `once`: end with the first failure;
        `exit_on_refusal`: end when the relay has refused three times in a row, or the session
        master has revoked this client; `keepalive_s`:
        PING after that many seconds of silence; `reconnect_spread_s`: a relay that went away is
        tried again within that; `probe_s`: how often to open the own hostname, 0 for never,
        at `probe_address` (HOST:PORT; default: the ticket's hostname, port 443);
        `budget_bytes`: payload that all channels may hold together; `max_channels`:
        open ones, `max_new_channels`: new ones in a second, 0 for no limit; `channel_idle_s`:
        a channel on which nothing moves is closed then; `congestion_control`: one of the
        kernel's algorithms, for the tunnel; `crypto`: the package; `admin`: where to answer
        questions (see admin.py), `admin_token`: what may ask.
        """
        self.ticket = Ticket.parse(ticket) if isinstance(ticket, str) else ticket
        self.master: MasterSettings | None = None
        if master:
            if ticket is not None:
                raise UsageError("--master: a ticket is there, too; expected one of them")
            from .master import MasterSettings  # noqa: PLC0415  many have a ticket

            self.master = MasterSettings(
                master, device_id, device_secret_file, master_ca, state_dir
            )
        elif ticket is None:
            raise UsageError("no ticket, and no --master to ask for one")
        elif device_id or device_secret_file or master_ca:
            name = "device-id" if device_id else "master-ca"
            name = "device-secret-file" if device_secret_file else name
            raise UsageError(f"--{name}: only with --master")
        texts = [endpoint] if isinstance(endpoint, str) else endpoint
        for name in ("tls-cert", "proxy-protocol"):
            if not texts and of_endpoint.get(name.replace("-", "_")):
                raise UsageError(f"--{name}: only with --endpoint; a section has its own")
        named = [EndpointSettings(*split_endpoint(text), **of_endpoint) for text in texts]
        self.endpoints = [*named, *endpoints]
        self._check_names()
        self.acme_endpoint: Address | None = None
        if acme_endpoint:
            self.acme_endpoint = parse_address(acme_endpoint, "--acme-endpoint", can_be_unix=True)
        self.access: Access | None = None
        if allow or allow_file or block or block_file:
            from .access import Access, read_networks  # noqa: PLC0415  few need it

            self.access = Access(
                read_networks(allow, allow_file, "--allow"),
                read_networks(block, block_file, "--block"),
            )
        place = server or (self.ticket.server if self.ticket is not None else "")
        self.server: Address | None = None
        """The relay; None where the session master says which."""
        if place:
            self.server = parse_address(place, "--server", default_port=RELAY_PORT)
        self.proxy: Proxy | None = None
        self.proxy_url, self.proxy_password = proxy, proxy_password
        if proxy:
            from ..net.proxy import parse_proxy  # noqa: PLC0415  few need it

            self.proxy = parse_proxy(proxy, password=proxy_password)
        elif proxy_password is not None:
            raise UsageError("--proxy-password-file: only with --proxy")
        self.once, self.exit_on_refusal = once, exit_on_refusal
        self.keepalive_s = bounded(
            keepalive_s, "--keepalive", LEAST_KEEPALIVE_S, MOST_KEEPALIVE_S, "seconds"
        )
        self.reconnect_spread_s = bounded(
            reconnect_spread_s, "--reconnect-spread", 0, 3600, "seconds"
        )
        self.probe_s = probe_s and bounded(probe_s, "--probe", 1, 86400, "seconds")
        self.probe_address = None
        if probe_address:
            self.probe_address = parse_address(
                probe_address, "--probe-address", default_port=PROBE_PORT
            )
        if probe_s and self.ticket is not None and not self.ticket.hostname:
            raise ConfigurationError("--probe: the ticket names no hostname that could be opened")
        self.budget_bytes = budget(budget_bytes)
        self.max_channels = int(bounded(max_channels, "--max-channels", 1, 10**6, "channels"))
        self.max_new_channels = int(
            bounded(max_new_channels, "--max-new-channels", 0, 10**6, "channels a second")
        )
        self.channel_idle_s = channel_idle(channel_idle_s)
        self.congestion_control, self.crypto = congestion_control, crypto
        self.admin, self.admin_token = admin, admin_token
        self.certificates: dict[object, Certificate] = {}
        """Those of the endpoints that terminate TLS, by their `tls`."""
        for settings in self.endpoints:
            self.add_certificate(settings)

    def add_certificate(self, settings: EndpointSettings) -> None:
        """Read the certificate of an endpoint, if it has one. Raises ConfigurationError."""
        if settings.tls is None or settings.tls in self.certificates:
            return
        from ..tls import Certificate  # noqa: PLC0415  few need it

        certificate = Certificate(*settings.tls, option=f"{settings.source}tls-cert")
        self.certificates[settings.tls] = certificate
        try:
            certificate.take(certificate.blocking_load())
        except ConfigurationError as error:
            # The clock may be set later; and how would the first one come, or the next, if there
            # were no tunnel for the question?
            if self.acme_endpoint is None and not isinstance(error, ExpiredError):
                raise
            certificate.failure = str(error)

    def _check_names(self) -> None:
        taken: dict[str, EndpointSettings] = {}
        for endpoint in self.endpoints:
            for name in endpoint.names:
                if name in taken:
                    said = f"{name} leads to {taken[name].address} already, and here to"
                    said += f" {endpoint.address}; expected one endpoint for each name"
                    raise wrong_setting(endpoint._place, said)
                taken[name] = endpoint

    @property
    def proven_s(self) -> float:
        """How long a received byte proves that the tunnel is there."""
        return self.keepalive_s + ANSWER_S

    def has_same_tunnel(self, other: Settings) -> bool:
        """Tell whether a tunnel that was opened with `other` is as these settings want it."""
        mine, its = self.ticket, other.ticket
        return (
            all(getattr(mine, name, "") == getattr(its, name, "") for name in Ticket.__slots__)
            and self.master == other.master
            and str(self.server) == str(other.server)
            and str(self.proxy) == str(other.proxy)
            and self.congestion_control == other.congestion_control
        )
