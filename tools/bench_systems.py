"""The systems that tools/bench.py measures, and one of them up and running."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import pwd
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Callable

from tools import load
from tools.environment import PROJECT, python_with_snitun

if TYPE_CHECKING:
    from collections.abc import Iterator

PEER = PROJECT / "tests" / "interop" / "snitun_peer.py"
LOAD = PROJECT / "tools" / "load.py"
PEERS = Path(os.environ.get("PUBLISHED_PEERS") or PROJECT / ".cache" / "snitun-peers")
# Release → the Pythons that it runs on, and the protocol version that it is measured with.
RELEASES: dict[str, tuple[tuple[str, ...], int | None]] = {
    "0.47.0": (("3.13", "3.14"), 2),
    "0.39.1": (("3.11", "3.10"), None),
}
HOSTNAME = "device.example.test"
START_S = 30.0
TICK = os.sysconf("SC_CLK_TCK")


class MissingError(Exception):
    """What a system or a scenario needs isn't on this machine."""


@dataclass(frozen=True)
class Place:
    """Where a system is to run: its folder, its addresses."""

    folder: Path
    relay_host: str
    port: int  # of devices, and of clients too where these share one
    tunnel_port: int
    endpoint_port: int


@dataclass
class Command:
    """A program to start."""

    arguments: list[str]
    port: int = 0  # where it listens once it is up
    env: dict[str, str] = field(default_factory=dict)
    stdin: str = ""


@dataclass(frozen=True)
class System:
    """A system under test."""

    about: str
    commands: Callable[[Place], list[Command]]  # of the relay, and of the client if there is one
    check: Callable[[], None]  # installs what is missing, or raises MissingError
    speaks_snitun: bool = False
    has_shaped_uplink: bool = False  # is measured by slow-link
    version: int | None = 2


# --- the machine


def program(name: str, package: str = "") -> str:
    """Return the path of a program; install its package where that can be done."""
    path = os.environ.get("PATH", "") + ":/usr/local/sbin:/usr/sbin:/sbin"
    found = shutil.which(name, path=path)
    if not found and package and os.geteuid() == 0 and shutil.which("apt-get"):
        print(f"installing {package} …", file=sys.stderr, flush=True)
        env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        install = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", package]
        for command in (["apt-get", "update", "-qq"], install):
            subprocess.run(command, check=False, env=env, stdout=subprocess.DEVNULL)
        found = shutil.which(name, path=path)
    if not found:
        raise MissingError(f"{name} is missing")
    return found


def free_port() -> int:
    """Return a port that nobody listens on, and that no outgoing connection is given."""
    text = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text("ascii")
    first = max(12000, int(text.split()[0]))
    while True:
        port = random.randrange(10000, first)
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind(("", port))
            return port


def _python_with_snitun(release: str) -> str:
    versions = RELEASES[release][0]
    try:
        python = python_with_snitun(PEERS, release, *versions)
    except subprocess.CalledProcessError as error:
        raise MissingError(f"snitun {release} can't be installed") from error
    if python is None:
        raise MissingError(f"Python {versions[0]} is missing")
    return python


# --- the systems


def _ours(crypto: str) -> System:
    def commands(place: Place) -> list[Command]:
        python = [sys.executable, "-m"]
        env = {"PYTHONPATH": str(PROJECT), "SNITUN_CRYPTO": crypto}
        relay = ["snitun_sync.server", "--listen", f"{place.relay_host}:{place.port}"]
        relay += ["--fernet-key-file", str(place.folder / "fernet.key")]
        client = ["snitun_sync.client", "--token-file", str(place.folder / "ticket")]
        client += ["--endpoint", f"127.0.0.1:{place.endpoint_port}"]
        return [Command(python + relay, place.port, env), Command(python + client, env=env)]

    return System(f"this project, {crypto}", commands, lambda: None, True, True)


def _published(release: str, about: str) -> System:
    def commands(place: Place) -> list[Command]:
        ticket = json.loads((place.folder / "ticket").read_text("utf-8"))
        ours = {
            "fernet_key": (place.folder / "fernet.key").read_text("ascii"),
            "host": place.relay_host,
            "port": place.port,
            "endpoint_host": "127.0.0.1",
            "endpoint_port": place.endpoint_port,
        }
        peer, stdin = [_python_with_snitun(release), str(PEER)], json.dumps({**ticket, **ours})
        return [
            Command([*peer, "server"], place.port, stdin=stdin),
            Command([*peer, "client"], stdin=stdin),
        ]

    version = RELEASES[release][1]

    def check() -> None:
        _python_with_snitun(release)

    # 10,000 tunnels are for relays of today.
    return System(about, commands, check, version is not None, True, version)


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _user() -> str:
    return pwd.getpwuid(os.geteuid()).pw_name


def _openssh(place: Place) -> list[Command]:
    folder, keygen = place.folder, program("ssh-keygen")
    for name in ("host", "user"):
        _run(keygen, "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name))
    if os.geteuid() == 0:
        os.makedirs("/run/sshd", exist_ok=True)
    relay = [program("sshd"), "-D", "-e", "-f", "/dev/null", "-p", str(place.tunnel_port)]
    relay += ["-h", str(folder / "host")]
    for option in (
        *("StrictModes=no", "PermitRootLogin=yes", "PidFile=none", "GatewayPorts=clientspecified"),
        *(f"AuthorizedKeysFile={folder / 'user.pub'}", f"ListenAddress={place.relay_host}"),
    ):
        relay += ["-o", option]
    client = [program("ssh"), "-N", "-F", "none", "-i", str(folder / "user")]
    for option in ("StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "BatchMode=yes"):
        client += ["-o", option]
    client += ["-o", "ExitOnForwardFailure=yes", *_forward(place)]
    return [Command(relay, place.tunnel_port), Command(client)]


def _forward(place: Place) -> list[str]:
    remote = f"{place.relay_host}:{place.port}:127.0.0.1:{place.endpoint_port}"
    return ["-p", str(place.tunnel_port), "-R", remote, f"{_user()}@{place.relay_host}"]


def _dropbear(place: Place) -> list[Command]:
    folder, keygen, relay = place.folder, program("dropbearkey"), program("dropbear")
    for name in ("host", "user"):
        _run(keygen, "-t", "ed25519", "-f", str(folder / name))
    keys = folder / "home" / ".ssh"
    keys.mkdir(mode=0o700, parents=True)
    public = next(
        line
        for line in _run(keygen, "-y", "-f", str(folder / "user")).splitlines()
        if line.startswith("ssh-")
    )
    (keys / "authorized_keys").write_text(public + "\n", "ascii")
    (keys / "authorized_keys").chmod(0o600)
    arguments = [relay, "-F", "-E", "-p", f"{place.relay_host}:{place.tunnel_port}"]
    arguments += ["-r", str(folder / "host")]
    if _dropbear_has_key_option():
        arguments += ["-D", str(keys)]
    else:  # it looks into the user's home: give it one that nobody else sees
        home = pwd.getpwuid(os.geteuid()).pw_dir
        script = 'mount --bind "$0" "$1" && shift && exec "$@"'
        inside = ["sh", "-c", script, str(keys.parent), home]
        arguments = [program("unshare"), "--mount", *inside, *arguments]
    client = [program("dbclient"), "-N", "-y", "-y", "-i", str(folder / "user"), *_forward(place)]
    return [Command(arguments, place.tunnel_port), Command(client)]


def _dropbear_has_key_option() -> bool:
    said = subprocess.run([program("dropbear"), "-h"], capture_output=True, text=True, check=False)
    return "\n-D" in said.stdout + said.stderr


def _haproxy(place: Place) -> list[Command]:
    config = place.folder / "haproxy.cfg"
    config.write_text(
        f"""global
 nbthread 1
 maxconn 4000
defaults
 mode tcp
 timeout connect 5s
 timeout client 60s
 timeout server 60s
frontend devices
 bind {place.relay_host}:{place.port}
 tcp-request inspect-delay 5s
 tcp-request content accept if {{ req_ssl_hello_type 1 }}
 use_backend endpoint if {{ req_ssl_sni -i {HOSTNAME} }}
backend endpoint
 server endpoint 127.0.0.1:{place.endpoint_port}
""",
        "ascii",
    )
    return [Command([program("haproxy"), "-db", "-f", str(config)], place.port)]


def _check_openssh() -> None:
    program("sshd", "openssh-server")
    program("ssh", "openssh-client")


def _check_dropbear() -> None:
    program("dropbear", "dropbear-bin")
    if os.geteuid() != 0 and not _dropbear_has_key_option():
        raise MissingError("this dropbear needs root, or an option -D")


def _check_haproxy() -> None:
    program("haproxy", "haproxy")


SYSTEMS: dict[str, System] = {
    "snitun_sync": _ours("pycryptodome"),
    "snitun_sync-cryptography": _ours("cryptography"),
    "snitun-0.47.0": _published("0.47.0", "published, asyncio, protocol version 2"),
    "snitun-0.39.1": _published("0.39.1", "published, asyncio, protocol version 0"),
    "openssh": System(
        "ssh -R, in C; encrypts the payload too", _openssh, _check_openssh, has_shaped_uplink=True
    ),
    "dropbear": System("dbclient -R, in C; encrypts the payload too", _dropbear, _check_dropbear),
    "haproxy-sni": System(
        "one hop in C without a tunnel, what one process can reach", _haproxy, _check_haproxy
    ),
}


# --- processes


class Process:
    """A process that is measured, with its descendants."""

    def __init__(self, command: Command, log: Path, prefix: list[str]) -> None:
        self.log = log
        env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "SNITUN_"))}
        with open(log, "wb") as output, _stdin(command.stdin) as stdin:
            self._process = subprocess.Popen(
                [*prefix, *command.arguments],
                stdin=stdin,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**env, "HOME": str(log.parent), **command.env},
                start_new_session=True,
            )

    def check(self) -> None:
        """Raise if it has ended."""
        if self._process.poll() is not None:
            said = self.log.read_text("utf-8", "replace")[-2000:].strip()
            raise ConnectionError(f"the {self.log.stem} ended: {said}")

    def stop(self) -> None:
        """End it, and all that it has started."""
        family = self._family()
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        for pid in family:  # sshd leaves its sessions behind
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        self._process.wait()

    def _family(self) -> list[str]:
        found, todo = [], [str(self._process.pid)]
        while todo:
            pid = todo.pop()
            found.append(pid)
            for task in Path("/proc", pid, "task").glob("*"):
                with contextlib.suppress(OSError):
                    todo += (task / "children").read_text("ascii").split()
        return found

    def cpu_s(self) -> float:
        """Return the CPU time it has used."""
        ticks = 0
        for pid in self._family():
            with contextlib.suppress(OSError):
                fields = Path("/proc", pid, "stat").read_text("utf-8").rpartition(")")[2].split()
                ticks += sum(map(int, fields[11:15]))
        return ticks / TICK

    def memory_kib(self) -> tuple[int, int]:
        """Return its RSS, and how much of that is its own."""
        sizes = {"Rss": 0, "Private_Dirty": 0, "Private_Clean": 0}
        for pid in self._family():
            with contextlib.suppress(OSError):
                for line in Path("/proc", pid, "smaps_rollup").read_text("ascii").splitlines():
                    name, _, rest = line.partition(":")
                    if name in sizes:
                        sizes[name] += int(rest.split()[0])
        return sizes["Rss"], sizes["Private_Dirty"] + sizes["Private_Clean"]


@contextlib.contextmanager
def _stdin(text: str) -> Iterator[IO[str]]:
    with tempfile.TemporaryFile("w+") as file:
        file.write(text)
        file.seek(0)
        yield file


class Running:
    """A system that is up: a target for the load, processes for the figures."""

    def __init__(
        self, system: System, relay_host: str = "127.0.0.1", prefix: tuple[str, ...] = ()
    ) -> None:
        self.processes: dict[str, Process] = {}
        self.idle_s = 10.0
        """For how long a scenario watches what goes on while nothing goes on."""
        self._stack = contextlib.ExitStack()
        try:
            self._start(system, relay_host, list(prefix))
        except BaseException:
            self._stack.close()
            raise

    def _start(self, system: System, relay_host: str, prefix: list[str]) -> None:
        temporary = tempfile.TemporaryDirectory(prefix="snitun-bench-")
        folder = Path(self._stack.enter_context(temporary))
        endpoint = self.helper(prefix, "endpoint")
        assert endpoint.stdout is not None
        endpoint_port = int(endpoint.stdout.readline())
        place = Place(folder, relay_host, free_port(), free_port(), endpoint_port)
        self.fernet_key = base64.urlsafe_b64encode(os.urandom(32)).decode()
        self._write(folder, "fernet.key", self.fernet_key)
        token, key, iv, valid = load.tunnel_secrets(self.fernet_key, HOSTNAME, system.version)
        ticket: dict[str, object] = {"server": f"{relay_host}:{place.port}", "token": token}
        ticket |= {"aes_key": key.hex(), "aes_iv": iv.hex(), "cipher": "aes-cbc"}
        ticket |= {"hostname": HOSTNAME, "valid": valid, "protocol_version": system.version or 0}
        self._write(folder, "ticket", json.dumps(ticket))
        self.target = load.Target(relay_host, place.port, HOSTNAME)
        begin = time.perf_counter()
        for role, command in zip(("relay", "client"), system.commands(place)):
            begin = time.perf_counter()
            process = Process(command, folder / f"{role}.log", prefix if role == "client" else [])
            self._stack.callback(process.stop)
            self.processes[role] = process
            if command.port:
                self._until(lambda: self._connect(relay_host, command.port))  # noqa: B023
        self._until(lambda: load.connections(self.target, 1, 1))
        self.connected_s = time.perf_counter() - begin
        """From the start of the last process to the endpoint's first answer."""

    @staticmethod
    def _write(folder: Path, name: str, text: str) -> None:
        path = folder / name
        path.touch(mode=0o600)
        path.write_text(text, "utf-8")

    @staticmethod
    def _connect(host: str, port: int) -> None:
        socket.create_connection((host, port), timeout=5).close()

    def _until(self, attempt: Callable[[], object]) -> None:
        deadline = time.monotonic() + START_S
        while True:
            try:
                attempt()
                return
            except OSError:
                self.check()
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.005)

    def helper(self, prefix: list[str], *arguments: str) -> subprocess.Popen[str]:
        """Start a process of the load; it ends with this system at the latest."""
        process = subprocess.Popen(
            [*prefix, sys.executable, str(LOAD), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

        def stop() -> None:
            process.kill()
            process.communicate()

        self._stack.callback(stop)
        return process

    def check(self) -> None:
        """Raise if one of the processes has ended."""
        for process in self.processes.values():
            process.check()

    def cpu_s(self) -> dict[str, float]:
        """Return the CPU time that each process has used."""
        return {role: process.cpu_s() for role, process in self.processes.items()}

    def rss_kib(self) -> dict[str, int]:
        """Return the RSS of each process."""
        return {role: process.memory_kib()[0] for role, process in self.processes.items()}

    def close(self) -> None:
        """Stop all processes."""
        self._stack.close()
