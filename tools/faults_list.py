"""The faults of `tools/faults.py`: what happens, and when it is over.

Each is a function of a `Scene` in which nothing runs yet. It starts what it needs, says when
the fault begins and when it is healed or has a way around it; that a device gets through then
is for who runs it to see.
"""

from __future__ import annotations

import contextlib
import functools
import glob
import os
import shutil
import signal
from dataclasses import dataclass
from typing import TYPE_CHECKING, Callable

import trustme

from tests.support import HOSTNAME, Credentials
from tools.faults_scene import ANSWER_S, PORT, RELAY_NAME, Portal, Scene

if TYPE_CHECKING:
    from collections.abc import Iterator

FAKETIME = "/usr/lib/*/faketime/libfaketimeMT.so.1"
PROXY_PORT = 3128
TINYPROXY = """\
Port {port}
Listen {ip}
Timeout 600
LogLevel Critical
"""


@dataclass(frozen=True)
class Fault:
    """One line of the table."""

    name: str
    group: str
    happen: Callable[[Scene], None]
    command: str = ""
    """A program that it needs besides."""

    def missing(self) -> str:
        """Return what it needs and isn't here, "" if all is."""
        if not self.command or shutil.which(self.command) or glob.glob(self.command):
            return ""
        return f"no {self.command} here"


FAULTS: dict[str, Fault] = {}


def _fault(
    name: str, group: str, command: str = ""
) -> Callable[[Callable[[Scene], None]], Callable[[Scene], None]]:
    def add(happen: Callable[[Scene], None]) -> Callable[[Scene], None]:
        FAULTS[name] = Fault(name, group, happen, command)
        return happen

    return add


# --- the line ---------------------------------------------------------------------------


def _black_hole(scene: Scene, *, direction: str, is_busy: bool) -> None:
    scene.start()
    if is_busy:
        scene.download()
    scene.begin()
    scene.network.drop(direction)
    scene.wait_until_noticed()
    scene.network.heal()
    scene.healed()


for _way, _words in (
    ("both", "both ways"),
    ("to_relay", "to the relay"),
    ("to_client", "to the client"),
):
    for _busy in (False, True):
        _fault(
            f"black hole {_words}, {'a download' if _busy else 'idle'}",
            "black holes",
        )(functools.partial(_black_hole, direction=_way, is_busy=_busy))


@_fault("black hole that stays", "black holes")
def _black_hole_that_stays(scene: Scene) -> None:
    scene.start()
    scene.begin()
    scene.network.drop()
    scene.wait_until_noticed()
    scene.wait_until_not_ready()
    scene.wait_for_log("can't reach the relay")
    scene.hold(1 if scene.pace.is_quick else 30)
    scene.network.heal()
    scene.healed()


@_fault("black hole for 5 s", "black holes")
def _short_black_hole(scene: Scene) -> None:
    scene.start()
    scene.begin()
    scene.network.drop()
    scene.hold(5)
    scene.network.heal()
    scene.healed()


@_fault("20 % loss both ways", "black holes")
def _loss(scene: Scene) -> None:
    scene.start()
    scene.begin()
    scene.network.loss(20)
    scene.hold(8 if scene.pace.is_quick else 60)
    scene.network.heal()
    scene.healed()


@_fault("way rejected by TCP resets", "black holes")
def _rejected_by_reset(scene: Scene) -> None:
    _rejected(scene, "reset")


@_fault("way rejected by ICMP", "black holes")
def _rejected_by_icmp(scene: Scene) -> None:
    _rejected(scene, "icmp")


def _rejected(scene: Scene, answer: str) -> None:
    scene.start()
    scene.begin()
    scene.network.reject(answer)
    scene.wait_until_noticed()
    scene.hold(1 if scene.pace.is_quick else 10)
    scene.network.heal()
    scene.healed()


# --- the relay --------------------------------------------------------------------------


@_fault("relay killed, back after 3 s", "relay")
def _relay_killed(scene: Scene) -> None:
    scene.start()
    scene.begin()
    scene.stop_relay()
    scene.wait_until_noticed()
    scene.hold(3)
    scene.start_relay()
    scene.healed()


@_fault("relay's host loses power, back after 3 s", "relay")
def _relay_without_power(scene: Scene) -> None:
    scene.start()
    scene.begin()
    scene.network.drop()
    # Its connections vanish with nobody being told.
    scene.command("relay", "ss", "-K", "sport", "=", str(PORT))
    scene.stop_relay()
    scene.hold(3)
    scene.network.heal()
    scene.start_relay()
    scene.wait_until_noticed()
    scene.healed()


@_fault("relay stopped by SIGSTOP, resumed", "relay")
def _relay_stopped(scene: Scene) -> None:
    scene.start()
    assert scene.relay is not None
    scene.begin()
    os.kill(scene.relay.pid, signal.SIGSTOP)
    scene.wait_until_noticed()
    scene.hold(1 if scene.pace.is_quick else 60)
    os.kill(scene.relay.pid, signal.SIGCONT)
    scene.healed()


@_fault("captive portal that answers HTML", "relay")
def _portal(scene: Scene) -> None:
    _captured(scene, is_patient=False, says="a captive portal")


@_fault("captive portal that waits for a request", "relay")
def _patient_portal(scene: Scene) -> None:
    _captured(scene, is_patient=True, says="no challenge within")


def _captured(scene: Scene, *, is_patient: bool, says: str) -> None:
    scene.start()
    scene.begin()
    scene.stop_relay()
    with contextlib.closing(Portal(scene.network, is_patient=is_patient)):
        scene.wait_until_noticed()
        scene.wait_for_log(says)
        scene.hold(0 if scene.pace.is_quick else 30)
    scene.start_relay()
    scene.healed()


# --- the client's own network -----------------------------------------------------------


@_fault("own address changed", "own machine")
def _address_changed(scene: Scene) -> None:
    scene.start()
    scene.begin()
    scene.network.change_address(gap_s=1)
    scene.healed()
    scene.wait_until_noticed()


@_fault("own address gone, the same back after 5 s", "own machine")
def _address_gone(scene: Scene) -> None:
    scene.start()
    scene.begin()
    scene.network.remove_address()
    scene.wait_until_noticed()
    scene.hold(5)
    scene.network.add_address()
    scene.healed()


@_fault("default route to a dead gateway, and back", "own machine")
def _dead_route(scene: Scene) -> None:
    scene.start()
    scene.begin()
    scene.network.change_route("dead")
    scene.wait_until_noticed()
    scene.hold(1 if scene.pace.is_quick else 10)
    scene.network.change_route("main")
    scene.healed()


@_fault("default route to another gateway", "own machine")
def _other_route(scene: Scene) -> None:
    scene.start()
    scene.begin()
    scene.network.change_route("other")
    scene.healed()
    scene.wait_until_through("by the other gateway")


@_fault("cable pulled for 10 s", "own machine")
def _link_down(scene: Scene) -> None:
    scene.start()
    scene.begin()
    scene.network.link_down()
    scene.wait_until_noticed()
    scene.hold(10)
    scene.network.link_up()
    scene.healed()


# --- names ------------------------------------------------------------------------------


def _dns_gone_at_start(scene: Scene, *, how: str) -> None:
    resolver = scene.use_names(_resolver_options(scene))
    _break_dns(scene, how)
    scene.begin()
    scene.start(up=False)
    scene.wait_until_noticed()
    scene.wait_for_log("can't reach the relay")
    scene.hold(2 if scene.pace.is_quick else 30)
    resolver.is_silent = resolver.is_failing = False
    resolver.names[RELAY_NAME] = [scene.network.relay_ip]
    scene.healed()


def _break_dns(scene: Scene, how: str) -> None:
    assert scene.resolver is not None
    if how == "NXDOMAIN":
        del scene.resolver.names[RELAY_NAME]
    scene.resolver.is_silent = how == "silence"
    scene.resolver.is_failing = how == "SERVFAIL"


def _resolver_options(scene: Scene) -> str:
    # By default it takes resolvers' usual 2 · 5 s until there is no answer.
    return "timeout:1 attempts:1" if scene.pace.is_quick else ""


for _how in ("silence", "SERVFAIL", "NXDOMAIN"):
    _fault(f"DNS gone at the start: {_how}", "names and proxies")(
        functools.partial(_dns_gone_at_start, how=_how)
    )


@_fault("relay killed and back, DNS silent meanwhile", "names and proxies")
def _dns_gone(scene: Scene) -> None:
    resolver = scene.use_names(_resolver_options(scene))
    scene.start()
    scene.begin()
    resolver.is_silent = True
    scene.stop_relay()
    scene.wait_until_noticed()
    scene.start_relay()
    scene.wait_for_log("can't reach the relay")
    scene.hold(2 if scene.pace.is_quick else 30)
    resolver.is_silent = False
    scene.healed()


@_fault("relay moved to another address", "names and proxies")
def _relay_moved(scene: Scene) -> None:
    resolver = scene.use_names(_resolver_options(scene))
    scene.start()
    scene.begin()
    scene.stop_relay()
    scene.wait_until_noticed()
    former, other = scene.network.relay_ip, scene.network.relay_ip.rpartition(".")[0] + ".77"
    for what, ip in (("del", former), ("add", other)):
        scene.command("relay", "ip", "addr", what, f"{ip}/24", "dev", "eth0")
    gateway = former.rpartition(".")[0] + ".1"
    scene.command("relay", "ip", "route", "add", "default", "via", gateway)
    scene.start_relay()
    resolver.names.update({RELAY_NAME: [other], HOSTNAME: [other]})
    scene.healed()


@_fault("IPv6 broken at the start, IPv4 whole", "names and proxies")
def _broken_ip6(scene: Scene) -> None:
    resolver = scene.use_names()
    resolver.names[RELAY_NAME] = [scene.network.relay_ip6, scene.network.relay_ip]
    scene.network.drop(ip_version=6)
    scene.begin()
    scene.start(up=False)
    scene.healed()


@_fault("IPv6 breaks under the tunnel, IPv4 whole", "relay")
def _breaking_ip6(scene: Scene) -> None:
    resolver = scene.use_names()
    resolver.names[RELAY_NAME] = [scene.network.relay_ip6, scene.network.relay_ip]
    scene.start()
    scene.begin()
    scene.network.drop(ip_version=6)
    scene.wait_until_noticed()
    scene.healed()


# --- proxies ----------------------------------------------------------------------------


@_fault("only by an HTTP proxy, which is gone for 3 s", "names and proxies", "tinyproxy")
def _http_proxy(scene: Scene) -> None:
    path = scene.folder / "tinyproxy.conf"
    path.write_text(TINYPROXY.format(port=PROXY_PORT, ip=scene.network.router_ip))
    _by_proxy(scene, "http", "tinyproxy", "-d", "-c", str(path))


@_fault("only by a SOCKS5 proxy, which is gone for 3 s", "names and proxies", "microsocks")
def _socks_proxy(scene: Scene) -> None:
    place = ("-i", scene.network.router_ip, "-p", str(PROXY_PORT))
    _by_proxy(scene, "socks5", "microsocks", *place)


def _by_proxy(scene: Scene, scheme: str, *command: str) -> None:
    network = scene.network
    network.reject("reset")
    proxy = network.run("router", *command)
    scene.start("--proxy", f"{scheme}://{network.router_ip}:{PROXY_PORT}")
    scene.begin()
    proxy.kill()
    scene.wait_until_noticed()
    scene.hold(3)
    network.run("router", *command)
    scene.healed()


# --- the client's own time --------------------------------------------------------------


@_fault("client stopped by SIGSTOP, resumed", "own machine")
def _suspended(scene: Scene) -> None:
    scene.start()
    with _stopped(scene):
        scene.hold(20 if scene.pace.is_quick else 100)
    scene.healed()


@_fault("client stopped, relay restarted meanwhile", "own machine")
def _suspended_from_relay(scene: Scene) -> None:
    scene.start()
    with _stopped(scene):
        scene.stop_relay()
        scene.start_relay()
        scene.hold(5 if scene.pace.is_quick else 30)
    scene.healed()


@_fault("client stopped, resumed in a black hole", "own machine")
def _suspended_to_nowhere(scene: Scene) -> None:
    scene.start()
    # Longer than the keepalive: else nothing is late as it resumes.
    with _stopped(scene):
        scene.hold(scene.pace.keepalive_s + ANSWER_S)
        scene.network.drop()
    scene.wait_for_log("; next attempt in")
    scene.network.heal()
    scene.healed()


@contextlib.contextmanager
def _stopped(scene: Scene) -> Iterator[None]:
    assert scene.client is not None
    scene.begin()
    os.kill(scene.client.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(scene.client.pid, signal.SIGCONT)


@_fault("clock in 1970, then jumping by hours", "own machine", FAKETIME)
def _clock(scene: Scene) -> None:
    stamp = scene.folder / "clock"
    stamp.write_text("@1970-01-01 00:00:30\n")
    library = glob.glob(FAKETIME)[0]
    faked = (
        *("env", f"LD_PRELOAD={library}", f"FAKETIME_TIMESTAMP_FILE={stamp}"),
        # Clocks that nobody sets go on as they do.
        *("FAKETIME_DONT_FAKE_MONOTONIC=1", "FAKETIME_NO_CACHE=1"),
    )
    scene.start(before=faked)
    scene.begin()
    scene.seen["noticed"] = scene.status()
    for offset, doubt in (("+5h", "expired"), ("-3h", "was made"), ("+0", ""), ("+30d", "expired")):
        stamp.write_text(f"{offset}\n")
        scene.wait(
            lambda doubt=doubt: doubt in (scene.status()["clock_doubt"] or ""),  # type: ignore[misc]
            f"a clock_doubt with {doubt!r}",
        )
        scene.wait_until_through(f"with the clock at {offset}")
    scene.healed()


# --- false routes -----------------------------------------------------------------------


@_fault("hostname leads to another service (DNS)", "false routes")
def _elsewhere(scene: Scene) -> None:
    scene.use_tls()
    resolver = scene.use_names()
    network = scene.network
    # It has a certificate for the name, but another one.
    scene.tls_endpoint("device", trustme.CA(), (network.device_ip, PORT))
    scene.start("--probe", f"{scene.pace.probe_s:g}s")
    scene.wait(lambda: (scene.status()["probe"] or {}).get("checked"), "the first probe ends")
    scene.begin()
    resolver.names[HOSTNAME] = [network.device_ip]
    scene.wait_until_noticed()
    scene.wait_until_not_ready()
    scene.hold(1 if scene.pace.is_quick else 30)
    resolver.names[HOSTNAME] = [network.relay_ip]
    scene.healed()


@_fault("another client takes the hostname over", "false routes")
def _taken_over(scene: Scene) -> None:
    scene.use_tls()
    scene.use_names()
    scene.start("--probe", f"{scene.pace.probe_s:g}s")
    folder = scene.folder / "other"
    folder.mkdir()
    other = Credentials(
        folder,
        server=f"{scene.network.relay_ip}:{PORT}",
        fernet_key=scene.credentials.fernet_key,
    )
    service = scene.tls_endpoint("device", trustme.CA(), ("127.0.0.1", 0))
    scene.begin()
    rival = scene.run_client("device", other, service.address)
    scene.wait_until_noticed()
    scene.hold(3 if scene.pace.is_quick else 30)
    rival.kill()
    scene.healed()
