"""What is compared: how each target is started in front of an upstream, and why it cannot be, where it cannot."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

import routerd
from routerd.dialects import DIALECTS
from tests.bench.bodies import FORMS, Body
from tests.bench.front import Upstream

MODEL = "mock"
CHAT = "chat"
SPOKEN = tuple(dialect for dialect in FORMS if dialect in DIALECTS)
ROOT = "/v1"
TOKEN = "bench-token"  # of the bench's own servers, on loopback, for as long as it runs
UNLIMITED = 100_000_000_000
INSTALL_S = 900
CHECKOUT = Path(__file__).parents[2]
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "routerd-bench"
AUTHORIZED = (f"Authorization: Bearer {TOKEN}",)


@dataclass(frozen=True)
class Launch:
    """How a server is started and asked. No command: it is there already."""

    port: int
    command: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    headers: tuple[str, ...] = ()
    name: str = MODEL
    root: str = ROOT
    names: Mapping[str, str] = field(default_factory=dict)

    def model(self, body: Body) -> str:
        """``names``: those of the models whose upstream speaks a certain dialect, where they differ."""
        return self.names.get(body.served_in, self.name)

    def path(self, body: Body) -> str:
        return self.root + FORMS[body.dialect].path


class Target(Protocol):
    """One column of the table."""

    @property
    def name(self) -> str: ...

    @property
    def startable(self) -> bool:
        """Whether the bench starts it anew, in front of any upstream. The others are measured as they run."""
        ...

    @property
    def max_streams(self) -> int:
        """More open streams than this are not asked of it."""
        ...

    def takes(self, body: Body) -> bool:
        """Whether it passes such a request on to such an upstream."""
        ...

    def why_not(self) -> str:
        """The reason it cannot run here; empty if it can. May install what is missing."""
        ...

    def version(self) -> str:
        """Which one it is; empty if unknown."""
        ...

    def launch(self, upstream: Upstream, port: int, directory: Path) -> Launch: ...


@dataclass(frozen=True)
class Direct:
    """No proxy at all: what the instruments themselves take."""

    name: str = "direct"
    startable: bool = False
    max_streams: int = sys.maxsize

    def takes(self, body: Body) -> bool:
        return body.dialect == body.served_in

    def why_not(self) -> str:
        return ""

    def version(self) -> str:
        return ""

    def launch(self, upstream: Upstream, port: int, directory: Path) -> Launch:
        return Launch(upstream.port)


@dataclass(frozen=True)
class Given:
    """A server somebody else started; its upstream must be the bench's (see --upstream-port)."""

    name: str
    url: str
    model: str = MODEL
    token: str = ""
    startable: bool = False
    max_streams: int = sys.maxsize

    @classmethod
    def parse(cls, text: str) -> Given:
        """``NAME=URL[,model=M][,token=T]``; the URL ends in ``/v1``. Raises ValueError."""
        name, _, rest = text.partition("=")
        url, *options = rest.split(",")
        chosen = dict(option.split("=", 1) for option in options)
        if not name or urlsplit(url).port is None or chosen.keys() - {"model", "token"}:
            raise ValueError(f"{text!r} is not NAME=http://127.0.0.1:PORT/v1[,model=M][,token=T]")
        return cls(name, url, chosen.get("model", MODEL), chosen.get("token", ""))

    def takes(self, body: Body) -> bool:
        return body.dialect == body.served_in == CHAT

    def why_not(self) -> str:
        return ""

    def version(self) -> str:
        return ""

    def launch(self, upstream: Upstream, port: int, directory: Path) -> Launch:
        parts = urlsplit(self.url)
        headers = (f"Authorization: Bearer {self.token}",) if self.token else ()
        return Launch(parts.port or 80, headers=headers, name=self.model, root=parts.path.rstrip("/"))


NGINX_CONFIG = """
daemon off; worker_processes 1; pid {directory}/nginx.pid; error_log {directory}/nginx.err warn;
events {{ worker_connections 16384; }}
http {{
  access_log off; client_max_body_size 64m; client_body_buffer_size 4m; client_body_temp_path {directory}/nginx.body;
  proxy_temp_path {directory}/nginx.proxy; keepalive_requests 100000000; tcp_nodelay on;
  upstream mock {{ server {host}:{upstream}; keepalive 512; keepalive_requests 100000000; }}
  server {{
    listen 127.0.0.1:{port} backlog=4096;
    location / {{
      proxy_pass {scheme}://mock; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_buffering off; {trust}
    }}
  }}
}}
"""
NGINX_TRUST = "proxy_ssl_verify on; proxy_ssl_name localhost; proxy_ssl_trusted_certificate {authority};"


@dataclass(frozen=True)
class Nginx:
    """``proxy_pass`` with one worker, kept connections, no buffering, no log."""

    name: str = "nginx"
    startable: bool = True
    max_streams: int = sys.maxsize

    def takes(self, body: Body) -> bool:
        return body.dialect == body.served_in

    def why_not(self) -> str:
        return "" if shutil.which("nginx") else "nginx is not installed (apt-get install nginx-light)"

    def version(self) -> str:
        return nginx_version()

    def launch(self, upstream: Upstream, port: int, directory: Path) -> Launch:
        authority = upstream.authority
        config = directory / "nginx.conf"
        config.write_text(
            NGINX_CONFIG.format(
                directory=directory,
                host="127.0.0.1",
                upstream=upstream.port,
                port=port,
                scheme="https" if authority else "http",
                trust=NGINX_TRUST.format(authority=authority) if authority else "",
            )
        )
        return Launch(port, ("nginx", "-e", str(directory / "nginx.err"), "-c", str(config)))


ROUTERD_CONFIG = """
[server]
listen = "127.0.0.1:{port}"
tokens = ["${{BENCH_TOKEN}}"]

[state]
url = "sqlite:bench.db"

[providers.bench]
base_url = "{url}/v1"
dialect = "chat"
api_key = "${{BENCH_TOKEN}}"
limits = [ {{ requests = {unlimited}, per = "minute" }}, {{ tokens = {unlimited}, per = "minute" }} ]
[providers.bench.models]
"{model}" = {{ id = "mock", context = 1_048_576, max_output = 131_072, input = 0.4, output = 0.8, cached = 0.1 }}
"""
# One more for each other dialect there is.
ROUTERD_PROVIDER = """
[providers.bench-{dialect}]
base_url = "{url}/v1"
dialect = "{dialect}"
api_key = "${{BENCH_TOKEN}}"
[providers.bench-{dialect}.models]
"{model}" = {{ id = "mock", context = 1_048_576, max_output = 131_072, input = 0.4, output = 0.8, cached = 0.1 }}
"""


@dataclass(frozen=True)
class Routerd:
    """The daemon of this checkout: tokens, breakers, two rolling quotas, prices, metrics, and its log in a file."""

    name: str = "routerd"
    startable: bool = True
    max_streams: int = sys.maxsize
    module: str = "routerd"

    def takes(self, body: Body) -> bool:
        return {body.dialect, body.served_in} <= set(SPOKEN)

    def why_not(self) -> str:
        return "" if importlib.util.find_spec("routerd.__main__") else "this checkout has no routerd to serve"

    def version(self) -> str:
        return routerd.__version__

    def launch(self, upstream: Upstream, port: int, directory: Path) -> Launch:
        config = directory / "bench.toml"
        names = {dialect: MODEL if dialect == CHAT else f"{MODEL}-{dialect}" for dialect in SPOKEN}
        main = ROUTERD_CONFIG.format(port=port, url=upstream.url, unlimited=UNLIMITED, model=MODEL)
        others = [
            ROUTERD_PROVIDER.format(dialect=dialect, url=upstream.url, model=names[dialect])
            for dialect in SPOKEN
            if dialect != CHAT
        ]
        config.write_text(main + "".join(others))
        env = {"BENCH_TOKEN": TOKEN, "STATE_DIRECTORY": str(directory), "PYTHONPATH": str(CHECKOUT)} | trust(upstream)
        address = f"127.0.0.1:{port}"
        command = (sys.executable, "-m", self.module, "serve", "--config", str(config), "--listen", address)
        return Launch(port, command, env, AUTHORIZED, names=names)


BARE = Routerd("bare", module="tests.bench.bare")


LITELLM_CONFIG = """
model_list:
  - model_name: {model}
    litellm_params: {{ model: openai/mock, api_base: "{url}/v1", api_key: bench }}
litellm_settings: {{ telemetry: false }}
general_settings: {{ master_key: "{token}" }}
"""
LITELLM_ENV = {"LITELLM_LOG": "ERROR", "LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_MODE": "PRODUCTION"}


@dataclass(frozen=True)
class LiteLLM:
    """LiteLLM's proxy from PyPI, in a virtual environment of its own: one worker, a master key, no database."""

    name: str = "litellm"
    startable: bool = True
    max_streams: int = 500  # there its first event takes half a minute; 5,000 would only fill the memory

    def takes(self, body: Body) -> bool:
        return body.dialect == body.served_in == CHAT

    @property
    def program(self) -> Path:
        return CACHE / "litellm" / "bin" / "litellm"

    def why_not(self) -> str:
        return "" if self.program.exists() else install("litellm[proxy]", self.program.parents[1])

    def version(self) -> str:
        return litellm_version(self.program.parents[1])

    def launch(self, upstream: Upstream, port: int, directory: Path) -> Launch:
        config = directory / "litellm.yaml"
        config.write_text(LITELLM_CONFIG.format(model=MODEL, url=upstream.url, token="sk-" + TOKEN))
        command = (str(self.program), "--config", str(config), "--port", str(port), "--host", "127.0.0.1")
        env = LITELLM_ENV | {"HOME": str(directory)} | trust(upstream)
        headers = (f"Authorization: Bearer sk-{TOKEN}",)
        return Launch(port, (*command, "--num_workers", "1", "--telemetry", "False"), env, headers)


def nginx_version() -> str:
    done = subprocess.run(["nginx", "-v"], capture_output=True, text=True, check=False)
    return done.stderr.strip().rpartition("/")[2]


def litellm_version(home: Path) -> str:
    found = next(home.glob("lib/*/site-packages/litellm-*.dist-info"), None)
    return found.name.removesuffix(".dist-info").partition("-")[2] if found else ""


def trust(upstream: Upstream) -> dict[str, str]:
    """How programs that use OpenSSL's defaults are told of an authority."""
    return {"SSL_CERT_FILE": str(upstream.authority)} if upstream.authority else {}


def install(package: str, home: Path) -> str:
    """Install into a new environment; return why it failed, or nothing."""
    print(f"# installing {package} into {home} (once)", file=sys.stderr, flush=True)
    try:
        venv.create(home, with_pip=True, clear=True)
        pip = [str(home / "bin" / "python"), "-m", "pip", "install", "--quiet", package]
        done = subprocess.run(pip, capture_output=True, text=True, timeout=INSTALL_S, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        return f"cannot be installed: {error}"
    if done.returncode == 0:
        return ""
    shutil.rmtree(home, ignore_errors=True)
    return f"pip cannot install {package}: {(done.stderr.strip().splitlines() or ['no reason given'])[-1]}"
