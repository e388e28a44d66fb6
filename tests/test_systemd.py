"""The units that are shipped, and our programs under a real systemd."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme

from snitun_sync.program import EXIT_UNAVAILABLE
from snitun_sync.protocol.token import new_fernet_key
from tests import systemd_host
from tests.stub_master import StubMaster
from tests.support import (
    HOSTNAME,
    MIB,
    PROJECT,
    WAIT_S,
    Credentials,
    Device,
    Endpoint,
    client_hello,
    download,
    module,
    upload,
    wait_until,
)
from tests.systemd_host import SystemdHost, missing

UNITS = PROJECT / "tools" / "systemd"
SETTINGS = UNITS / "snitun.ini"
CLIENT, SERVER = "snitun-client.service", "snitun-server.service"
MASTER = "snitun-master.service"
MAX_EXPOSURE = 1.5
# man capabilities(7): 1 << CAP_NET_BIND_SERVICE
BIND_SERVICE = 1 << 10
TIME = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC"

WATCHDOG = """\
[Service]
WatchdogSec=5s
RestartSec=100ms
"""
# The ticket's file is this user's, so that a reload can read it.
OWN_USER = "[Service]\nUser=snitun\n"
PATIENT = "[Service]\nTimeoutStopSec=10min\n"

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())


class Site:
    """A host with our units as they are shipped, and their files; nothing of it is started."""

    def __init__(self, host: SystemdHost, folder: Path) -> None:
        self.host, self.folder = host, folder
        self.credentials = Credentials(folder, server="127.0.0.1:443")
        self.endpoint = host.inside(Endpoint)
        self.install(CLIENT)
        self.install(SERVER)
        self.write_keys(self.credentials)
        self.write_ticket(self.credentials)
        self.configure()

    def install(self, unit: str, drop_in: str = "") -> None:
        """Install a unit; `drop_in` changes it."""
        self.host.write_unit(unit, (UNITS / unit).read_text(), drop_in=drop_in)

    def write_keys(self, credentials: Credentials) -> None:
        """Let the relay believe tickets that were made with this key, once it is restarted."""
        self.host.write_file("/etc/snitun/fernet.key", credentials.fernet_key, 0o600)

    def write_ticket(self, credentials: Credentials) -> None:
        """Let the client use this ticket, once it is restarted."""
        text = credentials.ticket_file.read_text()
        self.host.write_file("/etc/snitun/ticket", text, 0o600)

    def configure(
        self,
        *client: str,
        admin: str = "unix:/run/snitun-client/admin",
        endpoint: Endpoint | None = None,
        server: str = "",
    ) -> None:
        """Write the settings, more than the shipped ones in the lines `client` and `server`."""
        text = SETTINGS.read_text()
        for shipped, changed in (
            ("[client]\n", "\n".join(["[client]", "reconnect-spread = 0", *client, ""])),
            ("endpoint = 127.0.0.1:443", f"endpoint = {(endpoint or self.endpoint).address}"),
            ("admin = unix:/run/snitun-client/admin", f"admin = {admin}"),
            ("[server]\n", f"[server]\n{server}\n"),
        ):
            assert text.count(shipped) == 1
            text = text.replace(shipped, changed)
        self.host.write_file("/etc/snitun/snitun.ini", text)

    def start(self) -> None:
        """Start both; return once the tunnel is proven."""
        self.host.systemctl("start", SERVER)
        self.host.systemctl("start", CLIENT)

    def device(self, command: str = "ECHO", hostname: str = HOSTNAME) -> Device:
        """Connect a device."""
        return self.host.inside(lambda: Device(443, command, hostname=hostname))

    def exchange(self) -> None:
        """Check that devices get through."""
        with self.device() as device:
            device.exchange()

    def wait_for_state(self, unit: str, state: str) -> None:
        """Wait for a unit's ActiveState."""
        wait_until(lambda: self.host.show(unit, "ActiveState") == state, f"{unit} is {state}")

    def wait_for_status(self, unit: str, pattern: str) -> None:
        """Wait until `systemctl status` shows a line of the program's that is like `pattern`."""

        def shown() -> bool:
            text = self.host.systemctl("status", unit, check=False).stdout
            return bool(re.search(rf'^ +Status: "{pattern}"$', text, re.MULTILINE))

        wait_until(shown, f"{unit}: {pattern}")

    def tell(self, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run the command `status` of a program, as root."""
        command = ("python3", "-m", f"snitun_sync.{program}", "status", *arguments)
        return self.host.run(*command, check=False)


@pytest.fixture
def host() -> Iterator[SystemdHost]:
    with SystemdHost() as host:
        yield host


@pytest.fixture
def site(host: SystemdHost, tmp_path: Path) -> Iterator[Site]:
    site = Site(host, tmp_path)
    yield site
    for unit in (CLIENT, SERVER):
        journal = host.journal(unit)
        for wrong in ("Operation not permitted", "defect", "Traceback", site.credentials.token):
            assert wrong not in journal, journal
    site.endpoint.close()


# --- the units, as files --------------------------------------------------------------


@pytest.mark.parametrize("unit", [CLIENT, SERVER, MASTER])
def test_systemd_finds_nothing_wrong(unit: str) -> None:
    done = subprocess.run(
        ["systemd-analyze", "verify", UNITS / unit], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@pytest.mark.parametrize("unit", [CLIENT, SERVER, MASTER])
def test_the_sandbox_is_tight(unit: str) -> None:
    command = ["systemd-analyze", "--no-pager", "security", "--offline=true", str(UNITS / unit)]
    table = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"Overall exposure level for \S+: ([\d.]+)", table)
    assert found, table
    assert float(found[1]) <= MAX_EXPOSURE, table


@pytest.mark.parametrize("commented", [False, True], ids=["as shipped", "with all that it has"])
@pytest.mark.parametrize("program", ["client", "server"])
def test_the_settings_are_right(
    program: str, commented: bool, credentials: Credentials, tmp_path: Path
) -> None:
    text = SETTINGS.read_text()
    if commented:
        text = re.sub(r"^#(?! )", "", text, flags=re.MULTILINE)
        found = trustme.CA().issue_cert("home.example.com")
        found.cert_chain_pems[0].write_to_path(str(tmp_path / "home.example.com.crt"))
        (tmp_path / "home.example.com.key").touch(0o600)
        found.private_key_pem.write_to_path(str(tmp_path / "home.example.com.key"))
        assert "/etc/snitun/tls/" in text
        text = text.replace("/etc/snitun/tls/", f"{tmp_path}/")
    (tmp_path / "snitun.ini").write_text(text)
    secret = {
        "client": ("--token-file", credentials.ticket_file),
        "server": ("--fernet-key-file", credentials.key_file),
    }[program]
    done = subprocess.run(
        module(f"snitun_sync.{program}", "--check", "--config", tmp_path / "snitun.ini", *secret),
        capture_output=True,
        text=True,
        check=False,
        cwd=PROJECT,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert f"admin = unix:/run/snitun-{program}/admin " in done.stdout


# --- the host itself ------------------------------------------------------------------


def mounted() -> list[str]:
    """Return what is mounted, without the networks of other tests."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return [line for line in lines if "/run/netns/" not in line]


def test_a_host_leaves_nothing_behind() -> None:
    mounts = mounted()
    with SystemdHost() as host:
        folder, cgroup, pid = host._folder, host._cgroup, host.pid
        assert cgroup is not None and cgroup.exists()
        service = host.run("systemd-run", "--quiet", "sleep", "3600")
        assert service.returncode == 0
        inside = f"/proc/{pid}/ns/net"
        assert Path(inside).resolve() != Path("/proc/self/ns/net").resolve()
    assert not folder.exists()
    assert not cgroup.exists()
    assert not Path(f"/proc/{pid}").exists()
    assert mounted() == mounts
    host.stop()


@pytest.mark.parametrize(
    ("boot", "error"),
    [
        ("echo what is wrong >&2; exit 3", "what is wrong"),
        ("read -r pid rest </proc/self/stat; echo $pid; exec >&2; echo what; exit 3", "ended with"),
        ("read -r pid rest </proc/self/stat; echo $pid; exec >&2; exec sleep 60", "in vain"),
    ],
    ids=["no namespaces", "no systemd", "hangs"],
)
def test_a_host_that_cannot_start_leaves_nothing_behind(
    boot: str, error: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(systemd_host, "_BOOT", boot)
    if error == "in vain":
        monkeypatch.setattr(systemd_host, "START_S", 1.0)
    host = SystemdHost()
    with pytest.raises(RuntimeError, match=error):
        host.start()
    assert host._process is None and host._cgroup is None
    assert not host._folder.exists()


# --- our programs, by the units that are shipped ---------------------------------------


def test_the_client_is_active_once_its_tunnel_is_proven(site: Site) -> None:
    host = site.host
    host.systemctl("start", "--no-block", CLIENT)
    lost = "can't reach the relay 127.0.0.1:443: Connection refused"
    site.wait_for_status(CLIENT, rf"waiting since {TIME}: {lost}")
    assert host.show(CLIENT, "ActiveState") == "activating"
    host.systemctl("start", SERVER)  # returns when it listens
    assert host.show(SERVER, "StatusText").startswith(r"listening on *:443; ")
    host.systemctl("start", CLIENT)  # waits for the start that is under way
    assert host.show(CLIENT, "ActiveState") == "active"
    site.exchange()
    site.wait_for_status(
        CLIENT,
        rf"up since {TIME}: {HOSTNAME} at the relay 127.0.0.1:443 leads to {site.endpoint.address}",
    )
    site.wait_for_status(SERVER, r"listening on \*:443; 1 clients?")
    for program in ("client", "server"):
        told = site.tell(program)
        assert (told.returncode, told.stderr) == (0, "")
        assert told.stdout.startswith("ready ")
        assert HOSTNAME in told.stdout

    # Once more without a tunnel it stays active, and says why there is none.
    host.systemctl("stop", SERVER)
    site.wait_for_status(CLIENT, rf"waiting since {TIME}: {lost}")
    assert host.show(CLIENT, "ActiveState") == "active"


def close_all(listener: socket.socket) -> None:
    """Close each connection at once, until the listener is shut down."""
    with contextlib.suppress(OSError):
        while True:
            listener.accept()[0].close()


def test_a_client_that_is_refused_says_so(site: Site) -> None:
    host = site.host
    site.start()
    host.systemctl("stop", SERVER)
    # Ours would take its time for each: it lets nobody try one token after the other.
    with host.inside(lambda: socket.create_server(("127.0.0.1", 443))) as listener:
        threading.Thread(target=close_all, args=(listener,), daemon=True).start()
        site.wait_for_status(CLIENT, rf"refused since {TIME}: .* it refuses the token, .*")
        assert host.show(CLIENT, "ActiveState") == "active"
        told = site.tell("client")
        assert told.returncode == 1
        assert told.stdout.startswith("NOT READY ")
        assert told.stderr.startswith("snitun-client: not ready: refused: ")
        listener.shutdown(socket.SHUT_RDWR)


def confinement(host: SystemdHost, unit: str) -> dict[str, str]:
    """Return what proc(5)'s status says of a unit's process."""
    text = host.run("cat", f"/proc/{host.show(unit, 'MainPID')}/status").stdout
    return dict(line.split(":\t", 1) for line in text.splitlines() if ":\t" in line)


def test_a_tunnel_within_the_sandbox(site: Site) -> None:
    host = site.host
    site.start()
    host.inside(lambda: download(443, MIB))
    host.inside(lambda: upload(443, MIB))
    for unit, capabilities in ((CLIENT, 0), (SERVER, BIND_SERVICE)):
        status = confinement(host, unit)
        assert all(int(uid) > 0 for uid in status["Uid"].split())
        assert [int(status[name], 16) for name in ("CapEff", "CapBnd")] == [capabilities] * 2
        assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
        # The journal has times of its own, and takes the priority for itself.
        assert re.search(r"^listening on unix:/run/", host.journal(unit), re.MULTILINE)
        host.systemctl("stop", unit)
        assert (host.show(unit, "Result"), host.show(unit, "ExecMainStatus")) == ("success", "0")
        assert not host.run("find", "/run", "-name", unit[:-8], "-print").stdout


def test_tickets_come_from_a_session_master_within_the_sandbox(site: Site) -> None:
    """Its child process may do what it must; what is kept serves while the master is away."""
    host = site.host
    key = site.credentials.fernet_key
    master = host.inside(lambda: StubMaster(site.folder, key, "127.0.0.1:443"))
    try:
        host.write_file("/etc/snitun/secret", master.secret_file.read_text(), 0o600)
        host.write_file("/etc/snitun/master-ca.pem", master.ca_file.read_text())
        site.install(CLIENT, (UNITS / "master.conf").read_text())
        site.configure(f"master = {master.url}", "master-ca = /etc/snitun/master-ca.pem")
        site.start()
        site.exchange()
        kept = "/var/lib/private/snitun-client/ticket.json"
        wait_until(lambda: host.run("ls", kept, check=False).returncode == 0)
        assert host.run("stat", "--format", "%a", kept).stdout == "600\n"
        master.reply = lambda _: (503, {}, b"")
        host.systemctl("restart", CLIENT)
        site.exchange()
        assert len(master.requests) == 1
        assert f"master        {master.url}" in site.tell("client").stdout
        assert master.secret not in host.journal(CLIENT)
    finally:
        master.close()


def test_what_is_missing_or_wrong_may_be_mended_later(site: Site) -> None:
    host = site.host
    host.run("rm", "/etc/snitun/ticket", "/etc/snitun/snitun.ini")
    host.systemctl("start", "--no-block", CLIENT, SERVER)
    host.wait_for(CLIENT, "status=243/CREDENTIALS")
    missing = "$SNITUN_CONFIG: can't read /etc/snitun/snitun.ini: No such file or directory"
    site.wait_for_status(SERVER, re.escape(missing))
    assert f"snitun-server: {missing}" in host.journal(SERVER)

    site.write_ticket(site.credentials)
    host.write_file("/etc/snitun/snitun.ini", "[client]\nendpont = 127.0.0.1:443\n")
    wrong = "/etc/snitun/snitun.ini: [client] endpont: no such option; did you mean endpoint?"
    for unit in (CLIENT, SERVER):
        site.wait_for_status(unit, re.escape(wrong))
        assert f"{unit[:-8]}: {wrong}" in host.journal(unit)

    site.configure()
    for unit in (SERVER, CLIENT):
        site.wait_for_state(unit, "active")
    site.exchange()


def test_a_program_that_hangs_is_killed_by_the_watchdog_and_comes_back(site: Site) -> None:
    host = site.host
    # Older ones than 254 read the drop-in, too, and leave out what they don't know.
    site.install(CLIENT, (UNITS / "growing-delay.conf").read_text() + WATCHDOG)
    site.install(SERVER, WATCHDOG)
    site.start()
    pids = {unit: host.show(unit, "MainPID") for unit in (CLIENT, SERVER)}
    host.run("kill", "-STOP", *pids.values())
    for unit, pid in pids.items():
        host.wait_for(unit, "Watchdog timeout")
        wait_until(lambda unit=unit, pid=pid: host.show(unit, "MainPID") not in (pid, "0"))  # type: ignore[misc]
    for unit in (SERVER, CLIENT):
        site.wait_for_state(unit, "active")
    site.exchange()


def test_a_reload_changes_the_endpoint_and_open_channels_stay(site: Site) -> None:
    host = site.host
    site.start()
    pid, other = host.show(CLIENT, "MainPID"), host.inside(Endpoint)
    with site.device() as device:
        device.exchange()
        site.configure(endpoint=other)
        host.systemctl("reload", CLIENT)
        site.wait_for_status(CLIENT, f"up since .* leads to {other.address}")
        site.exchange()
        assert (site.endpoint.accepted, other.accepted) == (1, 1)
        device.exchange()

        site.configure("keepalive = never")
        host.systemctl("reload", CLIENT)
        host.wait_for(
            CLIENT,
            "/etc/snitun/snitun.ini: [client] keepalive: 'never'; expected seconds, or a number "
            "and one of s, m, h, d, w; the former settings stay",
        )
        site.wait_for_state(CLIENT, "active")
        site.exchange()
        assert (site.endpoint.accepted, other.accepted) == (1, 2)
        device.exchange()
    assert host.show(CLIENT, "MainPID") == pid
    other.close()


def test_a_reload_of_the_relay_leaves_its_tunnels(site: Site) -> None:
    host = site.host
    site.start()
    with site.device() as device:
        device.exchange()
        site.configure(server="channel-idle = 5m\nlog-level = debug")
        host.systemctl("reload", SERVER)
        host.wait_for(SERVER, "the settings were read again")
        site.wait_for_state(SERVER, "active")
        site.exchange()
        host.wait_for(SERVER, f"TLS for {HOSTNAME} goes to")  # a line for DEBUG
        site.configure(server="channel-idle = never")
        host.systemctl("reload", SERVER)
        host.wait_for(SERVER, "[server] channel-idle: 'never'; expected seconds")
        site.wait_for_state(SERVER, "active")
        site.exchange()
        device.exchange()
    assert host.journal(CLIENT).count("ready: ") == 1


def test_settings_that_keep_the_client_from_starting_can_be_changed_meanwhile(site: Site) -> None:
    host = site.host
    host.systemctl("start", SERVER)
    site.configure("server = 127.0.0.1:444")
    host.systemctl("start", "--no-block", CLIENT)
    site.wait_for_status(CLIENT, f"waiting since {TIME}: can't reach the relay 127.0.0.1:444: .*")
    site.configure()
    # `systemctl reload` does nothing to what isn't active, without a word.
    host.systemctl("kill", "--signal=HUP", CLIENT)
    site.wait_for_state(CLIENT, "active")
    site.exchange()


def test_new_tickets_and_keys_take_a_restart(site: Site) -> None:
    host = site.host
    site.start()
    (site.folder / "other").mkdir()
    other = Credentials(site.folder / "other", server="127.0.0.1:443", hostname="other.test")
    site.write_keys(other)
    site.write_ticket(other)
    host.systemctl("restart", SERVER)
    host.systemctl("restart", CLIENT)
    with site.device(hostname="other.test") as device:
        device.exchange()
    assert other.token not in host.journal(CLIENT) + host.journal(SERVER)


def test_a_user_of_its_own_takes_another_ticket_without_a_gap(site: Site) -> None:
    host = site.host
    host.run("useradd", "--system", "snitun")
    host.run("chown", "snitun", "/etc/snitun/ticket")
    site.install(CLIENT, OWN_USER)
    site.configure("token-file = /etc/snitun/ticket")
    site.start()
    (site.folder / "next").mkdir()
    following = Credentials(
        site.folder / "next",
        server="127.0.0.1:443",
        hostname="next.test",
        fernet_key=site.credentials.fernet_key,
    )
    with site.device() as device:
        device.exchange()
        site.write_ticket(following)
        host.run("chown", "snitun", "/etc/snitun/ticket")
        host.systemctl("reload", CLIENT)
        site.wait_for_status(CLIENT, "up since .*: next.test at the relay .*")
        with site.device(hostname="next.test") as other:
            other.exchange()
        device.exchange()


def test_tls_ends_in_the_client_and_certificates_are_swapped_live(site: Site) -> None:
    """As docs/systemd.md says: files that only root and the client's own user may read."""
    host, authority, folder = site.host, trustme.CA(), "/etc/snitun/tls"
    host.run("useradd", "--system", "snitun")
    site.install(CLIENT, OWN_USER)
    site.configure(f"tls-cert = {folder}/home.pem")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    authority.configure_trust(context)

    def write() -> bytes:
        issued = authority.issue_cert(HOSTNAME)
        text = issued.private_key_and_cert_chain_pem.bytes().decode()
        host.write_file(f"{folder}/home.pem", text, 0o600)
        host.run("chgrp", "-R", "snitun", folder)
        host.run("chmod", "-R", "u=rwX,g=rX,o=", folder)
        return ssl.PEM_cert_to_DER_cert(issued.cert_chain_pems[0].bytes().decode())

    @contextlib.contextmanager
    def device() -> Iterator[ssl.SSLSocket]:
        sock = host.inside(lambda: socket.create_connection(("127.0.0.1", 443), WAIT_S))
        with context.wrap_socket(sock, server_hostname=HOSTNAME) as secured:
            yield secured

    first = write()
    site.start()
    with device() as former:
        assert former.getpeercert(binary_form=True) == first
        # The endpoint wants a ClientHello first, as of devices whose TLS ends there.
        former.sendall(client_hello(HOSTNAME) + b"ECHO\n")
        second = write()
        host.systemctl("reload", CLIENT)
        host.wait_for(CLIENT, "the settings were read again")
        with device() as other:
            assert other.getpeercert(binary_form=True) == second
        host.run("chmod", "600", f"{folder}/home.pem")
        host.systemctl("reload", CLIENT)
        host.wait_for(CLIENT, f"can't read {folder}/home.pem: Permission denied; the former")
        with device() as other:
            assert other.getpeercert(binary_form=True) == second
        former.sendall(b"still here")
        assert former.recv(10) == b"still here"


def test_other_secrets_come_as_credentials_too(site: Site) -> None:
    host, folder = site.host, "/run/credentials/snitun-client.service"
    host.write_file("/etc/snitun/admin-token", "a token of its own\n", 0o600)
    site.install(CLIENT, "[Service]\nLoadCredential=admin-token:/etc/snitun/admin-token\n")
    site.configure(f"admin-token-file = {folder}/admin-token", admin="127.0.0.1:9180")
    site.start()
    assert site.tell("client", "--admin", "127.0.0.1:9180").returncode == EXIT_UNAVAILABLE
    told = site.tell("client", "--config", "/etc/snitun/snitun.ini")
    assert (told.returncode, told.stderr) == (0, "")
    assert "a token of its own" not in host.journal(CLIENT)


@pytest.mark.parametrize("unit", [CLIENT, SERVER])
def test_open_channels_end_by_themselves_as_it_stops(site: Site, unit: str) -> None:
    host = site.host
    site.install(unit, PATIENT)
    site.configure("grace = 5m", server="grace = 5m")
    site.start()
    with site.device() as device:
        device.exchange()
        host.systemctl("stop", "--no-block", unit)
        host.wait_for(unit, "stopping: 1 channels have 300 s to end")
        assert host.show(unit, "ActiveState") == "deactivating"
        site.wait_for_status(unit, "stopping.*")
        device.exchange()
    site.wait_for_state(unit, "inactive")
    assert (host.show(unit, "Result"), host.show(unit, "ExecMainStatus")) == ("success", "0")


def test_the_machine_has_booted_while_the_client_still_waits(site: Site) -> None:
    host = site.host
    host.systemctl("enable", CLIENT, SERVER)
    wanted, awaited = (host.show("multi-user.target", name).split() for name in ("Wants", "After"))
    assert {CLIENT, SERVER} <= set(wanted)
    assert SERVER in awaited
    assert CLIENT not in awaited


# --- the session master ----------------------------------------------------------------


def test_the_session_master_reads_keys_and_certificate_again(host: SystemdHost) -> None:
    """As docs/systemd.md says, with the settings as they are shipped."""
    authority, name = trustme.CA(), "master.example.com"
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    authority.configure_trust(context)

    def write(path: str, text: str) -> None:
        host.write_file(f"/etc/snitun/{path}", text, 0o640)
        host.run("chgrp", "snitun-master", f"/etc/snitun/{path}")

    def renew() -> bytes:
        issued = authority.issue_cert(name)
        leaf = issued.cert_chain_pems[0].bytes().decode()
        write(f"tls/{name}.crt", leaf)
        write(f"tls/{name}.key", issued.private_key_pem.bytes().decode())
        return ssl.PEM_cert_to_DER_cert(leaf)

    def ask(path: str, credential: str = "") -> tuple[bytes | None, bytes]:
        """Return the certificate that was shown, and the answer."""
        head = f"{'POST' if credential else 'GET'} {path} HTTP/1.1\r\nHost: {name}\r\n"
        body = f'{{"aes_key": "{"ab" * 32}", "aes_iv": "{"cd" * 16}"}}' if credential else ""
        if credential:
            head += f"Authorization: Bearer {credential}\r\nContent-Length: {len(body)}\r\n"
        sock = host.inside(lambda: socket.create_connection(("127.0.0.1", 8443), WAIT_S))
        with context.wrap_socket(sock, server_hostname=name) as secured:
            secured.sendall(f"{head}\r\n{body}".encode())
            answer = b"".join(iter(lambda: secured.recv(65536), b""))
            return secured.getpeercert(binary_form=True), answer

    def command(*arguments: str) -> str:
        done = host.run(
            *("python3", "-m", "snitun_sync.master", *arguments),
            *("--config", "/etc/snitun/snitun.ini"),
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    host.run("useradd", "--system", "snitun-master")
    host.write_unit(MASTER, (UNITS / MASTER).read_text())
    host.write_file("/etc/snitun/snitun.ini", SETTINGS.read_text())
    host.systemctl("start", "--no-block", MASTER)
    host.wait_for(MASTER, "tls-cert: can't read")
    write("fernet.key", new_fernet_key(os.urandom))
    first = renew()
    wait_until(lambda: host.show(MASTER, "ActiveState") == "active")
    assert host.show(MASTER, "StatusText") == "listening on https://127.0.0.1:8443"
    assert ask("/healthz")[0] == first

    # Commands of root use the database meanwhile, and leave it to the service.
    credential = command("device", "add", "home.example.com")
    assert ask("/v1/token", credential)[1].startswith(b"HTTP/1.1 200 ")
    command("device", "revoke", "home.example.com")
    assert ask("/v1/token", credential)[1].startswith(b"HTTP/1.1 403 ")
    status = confinement(host, MASTER)
    assert [int(status[field], 16) for field in ("CapEff", "CapBnd")] == [0, 0]
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")

    second = renew()
    host.systemctl("reload", MASTER)
    host.wait_for(MASTER, "the settings were read again")
    assert ask("/healthz")[0] == second
    third = renew()  # without a reload
    wait_until(lambda: ask("/healthz")[0] == third)
    pid = host.show(MASTER, "MainPID")
    host.systemctl("restart", MASTER)
    assert host.show(MASTER, "MainPID") != pid
    assert ask("/v1/token", credential)[1].startswith(b"HTTP/1.1 403 ")
    host.systemctl("stop", MASTER)
    assert (host.show(MASTER, "Result"), host.show(MASTER, "ExecMainStatus")) == ("success", "0")
    journal = host.journal(MASTER)
    for wrong in ("Operation not permitted", "defect", "Traceback", credential):
        assert wrong not in journal, journal
