"""What a client is told: checked as a whole before any of it counts."""

from __future__ import annotations

from ..errors import ConfigurationError, UsageError
from ..net.service import bounded, budget, channel_idle
from ..net.tuning import ANSWER_S, CHANNEL_IDLE_S, CLIENT_BUDGET_BYTES, KEEPALIVE_S
from ..protocol.names import parse_address
from ..protocol.ticket import RELAY_PORT, Ticket

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..net.proxy import Proxy

ENDPOINT = "127.0.0.1:443"
RECONNECT_SPREAD_S = 10.0
# As many devices as a small machine has memory and descriptors for.
MAX_CHANNELS = 4000
# The relay's own time limit for silence is 90 s at published ones.
LEAST_KEEPALIVE_S, MOST_KEEPALIVE_S = 1.0, 75.0
PROBE_PORT = 443


class Settings:
    """A client's settings; all but `crypto`, `admin` and `admin_token` can change as it runs."""

    def __init__(
        self,
        ticket: Ticket | str,
        endpoint: str = ENDPOINT,
        *,
        server: str = "",
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
    ) -> None:
        """Check and take the settings. Raises ConfigurationError, which names the option.

        `ticket`: parsed or as text; `endpoint`: HOST:PORT, [IPV6]:PORT or unix:/PATH;
        `server`: the relay, instead of the ticket's; `proxy`: http://… or socks5://… (see
        proxy.py), `proxy_password` overrides the URL's; `once`: end with the first failure;
        `exit_on_refusal`: end when the relay has refused three times in a row; `keepalive_s`:
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
        self.endpoint = parse_address(endpoint, "--endpoint", can_be_unix=True)
        self.server = parse_address(
            server or self.ticket.server, "--server", default_port=RELAY_PORT
        )
        self.proxy: Proxy | None = None
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
        if probe_s and not self.ticket.hostname:
            raise ConfigurationError("--probe: the ticket names no hostname that could be opened")
        self.budget_bytes = budget(budget_bytes)
        self.max_channels = int(bounded(max_channels, "--max-channels", 1, 10**6, "channels"))
        self.max_new_channels = int(
            bounded(max_new_channels, "--max-new-channels", 0, 10**6, "channels a second")
        )
        self.channel_idle_s = channel_idle(channel_idle_s)
        self.congestion_control, self.crypto = congestion_control, crypto
        self.admin, self.admin_token = admin, admin_token

    @property
    def proven_s(self) -> float:
        """How long a received byte proves that the tunnel is there."""
        return self.keepalive_s + ANSWER_S

    def has_same_tunnel(self, other: Settings) -> bool:
        """Tell whether a tunnel that was opened with `other` is as these settings want it."""
        mine, its = self.ticket, other.ticket
        return (
            all(getattr(mine, name) == getattr(its, name) for name in Ticket.__slots__)
            and str(self.server) == str(other.server)
            and str(self.proxy) == str(other.proxy)
            and self.congestion_control == other.congestion_control
        )
