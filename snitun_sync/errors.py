"""What snitun_sync raises.

    SniTunError
    ├── MisuseError            the caller broke a rule of this API
    ├── ConfigurationError     an option, a file or a field of it is wrong
    │   ├── UsageError         an option's text is wrong, or options don't fit together
    │   ├── UnreadableError    a file that was named can't be read
    │   ├── ExpiredError       a certificate's time is over, or this machine's clock is wrong
    │   └── TicketError        the client's credential is malformed
    ├── ViolationError         the other side broke the wire protocol
    │   └── HelloError         a device's first bytes are no TLS ClientHello
    ├── AuthenticationError    the other side doesn't have the tunnel's key
    ├── TokenError             a token is malformed, forged or expired
    ├── LinkError              the connection between client and relay
    │   ├── UnreachableError   it can't be opened
    │   │   └── StrangerError    what answers there is no relay
    │   ├── RefusedError       the relay closed it before the tunnel was up
    │   └── LostError          it was up and has ended
    │       ├── DeadLinkError    because nothing came through it any more
    │       ├── TakenOverError   because of another one with the same names
    │       └── RevokedError     because its token was revoked
    ├── MasterError            the session master gives no token
    │   └── DeniedError          because it refuses this client
    ├── StoreError             the session master's database can't be used
    ├── ListenError            an address can't be listened on
    ├── NotReadyError          who was asked for its status isn't ready
    ├── ChannelError           one device's connection was cut
    └── EndpointError          the local service can't be reached

The text of each names what was found and what was expected; it never holds a
token or a key.
"""

from __future__ import annotations


class SniTunError(Exception):
    """Base of everything that snitun_sync raises on purpose."""


class MisuseError(SniTunError):
    """The caller broke a rule of this API."""


class ConfigurationError(SniTunError):
    """An option, a file or a field of it is wrong; the text says which."""


class UsageError(ConfigurationError):
    """An option's text is wrong, or options don't fit together."""


def wrong_setting(name: str, text: str) -> ConfigurationError:
    """Return what to raise for the option `name` (`--…`), or for what a file calls so."""
    kind = UsageError if name.startswith("--") else ConfigurationError
    return kind(f"{name}: {text}")


class UnreadableError(ConfigurationError):
    """A file that was named can't be read."""


class ExpiredError(ConfigurationError):
    """A certificate's time is over, or this machine's clock is wrong."""


class TicketError(ConfigurationError):
    """The client's credential is malformed."""


class ViolationError(SniTunError):
    """The other side broke the wire protocol."""


class HelloError(ViolationError):
    """A device's first bytes are no TLS ClientHello."""


class AuthenticationError(SniTunError):
    """The other side doesn't have the tunnel's key."""


class TokenError(SniTunError):
    """A token is malformed, forged or expired."""


class LinkError(SniTunError):
    """The connection between client and relay."""


class UnreachableError(LinkError):
    """No connection to the relay could be opened."""


class StrangerError(UnreachableError):
    """Something else than a relay answers at its address, such as a captive portal."""


class RefusedError(LinkError):
    """The relay closed the connection before the tunnel was up."""


class LostError(LinkError):
    """The tunnel was up and has ended."""


class DeadLinkError(LostError):
    """Nothing comes through the tunnel any more, or its local address is gone."""


class TakenOverError(LostError):
    """Another connection leads the tunnel's names now."""


class RevokedError(LostError):
    """The tunnel's token was revoked."""


class MasterError(SniTunError):
    """The session master gives no token."""


class DeniedError(MasterError):
    """The session master refuses this client: its secret is wrong, or it was revoked."""


class StoreError(SniTunError):
    """The session master's database can't be used."""


class ListenError(SniTunError):
    """An address can't be listened on."""


class NotReadyError(SniTunError):
    """The client or relay that was asked for its status isn't ready."""


class ChannelError(SniTunError):
    """One device's connection was cut."""


class EndpointError(SniTunError):
    """The local service can't be reached."""
