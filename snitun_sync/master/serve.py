"""The command `serve` of the session master: its options, and its life."""

from __future__ import annotations

from ..errors import UsageError
from ..options import CHECK

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from ..net.service import Service
    from ..options import Options, Parser
    from .devices import Commands

DESCRIPTION = """\
Gives tokens to devices, and tells relays which of them are revoked: docs/master.md.

  snitun-master serve --database snitun.db --fernet-key-file fernet.key \\
      --relay relay.example.com --listen '*:8443' \\
      --tls-cert master.crt --tls-key master.key

Keys and certificate are read again when their files change. SIGHUP reads all settings; --relay,
--token-ttl and --log-level count from then on. SIGTERM stops it: requests that are under way
get 5 s. SIGUSR1 logs how it goes."""

GRACE_S = 5.0
# What SIGHUP doesn't change.
AT_START = """admin-token-file crypto database fernet-key-file insecure listen log-format
    proxy-protocol-from tls-cert tls-key"""


def add_parser(commands: Commands) -> None:
    """Add the command to those of the program."""
    text = "serve tokens to devices, and revocations to relays"
    serve: Parser = commands.add_parser("serve", help=text, description=DESCRIPTION)
    serve.add("--database FILE", "the devices; made where there is none", is_required=True)
    text = "the relay's keys; the first signs"
    serve.add("--fernet-key-file FILE", text, is_required=True)
    serve.add(
        "--relay HOST[:PORT]",
        "where clients find a relay; repeatable: each answer begins with another one",
        action="append",
        is_required=True,
    )
    text = "how long a token is valid, 60s to 30d (default: 24h)"
    serve.add("--token-ttl TIME", text, 86400.0)
    text = "where to serve; *:PORT for all addresses (default: 127.0.0.1:8443)"
    serve.add("--listen HOST:PORT", text, "127.0.0.1:8443")
    serve.add("--tls-cert FILE", "the certificate and its chain, PEM", "")
    text = "its key, PEM (default: in the certificate's file)"
    serve.add("--tls-key FILE", text, "")
    serve.add("--insecure", "serve without TLS on other addresses than loopback, too")
    serve.add(
        "--proxy-protocol-from CIDR",
        "connections from there begin with a PROXY header that says whose they are; repeatable",
        (),
        action="append",
    )
    text = "who asks for /metrics must know what is in there (default: asks here, without TLS)"
    serve.add("--admin-token-file FILE", text)
    serve.add(f"--{CHECK}", "check all settings and files, print the settings, and exit")
    serve.add_common()


def run(options: Options, read: Callable[[Options], Options]) -> None:
    """Serve until a signal ends it; `read` reads the options again. Raises SniTunError."""
    from ..options import check_service  # noqa: PLC0415
    from ..program import run_service  # noqa: PLC0415
    from .app import make_app  # noqa: PLC0415
    from .service import Master  # noqa: PLC0415

    certificate = None
    if options.tls_key and not options.tls_cert:
        raise UsageError("--tls-key: only with --tls-cert")
    if options.tls_cert:
        from ..tls import Certificate  # noqa: PLC0415

        certificate = Certificate(options.tls_cert, options.tls_key, ["http/1.1"])
        certificate.take(certificate.blocking_load())
    app = make_app(options)

    def make() -> Master:
        return Master(
            app,
            options.listen,
            certificate=certificate,
            proxies=options.proxy_protocol_from,
            is_insecure=options.insecure,
            crypto=options.crypto,
        )

    def reload(service: Service) -> Options:
        assert isinstance(service, Master)
        with read(options) as fresh:
            service.reconfigure(fresh.relay, fresh.token_ttl)
            fresh.grace = GRACE_S
            return fresh

    options.grace = GRACE_S
    try:
        if options.check:
            check_service("snitun-master", options, make)
        else:
            run_service(make, options, reload, AT_START)
    finally:
        app.store.close()
