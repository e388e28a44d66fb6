"""The session master and all around it: README's commands, docs/master.md's examples, and the quick
form of what tools/master.py measures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme
from playwright.sync_api import Error, sync_playwright

from tests import network
from tests.acme import acme
from tests.appliance import find, listens
from tests.masters import Masters, write_secret
from tests.network import Network, Resolver
from tests.support import PROJECT, Credentials, Program, examples, free_port, relay, wait_until
from tools.master import PARTS

# Nobody wants to see a page with an endless list of commands at the start.
MOST_COMMANDS = 8
SERVICE = """
import http.server, ssl, sys
place = ("127.0.0.1", 443)
with http.server.ThreadingHTTPServer(place, http.server.SimpleHTTPRequestHandler) as server:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain("home.pem")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    print("listening", flush=True)
    server.serve_forever()
"""
PAGE = "<title>At home</title>"


@pytest.mark.parametrize("name", PARTS)
def test_what_the_tool_measures(name: str, tmp_path: Path) -> None:
    if name == "full-disk" and os.geteuid():
        pytest.skip("only root can mount a small disk")
    # Each part checks by itself what came of it.
    assert PARTS[name](tmp_path, True).count("\n") >= 2


# --- README ----------------------------------------------------------------------------------


def commands(page: str, first: str) -> list[str]:
    """Return the lines of an example that begins so, each a command."""
    (text,) = (text for text in examples(page) if text.startswith(first))
    return text.replace("\\\n", " ").splitlines()


@pytest.fixture
def hosts() -> Iterator[Network]:
    network.require_network()
    with Network() as running, Resolver(running) as resolver:
        for name in ("home", "master", "relay"):
            resolver.names[f"{name}.example.com"] = [running.relay_ip]
        for host in ("client", "device", "relay"):
            running.set_nameserver(host, resolver.address)
        yield running


def test_readme_s_commands_as_they_stand_and_a_browser(hosts: Network, tmp_path: Path) -> None:
    """Two machines and a third one with a browser; names by DNS, ports as they are."""
    at_relay = commands("README.md", "umask 077")
    at_home = commands("README.md", "scp ")
    count = sum(len(line.split("; ")) for line in (*at_relay, *at_home))
    assert "pip install ." in (PROJECT / "README.md").read_text("utf-8")
    assert count + 1 <= MOST_COMMANDS
    outside, home = folders(tmp_path)
    env = {
        # What `pip install .` brings, and a scp that needs no ssh.
        "PATH": f"{programs(tmp_path / 'bin', outside)}:{os.environ['PATH']}",
        # Whom this machine trusts.
        "SSL_CERT_FILE": str(tmp_path / "authority.pem"),
    }

    def shell(host: str, folder: Path, *lines: str) -> Program:
        text = "\n".join((f"cd {folder}", *lines))
        return hosts.run(host, "bash", "-c", text, env=env)

    service = hosts.run("client", "sh", "-c", f"cd {home}; exec {sys.executable} -c '{SERVICE}'")
    service.wait_for("listening")
    shell("relay", outside, *at_relay, "echo all done; wait").wait_for("all done")
    assert (outside / "home.secret").stat().st_mode & 0o077 == 0
    client = shell("client", home, *at_home)
    client.wait_for("ready: ")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium_on(hosts, tmp_path),
            args=["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"],
            env=dict(os.environ),
        )
        page = browser.new_context(ignore_https_errors=True).new_page()
        page.goto("https://home.example.com/")
        assert page.title() == "At home"
        done = shell(
            "relay", outside, "snitun-master device revoke home.example.com --database *.db"
        )
        assert done.wait() == 0, done.output
        client.wait_for("was revoked")
        with pytest.raises(Error, match="ERR_SSL"):
            browser.new_context(ignore_https_errors=True).new_page().goto(page.url)
        browser.close()


def folders(folder: Path) -> tuple[Path, Path]:
    """Return the relay's folder and the appliance's, with the certificates that each has."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(folder / "authority.pem"))
    for name in ("master", "home"):
        (folder / name).mkdir()
        issued = authority.issue_cert(f"{name}.example.com").private_key_and_cert_chain_pem
        write_secret(folder / name / f"{name}.pem", issued.bytes().decode())
    (folder / "home" / "index.html").write_text(PAGE)
    return folder / "master", folder / "home"


def programs(folder: Path, copied_from: Path) -> Path:
    """Return a folder with commands for the PATH."""
    texts = {
        f"snitun-{part}": f'exec {sys.executable} -m snitun_sync.{name} "$@"'
        for part, name in (("client", "client"), ("server", "server"), ("master", "master"))
    }
    texts["scp"] = f'exec cp -p "{copied_from}/${{1#relay.example.com:}}" "$2"'
    folder.mkdir()
    for name, text in texts.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    return folder


def chromium_on(hosts: Network, folder: Path) -> Path:
    """Return a program that runs Chromium on the host of devices."""
    script = folder / "chromium"
    inside = f"ip netns exec {hosts.names['device']}"
    script.write_text(f'#!/bin/sh\nexec {inside} {find("chromium")} "$@"\n')
    script.chmod(0o755)
    return script


# --- docs/master.md --------------------------------------------------------------------------


def test_the_examples_with_curl(tmp_path: Path) -> None:
    """They print what the page shows, but for what differs each time."""
    (text,) = (text for text in examples("docs/master.md") if text.startswith("curl "))
    parts = text.strip().split("\n\n")
    assert len(parts) == 6
    with Masters(tmp_path, relay="relay.example.com") as rig:
        rig.master()
        rig.add("home.example.com").secret_file.rename(tmp_path / "home.secret")
        # Where it finds the master, and whom it trusts.
        (tmp_path / ".curlrc").write_text(
            f'connect-to = "master.example.com:443:127.0.0.1:{rig.port}"\n'
            f'cacert = "{rig.authority_file}"\n'
        )
        env = {**os.environ, "HOME": str(tmp_path)}
        find("curl")
        for command, shown in zip(parts[::2], parts[1::2]):
            done = subprocess.run(
                ["bash", "-c", command], cwd=tmp_path, env=env, capture_output=True, check=True
            )
            printed = done.stdout.decode()
            if shown.startswith("{"):
                now, then = json.loads(printed), json.loads(shown)
                assert list(now) == list(then)
                differs = {"token", "valid", "device_id", "serial", "time"} & set(now)
                assert {k: v for k, v in now.items() if k not in differs} == {
                    k: v for k, v in then.items() if k not in differs
                }
                assert all(type(now[key]) is type(then[key]) for key in differs)
            else:
                # Header and beginning of a signed list.
                assert printed.startswith(shown.strip().rstrip("…"))


def test_the_commands_for_keys_and_a_backup(tmp_path: Path) -> None:
    keys, backup = (
        next(text for text in examples("docs/master.md") if text.startswith(first))
        for first in ("cp -p fernet.key", "python3 -c")
    )
    path = f"{programs(tmp_path / 'bin', tmp_path)}:{os.environ['PATH']}"

    def run(command: str) -> None:
        env = {**os.environ, "PATH": path, "PYTHONPATH": str(PROJECT)}
        subprocess.run(["bash", "-ec", command], cwd=tmp_path, env=env, check=True)

    with Masters(tmp_path) as rig:
        rig.master()
        former = rig.key_file.read_text()
        above, below = keys.splitlines()
        run(above)
        newest, *others = rig.key_file.read_text().splitlines(keepends=True)
        assert others == [former]
        run(below)
        assert rig.key_file.read_text() == newest != former
        account = rig.add()
        run(backup)
        rig.add("later.example.test")
    with Masters(tmp_path) as restored:
        (tmp_path / "snitun.backup").rename(restored.database)
        restored.master()
        assert restored.token(account.credential).status == 200
        (found,) = json.loads(restored.device("list", "--json"))
        assert found["id"] == account.device_id


def test_a_certificate_by_acme_through_the_route(tmp_path: Path) -> None:
    name, port = "master.example.com", free_port()
    credentials = Credentials(tmp_path)
    server, relay_port = relay(credentials, "--route", f"{name}=127.0.0.1:{port}")
    with server, acme(tmp_path, relay_port) as authority:
        authority.lego(name, port, "run")
        assert all(path.stat().st_size for path in authority.files(name))


def test_behind_nginx(tmp_path: Path) -> None:
    nginx, port = find("nginx"), free_port()
    (server,) = (text for text in examples("docs/master.md") if text.startswith("server {"))
    with Masters(tmp_path) as rig:
        for name, here in (
            ("443 ssl", f"127.0.0.1:{port} ssl"),
            ("/etc/ssl/master.pem", str(rig.certificate)),
            ("8443", str(rig.port)),
        ):
            assert name in server
            server = server.replace(name, here)
        paths = "".join(
            f"{name}_temp_path {tmp_path}; "
            for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        (tmp_path / "nginx.conf").write_text(
            f"daemon off; master_process off; pid {tmp_path}/nginx.pid; error_log stderr warn; "
            f"events {{ }} http {{ access_log off; {paths}\n{server} }}"
        )
        rig.master(is_plain=True)
        account = rig.add()
        with Program(nginx, "-c", tmp_path / "nginx.conf", "-p", tmp_path):
            wait_until(lambda: listens(port), "nginx")
            rig.port = port
            assert rig.token(account.credential).status == 200
            assert rig.ask("/metrics").status == 403
            before = rig.ask("/v1/revocations")
            waiting = threading.Timer(0.5, rig.device, ["revoke", account.device_id])
            waiting.start()
            etag = {"If-None-Match": before.headers["ETag"]}
            changed = rig.ask("/v1/revocations?wait=60", headers=etag)
            waiting.join()
            assert (changed.status, changed.body != before.body) == (200, True)
            assert rig.token(account.credential).status == 403
