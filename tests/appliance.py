"""An appliance with other people's programs, and devices that speak HTTP over TLS with it.

Whatever serves here answers the same:

    GET /seen       what it knows of the device, NAME=VALUE a line
    PUT /file/NAME  keeps the body
    GET /file/NAME  returns it
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import shutil
import socket
import socketserver
import ssl
import subprocess
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trustme
from proxyprotocol.v2 import ProxyProtocolV2

from snitun_sync.protocol.names import parse_address
from snitun_sync.status_command import ask
from tests.interop.peers import missing
from tests.support import (
    MIB,
    WAIT_S,
    Credentials,
    Program,
    free_port,
    module,
    pattern,
    pattern_sha256,
    relay,
    wait_until,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from websockets.sync.server import ServerConnection

DOMAIN = "example.test"


def find(program: str) -> str:
    """Return the path of a program of the system; skip the test where it is missing."""
    path = shutil.which(program) or shutil.which(program, path="/usr/sbin:/usr/local/sbin:/sbin")
    if path is None:
        missing(program)
    assert path is not None
    return path


# --- what serves ---------------------------------------------------------------------------

NGINX = """
daemon off; master_process off; pid {folder}/nginx.pid; error_log stderr warn;
events {{ worker_connections 2048; }}
http {{
    access_log off;
    client_body_temp_path {folder}/nginx; proxy_temp_path {folder}/nginx;
    fastcgi_temp_path {folder}/nginx; uwsgi_temp_path {folder}/nginx; scgi_temp_path {folder}/nginx;
    types {{ text/html html; text/javascript js; }}
    ssl_certificate {folder}/appliance.pem; ssl_certificate_key {folder}/appliance.pem;
    set_real_ip_from 127.0.0.1; set_real_ip_from ::1; set_real_ip_from unix:;
    real_ip_header proxy_protocol;
    keepalive_requests 1000000;
    server {{
        listen 127.0.0.1:{http}; listen [::1]:{http}; listen unix:{folder}/http.sock;
        listen 127.0.0.1:{https} ssl http2; listen [::1]:{https} ssl http2;
        listen unix:{folder}/https.sock ssl;
        listen 127.0.0.1:{proxy} proxy_protocol; listen unix:{folder}/proxy.sock proxy_protocol;
        listen 127.0.0.1:{proxy_tls} ssl proxy_protocol;
        listen 127.0.0.1:{h2c} http2;
        client_max_body_size 1g;
        default_type text/plain;
        location = /seen {{
            return 200 "address=$remote_addr\\nscheme=$scheme\\nprotocol=$server_protocol
peer=$realip_remote_addr\\nserver=$proxy_protocol_server_addr:$proxy_protocol_server_port\\n";
        }}
        location /file/ {{ root {folder}/nginx; dav_methods PUT; }}
        location /socket {{
            proxy_pass http://127.0.0.1:{socket};
            proxy_http_version 1.1;
            proxy_set_header Upgrade $http_upgrade;
            proxy_set_header Connection upgrade;
        }}
        location / {{ root {folder}/www; }}
    }}
}}
"""

HAPROXY = """
global
    nbthread 1
    maxconn 2000
defaults
    mode http
    timeout connect 5s
    timeout client 60s
    timeout server 60s
frontend all
    bind 127.0.0.1:{haproxy_proxy} accept-proxy
    bind 127.0.0.1:{haproxy}
    http-request return status 200 content-type text/plain lf-string \
"address=%[src]\\nserver=%[dst]:%[dst_port]\\nauthority=%[fc_pp_authority]\\n\
unique_id=%[fc_pp_unique_id]\\nprotocol=HTTP/%[req.ver]\\n" if {{ path /seen }}
    default_backend nginx
backend nginx
    server nginx 127.0.0.1:{http}
"""

PAGE = """<!doctype html><title>loading</title><script>
const sha256 = async data => [...new Uint8Array(await crypto.subtle.digest("SHA-256", data))]
    .map(byte => byte.toString(16).padStart(2, "0")).join("");
const socket = new WebSocket(`wss://${location.host}/socket`);
window.echo = text => new Promise((resolve, reject) => {
    socket.onmessage = event => resolve(event.data);
    socket.onclose = event => reject("closed: " + event.code);
    socket.send(text);
});
const opened = new Promise((resolve, reject) => {
    socket.onopen = resolve;
    socket.onerror = reject;
});
window.load = async count => {
    await opened;
    const names = Array.from({length: count}, (_, number) => `part${number}.js`);
    return Promise.all(names.map(async name => sha256(await (await fetch(name)).arrayBuffer())));
};
</script>"""


def echo(connection: ServerConnection) -> None:
    """A service with a WebSocket that stays open."""
    from websockets.exceptions import ConnectionClosed

    try:
        for message in connection:
            connection.send(message)
    except ConnectionClosed:
        pass


class Tlvs(socketserver.StreamRequestHandler):
    """Answers /seen with all that is in a PROXY header of version 2."""

    timeout = WAIT_S

    def handle(self) -> None:
        head = self.rfile.read(16)
        header = ProxyProtocolV2().unpack(head + self.rfile.read(int.from_bytes(head[14:], "big")))
        tlv = header.tlv
        while self.rfile.readline() != b"\r\n":
            pass
        seen = {
            "address": header.source[0] if header.source else "none",
            "authority": tlv.authority,
            "alpn": (tlv.alpn or b"").decode(),
            "unique_id": tlv.unique_id.decode(),
            "tls": tlv.ssl.version,
            "cipher": tlv.ssl.cipher,
        }
        text = "".join(f"{name}={value}\n" for name, value in seen.items())
        self.wfile.write(f"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n{text}".encode())


class TlvServer(socketserver.ThreadingTCPServer):
    """Where it listens."""

    daemon_threads = True


@dataclass
class Appliance:
    """The programs of one, and where they listen: the ports are in `at`, by name."""

    folder: Path
    authority: trustme.CA
    at: dict[str, int] = field(default_factory=dict)

    @property
    def authority_file(self) -> Path:
        """Who signed the certificates."""
        return self.folder / "authority.pem"

    @property
    def certificate(self) -> Path:
        """A certificate for *.example.test, its key in the same file."""
        return self.folder / "appliance.pem"

    @property
    def www(self) -> Path:
        """What nginx shows besides."""
        return self.folder / "www"

    def issue(self, name: str, *hostnames: str) -> Path:
        """Write a certificate with its key to the file `name`; return its path."""
        path = self.folder / name
        certificate = self.authority.issue_cert(*hostnames)
        path.touch(0o600)
        certificate.private_key_and_cert_chain_pem.write_to_path(str(path))
        return path

    def address(self, name: str) -> str:
        """Return an endpoint by its name: of a port, of one on ::1 (http6), or of a socket."""
        if name.endswith("-unix"):
            return f"unix:{self.folder}/{name[: -len('-unix')]}.sock"
        if name.endswith("-ip6"):
            return f"[::1]:{self.at[name[: -len('-ip6')]]}"
        return f"127.0.0.1:{self.at[name]}"


@contextlib.contextmanager
def appliance(folder: Path) -> Iterator[Appliance]:
    """Run the programs that serve, with their files in `folder`."""
    from websockets.sync.server import serve  # the package's own tests go without it

    nginx, haproxy = find("nginx"), find("haproxy")
    for name in ("www", "nginx/file"):
        (folder / name).mkdir(parents=True)
    rig = Appliance(folder, trustme.CA())
    rig.authority.cert_pem.write_to_path(str(rig.authority_file))
    rig.issue("appliance.pem", f"*.{DOMAIN}")
    ports = ("http", "https", "proxy", "proxy_tls", "h2c", "haproxy", "haproxy_proxy")
    rig.at.update((name, free_port()) for name in ports)
    with (
        serve(echo, "127.0.0.1", 0, max_size=None) as sockets,
        TlvServer(("127.0.0.1", 0), Tlvs) as tlvs,
    ):
        for name, server in (("socket", sockets), ("tlvs", tlvs)):
            threading.Thread(target=server.serve_forever, daemon=True).start()
            rig.at[name] = server.socket.getsockname()[1]
        (folder / "nginx.conf").write_text(NGINX.format(folder=folder, **rig.at))
        (folder / "haproxy.cfg").write_text(HAPROXY.format(**rig.at))
        with (
            Program(nginx, "-c", folder / "nginx.conf", "-p", folder),
            Program(haproxy, "-db", "-f", folder / "haproxy.cfg"),
        ):
            for name in ports:
                wait_until(lambda name=name: listens(rig.at[name]), name)  # type: ignore[misc]
            try:
                yield rig
            finally:
                tlvs.shutdown()


def listens(port: int) -> bool:
    """Tell whether somebody listens on a port."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), WAIT_S):
        return True
    return False


# --- devices -------------------------------------------------------------------------------


class Web(http.client.HTTPSConnection):
    """A device: one connection to the relay that HTTP/1.1 is spoken in, inside TLS."""

    def __init__(
        self,
        hostname: str,
        port: int,
        authority: Path | None,
        *,
        host: str = "127.0.0.1",
        source: str = "",
        alpn: str = "http/1.1",
    ) -> None:
        """`source` is the device's own address; without `authority` it believes anybody."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        if authority is None:
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        else:
            context.load_verify_locations(authority)
        if alpn:
            context.set_alpn_protocols(alpn.split(","))
        super().__init__(hostname, port, timeout=WAIT_S, context=context)
        self._place, self._source, self.tls = (host, port), (source, 0), context

    def __enter__(self) -> Web:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def connect(self) -> None:
        source = self._source if self._source[0] else None
        sock = socket.create_connection(self._place, WAIT_S, source)
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.sock = self.tls.wrap_socket(sock, server_hostname=self.host)
        except BaseException:
            sock.close()
            raise

    def certificate(self) -> bytes:
        """Return the certificate that is shown on this connection, in DER."""
        if self.sock is None:
            self.connect()
        leaf = self.sock.getpeercert(binary_form=True)
        assert isinstance(leaf, bytes)
        return leaf

    def seen(self) -> dict[str, str]:
        """Return what the service knows of this device."""
        self.request("GET", "/seen")
        answer = self.getresponse()
        text = answer.read().decode()
        assert answer.status == 200, text
        return dict(line.split("=", 1) for line in text.splitlines())

    def upload(self, name: str, size: int) -> None:
        """Put `size` bytes of the pattern there."""
        pieces = (pattern(at, min(MIB, size - at)) for at in range(0, size, MIB))
        self.request("PUT", f"/file/{name}", pieces, {"Content-Length": str(size)})
        answer = self.getresponse()
        text = answer.read()
        assert answer.status in (201, 204), text

    def download(self, name: str, size: int) -> None:
        """Get them back, and compare every byte."""
        self.request("GET", f"/file/{name}")
        answer = self.getresponse()
        assert answer.status == 200, answer.read()
        digest, received = hashlib.sha256(), 0
        while piece := answer.read(65536):
            digest.update(piece)
            received += len(piece)
        assert (received, digest.hexdigest()) == (size, pattern_sha256(size))


# --- all of it ----------------------------------------------------------------------------

# Each device has an address that nothing else on this machine connects from.
DEVICE = "127.0.0.5"


@dataclass(frozen=True)
class Kind:
    """A way to a service: the endpoint's address by its name, options, and what it must see."""

    endpoint: str
    options: str = ""
    seen: str = ""


TLS = "tls-cert = {certificate}"
KINDS = {
    "https": Kind("https", "", "address=127.0.0.1 scheme=https"),
    "https-ip6": Kind("https-ip6", "", "address=::1 scheme=https"),
    "https-unix": Kind("https-unix", "", "address=unix: scheme=https"),
    "https-proxy-v1": Kind(
        "proxy_tls", "proxy-protocol = v1", f"address={DEVICE} scheme=https peer=127.0.0.1"
    ),
    "https-proxy-v2": Kind(
        "proxy_tls", "proxy-protocol = v2", f"address={DEVICE} scheme=https peer=127.0.0.1"
    ),
    "http": Kind("http", TLS, "address=127.0.0.1 scheme=http"),
    "http-ip6": Kind("http-ip6", TLS, "address=::1 scheme=http"),
    "http-unix": Kind("http-unix", TLS, "address=unix: scheme=http"),
    "http-proxy-v1": Kind(
        "proxy",
        f"{TLS}\nproxy-protocol = v1",
        f"address={DEVICE} scheme=http peer=127.0.0.1 server=0.0.0.0:443",
    ),
    "http-proxy-v2": Kind(
        "proxy-unix",
        f"{TLS}\nproxy-protocol = v2",
        f"address={DEVICE} scheme=http peer=unix: server=0.0.0.0:443",
    ),
    "haproxy-v1": Kind(
        "haproxy_proxy",
        f"{TLS}\nproxy-protocol = v1",
        f"address={DEVICE} server=0.0.0.0:443 authority= unique_id=",
    ),
    "haproxy-v2": Kind(
        "haproxy_proxy",
        f"{TLS}\nproxy-protocol = v2",
        f"address={DEVICE} server=0.0.0.0:443 authority=haproxy-v2.{DOMAIN}",
    ),
}
# Those of a client within the program, which tests/appliance.py starts.
INSIDE = {
    "flask": f"address={DEVICE} scheme=https server=flask.{DOMAIN} protocol=HTTP/1.1",
    "django": f"address={DEVICE} scheme=https server=django.{DOMAIN} protocol=HTTP/1.1",
    "plain": f"address={DEVICE}",
}
# More ways, for what speaks something else, or more.
OTHERS = {
    "h2c": Kind("h2c", f"{TLS}\ntls-alpn = h2"),
    "both": Kind("haproxy", f"{TLS}\ntls-alpn = h2,http/1.1"),
    "socket": Kind("socket", TLS),
    "tlvs": Kind("tlvs", f"{TLS}\nproxy-protocol = v2\ntls-alpn = mqtt,http/1.1"),
}


@dataclass
class Site:
    """All of it, running."""

    port: int
    port6: int
    """Of the relay at ::1, for devices with IPv6."""
    fernet_key: str
    rig: Appliance
    relay: Program
    client: Program
    inside: Program
    config: Path
    admin: str

    def web(self, name: str, **options: Any) -> Web:
        """A device that wants something of the endpoint NAME.example.test."""
        port = self.port6 if ":" in options.get("host", "") else self.port
        return Web(f"{name}.{DOMAIN}", port, self.rig.authority_file, **options)

    def check(self, name: str, size: int) -> tuple[float, float]:
        """Check an endpoint: what it sees of a device, and `size` bytes there and back.

        Return how many seconds each way took.
        """
        text = KINDS[name].seen if name in KINDS else INSIDE[name]
        expected = dict(part.split("=", 1) for part in text.split())
        with self.web(name, source=DEVICE) as device:
            seen = device.seen()
            assert {key: seen.get(key) for key in expected} == expected
            begin = time.monotonic()
            device.upload(name, size)
            middle = time.monotonic()
            device.download(name, size)
            return middle - begin, time.monotonic() - middle

    def curl(self, name: str, path: str, *arguments: str) -> str:
        """Let curl open a path; return what it prints."""
        host = f"{name}.{DOMAIN}"
        done = subprocess.run(
            [
                *(find("curl"), "--silent", "--show-error", "--fail", "--max-time", "60"),
                *("--cacert", str(self.rig.authority_file)),
                *("--resolve", f"{host}:{self.port}:127.0.0.1"),
                *(*arguments, f"https://{host}:{self.port}{path}"),
            ],
            capture_output=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout.decode()

    def s_client(self, name: str, *arguments: str) -> str:
        """Let openssl shake hands; return all that it prints."""
        host = f"{name}.{DOMAIN}"
        done = subprocess.run(
            [
                *(find("openssl"), "s_client", "-connect", f"127.0.0.1:{self.port}"),
                *("-servername", host, "-verify_hostname", host, "-verify_return_error"),
                *("-CAfile", str(self.rig.authority_file), *arguments),
            ],
            input=b"",
            capture_output=True,
            check=False,
            timeout=WAIT_S,
        )
        return (done.stdout + done.stderr).decode(errors="replace")

    def refused(self, reason: str) -> int:
        """Ask the client how many channels it has refused, for this reason."""
        report = ask(parse_address(self.admin, "--admin", can_be_unix=True), "")
        count: int = report["refused_channels"].get(reason, 0)
        return count


def section(name: str, kind: Kind, rig: Appliance) -> str:
    """Return an endpoint's section of the configuration."""
    options = kind.options.format(certificate=rig.certificate)
    return f"[endpoint {name}]\naddress = {rig.address(kind.endpoint)}\n{options}\n"


@contextlib.contextmanager
def site(folder: Path, *more: str) -> Iterator[Site]:
    """Run all of it, with its files in `folder`; the ticket has the names `more`, too."""
    for part in ("client", "inside"):
        (folder / part).mkdir()
    kinds = {f"{name}.{DOMAIN}": kind for name, kind in {**KINDS, **OTHERS}.items()}
    names = (*kinds, *(f"{name}.{DOMAIN}" for name in more))
    credentials = Credentials(folder / "client", hostname="appliance.test", alias=names)
    inside = Credentials(
        folder / "inside",
        hostname="inside.test",
        alias=tuple(f"{name}.{DOMAIN}" for name in INSIDE),
        fernet_key=credentials.fernet_key,
    )
    kinds[f"*.home.{DOMAIN}"] = KINDS["https"]
    with contextlib.ExitStack() as stack:
        rig = stack.enter_context(appliance(folder))
        server, _ = relay(credentials, "--listen", "[::1]:0")
        stack.enter_context(server)
        server.wait_for(" for devices", 2)
        port, port6 = (
            int(server.wait_for(f"listening on {host}:").split(" for ")[0].rpartition(":")[2])
            for host in ("127.0.0.1", "[::1]")
        )
        for ticket in (credentials, inside):
            ticket.at(f"127.0.0.1:{port}")
        config, admin = folder / "snitun.ini", f"unix:{folder}/admin"
        config.write_text(
            f"[client]\ntoken-file = {credentials.ticket_file}\nadmin = {admin}\n"
            + "log-level = debug\n"
            + "".join(section(name, kind, rig) for name, kind in kinds.items())
        )
        client = stack.enter_context(Program(*module("snitun_sync.client", "--config", config)))
        arguments = (inside.ticket_file, rig.certificate, folder / "inside")
        program = stack.enter_context(Program(*module("tests.applications", *arguments)))
        for one in (client, program):
            one.wait_for("ready: ")
        yield Site(port, port6, credentials.fernet_key, rig, server, client, program, config, admin)
