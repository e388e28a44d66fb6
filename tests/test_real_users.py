"""What people put at both ends: nginx behind the client; curl and Chromium before the relay."""

from __future__ import annotations

import hashlib
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import trustme
from playwright.sync_api import Error, Page, sync_playwright
from websockets.sync.server import serve

from tests.appliance import PAGE, echo, find
from tests.support import HOSTNAME, MIB, Credentials, Program, client, free_port, pattern, relay

BIG = 20 * MIB
RESOURCES = 30


@dataclass
class Site:
    """A web site behind the tunnel."""

    url: str
    port: int
    folder: Path
    authority: Path
    relay: Program
    client: Program

    def sha256(self, name: str) -> str:
        """Return what a file of the site must arrive as."""
        return hashlib.sha256((self.folder / name).read_bytes()).hexdigest()


NGINX = """
daemon off; master_process off; pid {folder}/nginx.pid; error_log stderr warn;
events {{ }}
http {{
    access_log off;
    client_body_temp_path {folder}; proxy_temp_path {folder}; fastcgi_temp_path {folder};
    uwsgi_temp_path {folder}; scgi_temp_path {folder};
    types {{ text/html html; text/javascript js; }}
    server {{
        listen 127.0.0.1:{port} ssl http2;
        server_name {hostname};
        ssl_certificate {folder}/site.pem; ssl_certificate_key {folder}/site.pem;
        root {folder}/www;
        client_max_body_size 100m;
        location /socket {{
            proxy_pass http://127.0.0.1:{socket_port};
            proxy_http_version 1.1;
            proxy_set_header Upgrade $http_upgrade;
            proxy_set_header Connection upgrade;
        }}
        location /hash {{ proxy_pass http://127.0.0.1:{socket_port}; proxy_request_buffering off; }}
        location /refused {{ client_max_body_size 1k; proxy_pass http://127.0.0.1:{socket_port}; }}
    }}
}}
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    nginx = find("nginx")
    folder = tmp_path_factory.mktemp("site")
    www = folder / "www"
    www.mkdir()
    (www / "big").write_bytes(pattern(0, BIG))
    (www / "index.html").write_text(PAGE)
    for number in range(RESOURCES):
        (www / f"part{number}.js").write_bytes(pattern(number * 1000, 1000 + number * 9973))
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(folder / "authority.pem"))
    certificate = authority.issue_cert(HOSTNAME)
    certificate.private_key_and_cert_chain_pem.write_to_path(str(folder / "site.pem"))
    sockets = serve(echo, "127.0.0.1", 0)
    threading.Thread(target=sockets.serve_forever, daemon=True).start()
    port = free_port()
    (folder / "nginx.conf").write_text(
        NGINX.format(
            folder=folder,
            port=port,
            hostname=HOSTNAME,
            socket_port=sockets.socket.getsockname()[1],
        )
    )
    credentials = Credentials(folder)
    server, relay_port = relay(credentials)
    credentials.at(f"127.0.0.1:{relay_port}")
    with (
        Program(nginx, "-c", folder / "nginx.conf", "-p", folder),
        server,
        client(credentials, f"127.0.0.1:{port}") as peer,
    ):
        url = f"https://{HOSTNAME}:{relay_port}"
        yield Site(url, relay_port, www, folder / "authority.pem", server, peer)
    sockets.shutdown()


# --- curl --------------------------------------------------------------------------------


def curl(site: Site, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [
            *(find("curl"), "--silent", "--show-error", "--max-time", "60"),
            *("--cacert", str(site.authority)),
            *("--resolve", f"{HOSTNAME}:{site.port}:127.0.0.1"),
            *arguments,
        ],
        capture_output=True,
        check=False,
    )


@pytest.mark.parametrize("version", ["--http1.1", "--http2"])
def test_curl_gets_every_byte(site: Site, version: str) -> None:
    said = "%{stderr}%{http_version} %{http_code} %{ssl_verify_result}"
    result = curl(site, version, f"{site.url}/big", "--output", "-", "--write-out", said)
    wanted = "1.1" if version == "--http1.1" else "2"
    assert result.stderr.decode() == f"{wanted} 200 0"
    assert hashlib.sha256(result.stdout).hexdigest() == site.sha256("big")


@pytest.mark.parametrize("version", ["--http1.1", "--http2"])
def test_curl_gets_many_in_parallel(site: Site, version: str, tmp_path: Path) -> None:
    arguments: list[str] = [version, "--parallel", "--parallel-max", "30"]
    for number in range(RESOURCES):
        arguments += [f"{site.url}/part{number}.js", "--output", str(tmp_path / f"part{number}.js")]
    assert curl(site, *arguments).returncode == 0
    for number in range(RESOURCES):
        data = (tmp_path / f"part{number}.js").read_bytes()
        assert hashlib.sha256(data).hexdigest() == site.sha256(f"part{number}.js")


def test_an_upload_that_is_refused_early_gets_its_answer(site: Site, tmp_path: Path) -> None:
    """nginx answers 413 and closes while curl still sends; the answer arrives in full."""
    upload = tmp_path / "upload"
    upload.write_bytes(bytes(BIG))
    for _ in range(5):
        result = curl(
            site,
            *("--http1.1", "--header", "Expect:", "--data-binary", f"@{upload}"),
            *(f"{site.url}/refused", "--write-out", "%{http_code}"),
        )
        assert result.stdout.endswith(b"413"), result
        assert b"</html>" in result.stdout


def test_an_unknown_name_is_said_in_curl_s_own_words(site: Site) -> None:
    result = curl(
        site,
        *("--connect-to", f"nobody.example.test:443:127.0.0.1:{site.port}"),
        "https://nobody.example.test/",
    )
    assert result.returncode == 35
    assert b"unrecognized name" in result.stderr


# --- Chromium ------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["h2", "http/1.1"])
def protocol(request: pytest.FixtureRequest) -> str:
    """What the browser speaks inside TLS."""
    return str(request.param)


@pytest.fixture(scope="module")
def page(protocol: str) -> Iterator[Page]:
    """A page of headless Chromium, which finds the site's name at the relay."""
    arguments = [
        *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
        "--host-resolver-rules=MAP *.example.test 127.0.0.1",
    ]
    if protocol == "http/1.1":
        arguments.append("--disable-http2")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=find("chromium"), args=arguments, env=dict(os.environ)
        )
        page = browser.new_context(ignore_https_errors=True).new_page()
        yield page
        browser.close()


def test_chromium_loads_a_page_with_resources_and_a_websocket(
    site: Site, page: Page, protocol: str
) -> None:
    answer = page.goto(f"{site.url}/")
    assert answer is not None
    assert answer.status == 200
    hashes = page.evaluate(f"load({RESOURCES})")
    assert hashes == [site.sha256(f"part{number}.js") for number in range(RESOURCES)]
    assert page.evaluate("echo('hello')") == "hello"
    # The socket stays open while other things come and go.
    for turn in range(3):
        time.sleep(1)
        assert page.evaluate(f"load({RESOURCES})") == hashes
        assert page.evaluate(f"echo('turn {turn}')") == f"turn {turn}"
    entries = "performance.getEntriesByType('resource')"
    protocols = page.evaluate(f"{entries}.map(entry => entry.nextHopProtocol)")
    assert set(protocols) == {protocol}


def test_chromium_names_an_unknown_host(site: Site, page: Page) -> None:
    with pytest.raises(Error, match=r"ERR_SSL_UNRECOGNIZED_NAME_ALERT"):
        page.goto(f"https://nobody.example.test:{site.port}/", timeout=20_000)
