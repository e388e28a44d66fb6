"""Every kind of endpoint with the programs that people have: nginx, HAProxy, Flask, Django.

One relay and one client lead to all of them, each under a hostname of its own.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import sync_playwright
from websockets.sync.client import connect

from tests.appliance import DEVICE, DOMAIN, INSIDE, KINDS, PAGE, Site, Web, find, section
from tests.appliance import site as run_site
from tests.support import (
    MIB,
    PROJECT,
    WAIT_S,
    Credentials,
    Program,
    examples,
    module,
    pattern,
    pattern_sha256,
)

SIZE = 10 * MIB
# Names of the ticket that no endpoint has by itself.
MORE = ("a.home", "b.home", "c.b.home", "nobody")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with run_site(tmp_path_factory.mktemp("site"), *MORE) as running:
        yield running


@pytest.mark.parametrize("name", [*KINDS, *INSIDE])
def test_it_works_with_every_byte_and_the_device_s_address(site: Site, name: str) -> None:
    site.check(name, SIZE)


def test_each_connection_has_an_id_of_its_own(site: Site) -> None:
    ids = set()
    for _ in range(3):
        with site.web("haproxy-v2") as device:
            first, second = device.seen(), device.seen()
        assert first["unique_id"] == second["unique_id"]
        assert re.fullmatch(r"[0-9a-f]{32}", first["unique_id"])
        ids.add(first["unique_id"])
    assert len(ids) == 3


def test_version_2_tells_what_the_client_knows_of_tls(site: Site) -> None:
    for version, cipher in (("TLSv1.2", r"ECDHE-"), ("TLSv1.3", r"TLS_")):
        with site.web("tlvs", source=DEVICE) as device:
            device.tls.maximum_version = ssl.TLSVersion[version.replace(".", "_")]
            seen = device.seen()
        assert seen.pop("cipher").startswith(cipher)
        assert re.fullmatch(r"[0-9a-f]{32}", seen.pop("unique_id"))
        assert seen == {
            "address": DEVICE,
            "authority": f"tlvs.{DOMAIN}",
            "alpn": "http/1.1",
            "tls": version,
        }


@pytest.mark.parametrize("name", ["https-proxy-v1", "http-proxy-v2", "haproxy-v1", "haproxy-v2"])
def test_the_address_of_a_device_with_ipv6(site: Site, name: str) -> None:
    with site.web(name, host="::1") as device:
        seen = device.seen()
    # Where the service names what the device came to: all zeros, and the port.
    assert (seen["address"], seen["server"]) == ("::1", ":::443")


def test_an_address_that_the_tunnel_does_not_carry_is_unknown(site: Site, tmp_path: Path) -> None:
    """Below version 2 it has no room for IPv6; the service sees the connection's own address."""
    names = ("https-proxy-v1", "http-proxy-v2", "haproxy-v1", "haproxy-v2")
    hosts = [f"old-{name}.{DOMAIN}" for name in names]
    old = Credentials(
        tmp_path, hostname=hosts[0], alias=tuple(hosts), version=1, fernet_key=site.fernet_key
    )
    old.at(f"127.0.0.1:{site.port}")
    config = tmp_path / "old.ini"
    sections = (section(host, KINDS[name], site.rig) for host, name in zip(hosts, names))
    config.write_text(f"[client]\ntoken-file = {old.ticket_file}\n" + "".join(sections))
    with Program(*module("snitun_sync.client", "--config", config)) as client:
        client.wait_for("ready: ")
        for name in names:
            with site.web(f"old-{name}", source=DEVICE) as device:
                assert device.seen()["address"] == DEVICE
            with site.web(f"old-{name}", host="::1") as device:
                peer = "unix:" if name == "http-proxy-v2" else "127.0.0.1"
                assert device.seen()["address"] == peer


# --- programs in Python, as docs/endpoints.md has them -----------------------------------------


def test_the_examples_in_python(site: Site, tmp_path: Path) -> None:
    flask, shout = (text for text in examples("docs/endpoints.md") if text.startswith("from "))
    names = ("home.example.com", "shout.example.com")
    for text, name in zip((flask, shout), names):
        folder = tmp_path / name
        folder.mkdir()
        credentials = Credentials(folder, hostname=name, fernet_key=site.fernet_key)
        credentials.at(f"127.0.0.1:{site.port}")
        credentials.ticket_file.rename(folder / "home.ticket")
        pem = site.rig.authority.issue_cert(name).private_key_and_cert_chain_pem
        pem.write_to_path(str(folder / f"{name.partition('.')[0]}.pem"))
        (folder / "example.py").write_text(
            f"import logging, os\nos.chdir({str(folder)!r})\nlogging.basicConfig(level=20)\n{text}"
        )
        with (
            Program(*module("example"), env={"PYTHONPATH": f"{PROJECT}:{folder}"}) as program,
            Web(name, site.port, site.rig.authority_file, source=DEVICE) as device,
        ):
            program.wait_for("ready: ")
            if text is flask:
                device.request("GET", "/")
                assert device.getresponse().read().decode() == f"Hello, {DEVICE}"
            else:
                device.connect()
                device.sock.sendall(b"hello\n")
                assert device.sock.recv(6) == b"HELLO\n"


# --- HTTP/2, TLS, WebSocket ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "version"), [("h2c", "2"), ("both", "2"), ("both", "1.1"), ("http", "1.1")]
)
def test_curl_speaks_what_the_endpoint_offers(
    site: Site, name: str, version: str, tmp_path: Path
) -> None:
    upload, back = tmp_path / "upload", tmp_path / "back"
    upload.write_bytes(pattern(0, SIZE))
    # It prefers HTTP/2 by itself, where that is offered.
    options = ("--http1.1",) if (name, version) == ("both", "1.1") else ()
    path, said = f"/file/{name}", "%{http_version} %{http_code} %{ssl_verify_result}"
    put = site.curl(name, path, *options, "--upload-file", str(upload), "--write-out", said)
    assert re.fullmatch(rf"{version} 20[14] 0", put)
    assert site.curl(name, path, *options, "--output", str(back), "--write-out", said) == (
        f"{version} 200 0"
    )
    assert back.read_bytes() == upload.read_bytes()


def test_openssl_finds_the_versions_of_tls_and_the_protocols(site: Site) -> None:
    for version, option in (("TLSv1.2", "-tls1_2"), ("TLSv1.3", "-tls1_3")):
        for name, chosen in (("http", "http/1.1"), ("both", "h2"), ("h2c", "h2")):
            said = site.s_client(name, option, "-alpn", "http/1.1,h2")
            assert f"New, {version}" in said, said
            assert f"ALPN protocol: {chosen}" in said
            assert "Verify return code: 0 (ok)" in said
        site.curl("http", "/seen", f"--tlsv{version[-3:]}", "--tls-max", version[-3:])
    # Old versions, which OpenSSL itself hardly offers any more.
    for option in ("-tls1", "-tls1_1"):
        said = site.s_client("http", option, "-cipher", "ALL:@SECLEVEL=0")
        assert "alert protocol version" in said, said


def test_a_websocket_server_behind_tls_termination(site: Site) -> None:
    context = ssl.create_default_context(cafile=site.rig.authority_file)
    host = f"socket.{DOMAIN}"
    with (
        socket.create_connection(("127.0.0.1", site.port), WAIT_S) as sock,
        connect(
            f"wss://{host}:{site.port}/",
            sock=sock,
            ssl=context,
            server_hostname=host,
            max_size=None,
        ) as websocket,
    ):
        for message in ("hello", pattern(0, SIZE), "still there"):
            websocket.send(message)
            assert websocket.recv(WAIT_S) == message


def test_chromium_loads_a_page_with_a_websocket(site: Site) -> None:
    count = 20
    (site.rig.www / "index.html").write_text(PAGE)
    for number in range(count):
        (site.rig.www / f"part{number}.js").write_bytes(pattern(0, 1000 + number * 9973))
    hashes = [pattern_sha256(1000 + number * 9973) for number in range(count)]
    arguments = [
        *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
        f"--host-resolver-rules=MAP *.{DOMAIN} 127.0.0.1",
    ]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=find("chromium"), args=arguments, env=dict(os.environ)
        )
        with contextlib.closing(browser):
            for name, protocol in (("http", "http/1.1"), ("both", "h2")):
                page = browser.new_context(ignore_https_errors=True).new_page()
                answer = page.goto(f"https://{name}.{DOMAIN}:{site.port}/")
                assert answer is not None
                assert answer.status == 200
                for turn in range(2):
                    assert page.evaluate(f"load({count})") == hashes
                    assert page.evaluate(f"echo('turn {turn}')") == f"turn {turn}"
                entries = "performance.getEntriesByType('resource')"
                spoken = page.evaluate(f"{entries}.map(entry => entry.nextHopProtocol)")
                assert set(spoken) == {protocol}


# --- names -----------------------------------------------------------------------------------


def test_a_wildcard_stands_for_one_label(site: Site) -> None:
    for name in ("a.home", "b.home"):
        with Web(f"{name}.{DOMAIN}", site.port, None) as device:
            assert device.seen()["scheme"] == "https"
    assert_closed(site, "c.b.home")


def test_a_name_without_an_endpoint_is_closed_until_there_is_a_default(site: Site) -> None:
    before = site.refused("name")
    assert_closed(site, "nobody")
    assert site.refused("name") == before + 1
    text = site.config.read_text()
    with site.web("http") as former:
        former.seen()
        try:
            site.config.write_text(text + section("*", KINDS["http"], site.rig))
            reload(site)
            with site.web("nobody") as device:
                assert device.seen()["scheme"] == "http"
            former.seen()
        finally:
            site.config.write_text(text)
            reload(site)
        former.seen()
    assert_closed(site, "nobody")


def assert_closed(site: Site, name: str) -> None:
    with site.web(name) as device, pytest.raises(OSError, match=r"EOF|reset"):
        device.connect()


def reload(site: Site) -> None:
    count = site.client.output.count("the settings were read again")
    os.kill(site.client.pid, signal.SIGHUP)
    site.client.wait_for("the settings were read again", count + 1)
