"""The hop in front of the upstream: one nginx that ends TLS on one port and takes plain HTTP on another."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.bench import machine
from tests.bench.instruments import Unavailable

DAYS_VALID = "2"
READY_S = 5.0

CONFIG = """
daemon off; worker_processes 1; pid {directory}/front.pid; error_log {directory}/front.err warn;
events {{ worker_connections 4096; }}
http {{
  access_log off; client_max_body_size 64m; client_body_buffer_size 4m; client_body_temp_path {directory}/front.body;
  proxy_temp_path {directory}/front.proxy; keepalive_requests 100000000; tcp_nodelay on;
  upstream mock {{ server 127.0.0.1:{upstream}; keepalive 512; keepalive_requests 100000000; }}
  server {{
    listen 127.0.0.1:{plain}; listen 127.0.0.1:{tls} ssl;
    ssl_certificate {directory}/front.crt; ssl_certificate_key {directory}/front.key; ssl_protocols TLSv1.2 TLSv1.3;
    location / {{
      proxy_pass http://mock; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_buffering off;
    }}
  }}
}}
"""


@dataclass(frozen=True)
class Upstream:
    """Where a target sends its requests: base URL without path, and the authority that signed its certificate."""

    host: str
    port: int
    authority: Path | None = None

    @property
    def url(self) -> str:
        return f"{'https' if self.authority else 'http'}://{self.host}:{self.port}"


def why_not() -> str:
    """The reason there can be no hop here; empty if there can."""
    missing = [program for program in ("nginx", "openssl") if shutil.which(program) is None]
    return f"{' and '.join(missing)} not installed" if missing else ""


@contextlib.contextmanager
def running(upstream_port: int, core: int, directory: Path) -> Iterator[tuple[Upstream, Upstream]]:
    """Run the hop; gives its plain and its TLS side."""
    authority = make_certificate(directory)
    plain, tls = machine.free_port(), machine.free_port()
    config = directory / "front.conf"
    config.write_text(CONFIG.format(directory=directory, upstream=upstream_port, plain=plain, tls=tls))
    log = directory / "front.log"
    process = machine.spawn(["nginx", "-e", str(directory / "front.err"), "-c", str(config)], core, log)
    try:
        machine.wait_for_port(plain, READY_S)
        yield Upstream("127.0.0.1", plain), Upstream("localhost", tls, authority)
    finally:
        machine.stop(process)


def make_certificate(directory: Path) -> Path:
    """A self-signed certificate for localhost, which is therefore its own authority. P-256, as most providers have."""
    certificate = directory / "front.crt"
    command = ["openssl", "req", "-x509", "-nodes", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
    command += ["-days", DAYS_VALID, "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    command += ["-keyout", str(directory / "front.key"), "-out", str(certificate)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        msg = f"openssl cannot make a certificate: {done.stderr.strip().splitlines()[-1]}"
        raise Unavailable(msg)
    return certificate
