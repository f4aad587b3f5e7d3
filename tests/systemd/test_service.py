"""The installed service on a real systemd: what ``make install`` promises, on a machine of its own.

The machine is booted once for all tests here. Each begins with the usual configuration and a fresh process, but for
the first, which sees the machine as it was installed, and the last, after which nothing is left.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any, Self

import aiohttp
import pytest

from tests.fakes import ScriptedUpstream
from tests.proxy.wire import Heard, get, hear
from tests.rig import HELLO, config_text
from tests.systemd.machine import CannotBoot, Machine, why_not
from tests.systemd.traffic import Idlers, Streams, Tally, steady_load, turn

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(bool(why_not()), reason=why_not()),
    pytest.mark.xdist_group("systemd"),
    pytest.mark.timeout(900),  # the first run builds the machine
]

UNIT = "routerd.service"
OURS = f"_SYSTEMD_UNIT={UNIT}"
URL = "http://127.0.0.1:8080"
CONFIG = "/etc/routerd/routerd.toml"
LOCAL = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "/wheels"}
DAILY = 'limits = [{ requests = 1000000, per = "day", resets = "UTC" }]'
LOCAL_8080 = "0100007F:1F90 01 "  # the far end of an established connection, as /proc/net/tcp has it
WAIT_S = 30.0


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    """A machine with routerd installed from this checkout and a wheelhouse, without any other way to a package."""
    with contextlib.ExitStack() as stack:
        try:
            machine = stack.enter_context(Machine())
        except CannotBoot as error:
            pytest.skip(str(error))
        machine.run("make", "-C", "/src", "install", environ=LOCAL)
        yield machine


@pytest.fixture(scope="module")
def upstream(machine: Machine) -> Iterator[ScriptedUpstream]:
    """A provider on the machine's loopback."""
    upstream = ScriptedUpstream(turn)
    machine.do(upstream.__aenter__())
    yield upstream
    machine.do(upstream.__aexit__(None, None, None))


@pytest.fixture
def service(machine: Machine, upstream: ScriptedUpstream) -> Machine:
    """The machine, its service answering from the provider."""
    configure(machine, text_for(upstream))
    machine.run("systemctl", "reset-failed", UNIT)
    machine.run("systemctl", "restart", UNIT)
    return machine


def text_for(upstream: ScriptedUpstream, *, name: str = "lab") -> str:
    return config_text({name: upstream}, extra=DAILY).replace("memory:", "sqlite:/var/lib/routerd/routerd.db")


def configure(machine: Machine, text: str) -> None:
    machine.path(CONFIG).write_text(text)


def ask(machine: Machine) -> Heard:
    return machine.do(hear(URL, HELLO))


def now(machine: Machine) -> str:
    """The place in the journal where the daemon's next line will be."""
    machine.run("journalctl", "--sync")
    return machine.run("journalctl", "--lines=1", "--show-cursor", OURS).rpartition("-- cursor: ")[2]


def journal(machine: Machine, since: str) -> list[str]:
    """What the daemon itself said since then."""
    machine.run("journalctl", "--sync")
    return machine.run("journalctl", "--quiet", f"--after-cursor={since}", "--output=cat", OURS).splitlines()


def events(machine: Machine, since: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in journal(machine, since) if line.startswith("{")]


def metrics(machine: Machine) -> dict[str, float]:
    lines = machine.do(get(URL, "/metrics")).data.decode().splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[:1] != "#")}


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def answers(machine: Machine) -> bool:
    try:
        return ask(machine).status == 200
    except aiohttp.ClientError:
        return False


class Load:
    """Streams that are open and short requests without end, while the context lasts."""

    def __init__(self, machine: Machine, streams: int) -> None:
        self._machine = machine
        self._count = streams
        self.streams = Streams(URL)

    def __enter__(self) -> Self:
        self._stop = asyncio.Event()
        self._running: Future[Tally] = self._machine.begin(self._short_requests())
        self._machine.do(self.streams.open(self._count))
        return self

    def __exit__(self, *_: object) -> None:
        self._machine.do(self.streams.ended())
        time.sleep(0.5)  # so that requests come afterwards, too
        self._machine._inside.loop.call_soon_threadsafe(self._stop.set)
        self.short = self._running.result()

    async def _short_requests(self) -> Tally:
        async with steady_load(URL) as tally:
            await self._stop.wait()
        return tally

    def report(self, what: str) -> None:
        print(f"\n{what}: {self._count} streams at a time: {self.streams.tally}; short ones: {self.short}")
        assert self.streams.tally.failures == []
        assert self.short.failures == []


class TestInstalled:
    def test_it_runs_at_once_and_makes_nothing_up(self, machine: Machine) -> None:
        """Without any provider: alive, not ready, and honest about why."""
        configure(machine, (machine.path("/src/systemd/routerd.example.toml")).read_text())
        machine.run("systemctl", "restart", UNIT)
        alive, ready, answer = (machine.do(get(URL, path)) for path in ("/healthz", "/readyz", "/v1/models"))

        assert machine.run("systemctl", "is-enabled", "routerd.socket", UNIT).split() == ["enabled", "enabled"]
        assert (alive.status, ready.status, answer.status) == (200, 503, 200)
        refused = ask(machine)
        assert (refused.status, refused.json["error"]["code"]) == (503, "no_provider")

    def test_it_is_nobody_and_its_files_are_nobodys_business(self, machine: Machine) -> None:
        """A user of its own; the configuration is for its eyes, keys for root's, state for itself."""
        paths = (CONFIG, "/etc/routerd/credentials", "/var/lib/routerd", "/var/lib/routerd/routerd.db")
        modes = machine.run("stat", "--format=%a %U:%G", *paths).splitlines()

        assert machine.run("stat", "--format=%U", f"/proc/{machine.show(UNIT, 'MainPID')}") == "routerd"
        assert modes == ["640 root:routerd", "700 root:root", "700 routerd:routerd", "600 routerd:routerd"]

    def test_it_answers(self, service: Machine) -> None:
        """From a provider, through the whole sandbox."""
        heard = ask(service)

        assert (heard.status, heard.headers["x-routerd-provider"]) == (200, "lab")
        assert re.match(r"1 of 1 upstreams admissible, \d open exchange", service.show(UNIT, "StatusText"))

    def test_its_journal_is_json(self, service: Machine) -> None:
        """One line per exchange, and nothing of what was said in it."""
        since = now(service)
        ask(service)
        until(lambda: bool(events(service, since)))
        lines = journal(service, since)

        assert [json.loads(line)["event"] for line in lines] == ["exchange"]
        assert json.loads(lines[0])["outcome"] == "success"
        assert "short answer" not in lines[0]

    def test_a_key_that_only_root_can_read(self, service: Machine, upstream: ScriptedUpstream) -> None:
        """The manager hands it over; the daemon finds it by name, and sends it."""
        service.path("/etc/routerd/credentials/lab").write_text("key-from-a-credential\n")
        configure(service, re.sub(r"api_key = .*", 'api_key = "credential:key_lab"', text_for(upstream)))
        service.run("systemctl", "restart", UNIT)
        ask(service)

        assert upstream.requests[-1].headers["authorization"] == "Bearer key-from-a-credential"

    def test_the_exposure_is_small(self, service: Machine) -> None:
        """As the running systemd reckons it: at most 1.2 of 10."""
        verdict = service.run("systemd-analyze", "security", "--no-pager", UNIT).splitlines()[-1]
        print(f"\n{verdict}")
        found = re.search(r"(\d+\.\d+) ", verdict)

        assert found is not None
        assert float(found[1]) <= 1.2

    def test_hermes_starts_after_it(self, service: Machine) -> None:
        """Its own units, the plain one and a profile's, are ordered without being touched."""
        for name in ("hermes-gateway.service", "hermes-gateway-work.service"):
            service.path(f"/etc/systemd/system/{name}").write_text("[Service]\nExecStart=/bin/true\n")
        service.run("systemctl", "daemon-reload")

        for name in ("hermes-gateway.service", "hermes-gateway-work.service"):
            assert UNIT in service.show(name, "After").split()
            assert UNIT in service.show(name, "Wants").split()

    def test_one_more_instance(self, service: Machine, upstream: ScriptedUpstream) -> None:
        """Named after its port, with a configuration and state of its own."""
        text = text_for(upstream).replace("/var/lib/routerd/", "")
        service.path("/etc/routerd/8081.toml").write_text(text)
        service.run("chmod", "644", "/etc/routerd/8081.toml")
        service.run("systemctl", "start", "routerd@8081.socket", "routerd@8081.service")
        heard = service.do(hear("http://127.0.0.1:8081", HELLO))
        service.run("systemctl", "stop", "routerd@8081.socket", "routerd@8081.service")

        assert heard.status == 200
        assert service.path("/var/lib/routerd-8081/routerd.db").exists()


class TestReload:
    def test_a_good_configuration_is_taken_up(self, service: Machine, upstream: ScriptedUpstream) -> None:
        """The same process answers from the other provider."""
        process = service.show(UNIT, "MainPID")
        configure(service, text_for(upstream, name="other"))
        service.run("systemctl", "reload", UNIT)

        assert ask(service).headers["x-routerd-provider"] == "other"
        assert service.show(UNIT, "MainPID") == process
        assert metrics(service)['routerd_config_reloads_total{result="success"}'] == 1

    def test_it_is_not_noticed(self, service: Machine) -> None:
        """Under load, again and again."""
        with Load(service, 20) as load:
            for _ in range(3):
                service.run("systemctl", "reload", UNIT)

        load.report("three reloads")

    def test_a_bad_one_is_refused_and_the_command_says_so(self, service: Machine) -> None:
        """The old one stays in force; what is wrong is in the journal, path by path."""
        since = now(service)
        service.path(CONFIG).write_text(service.path(CONFIG).read_text() + "\n[defaults.nonsense]\n")
        said = service.run("systemctl", "reload", UNIT, check=False)

        assert "failed" in said
        assert ask(service).status == 200
        assert service.show(UNIT, "ActiveState") == "active"
        problems = [line["path"] for line in events(service, since) if line["event"] == "config"]
        assert problems == ["defaults.nonsense"]
        assert metrics(service)['routerd_config_reloads_total{result="failure"}'] == 1

    def test_a_start_with_a_bad_one_ends_at_once(self, service: Machine) -> None:
        """With the exit code that stops systemd from trying again."""
        configure(service, "nonsense")
        service.run("systemctl", "stop", UNIT)
        service.run("systemctl", "start", UNIT, check=False)

        assert service.show(UNIT, "ExecMainStatus") == "78"
        assert service.show(UNIT, "ActiveState") == "failed"
        assert service.show(UNIT, "NRestarts") == "0"


async def _make_idlers() -> Idlers:
    return Idlers(URL)


class TestRestart:
    def test_no_request_fails_and_no_stream_is_cut(self, service: Machine) -> None:
        """Fifty open streams, short requests all the time on kept and on new connections, and a restart."""
        with Load(service, 50) as load:
            before = service.show(UNIT, "MainPID")
            began = time.monotonic()
            service.run("systemctl", "restart", UNIT)
            took_s = time.monotonic() - began

        assert service.show(UNIT, "MainPID") != before
        load.report(f"restart in {took_s:.1f} s")

    def test_connections_that_are_kept_alive_outlive_it(self, service: Machine) -> None:
        """All of them: the next request goes into the same connection, to another process."""
        idlers = service.do(_make_idlers())
        service.do(idlers.ask(300))
        ends = service.run("cat", "/proc/net/tcp").count(LOCAL_8080)
        service.run("systemctl", "restart", UNIT)
        kept = service.run("cat", "/proc/net/tcp").count(LOCAL_8080)
        tally = service.do(idlers.ask(300))
        service.do(idlers.close())

        print(f"\nkept alive over a restart: {kept} of {ends} connections; {tally}")
        assert kept == ends
        assert tally.failures == []

    def test_an_upgrade_does_neither(self, service: Machine) -> None:
        """``make install`` once more, under load: configuration and state stay, the old version is gone."""
        text = service.path(CONFIG).read_text()
        release = service.run("readlink", "/opt/routerd/current")
        with Load(service, 20) as load:
            service.run("make", "-C", "/src", "install", environ=LOCAL)

        load.report("upgrade")
        assert service.path(CONFIG).read_text() == text
        assert service.run("ls", "/opt/routerd").split() == ["current", service.run("readlink", "/opt/routerd/current")]
        assert service.run("readlink", "/opt/routerd/current") != release

    def test_an_upgrade_that_does_not_fit_changes_nothing(self, service: Machine) -> None:
        """The new version refuses the configuration before anything is touched."""
        process, release = service.show(UNIT, "MainPID"), service.run("readlink", "/opt/routerd/current")
        service.path(CONFIG).write_text(service.path(CONFIG).read_text() + "\n[defaults.nonsense]\n")
        said = service.run("make", "-C", "/src", "install", check=False, environ=LOCAL)

        assert "nothing was changed" in said
        assert service.show(UNIT, "MainPID") == process
        assert service.run("ls", "/opt/routerd").split() == ["current", release]

    def test_after_a_kill_it_is_back_and_has_forgotten_nothing(self, service: Machine) -> None:
        """Requests wait meanwhile, and the day's window holds what was spent of it."""
        ask(service)
        name = next(key for key in metrics(service) if key.startswith("routerd_quota_remaining"))
        before = metrics(service)[name]
        service.run("systemctl", "kill", "--signal=KILL", "--kill-whom=main", UNIT)
        began = time.monotonic()
        heard = ask(service)
        print(f"\nkill -9: answered again after {time.monotonic() - began:.1f} s")

        assert heard.status == 200
        assert metrics(service)[name] == before - 1
        assert service.show(UNIT, "NRestarts") == "1"

    def test_whoever_ends_it_in_the_middle_learns_where_it_was(self, service: Machine) -> None:
        """The watchdog's signal leaves the stack in the journal, and a new process."""
        since = now(service)
        service.run("systemctl", "kill", "--signal=ABRT", "--kill-whom=main", UNIT)

        until(lambda: answers(service))
        assert any("service.py" in line and line.startswith("  File ") for line in journal(service, since))

    def test_a_stuck_process_is_replaced(self, service: Machine) -> None:
        """The watchdog notices that nothing moves. Whoever it had accepted is lost with it, the next is served."""
        service.run("mkdir", "-p", "/run/systemd/system/routerd.service.d")
        service.path("/run/systemd/system/routerd.service.d/test.conf").write_text(
            "[Service]\nWatchdogSec=2\nTimeoutAbortSec=1\n"
        )
        service.run("systemctl", "daemon-reload")
        service.run("systemctl", "restart", UNIT)
        stuck = service.show(UNIT, "MainPID")
        service.run("sh", "-c", f"kill -STOP {stuck}")
        began = time.monotonic()
        until(lambda: answers(service))
        print(f"\nwatchdog: answered again after {time.monotonic() - began:.1f} s")
        service.run("rm", "-r", "/run/systemd/system/routerd.service.d")
        service.run("systemctl", "daemon-reload")

        assert service.show(UNIT, "MainPID") != stuck
        assert service.show(UNIT, "NRestarts") == "1"


class TestForOneUser:
    def test_beside_a_hermes_that_is_a_users_service(self, service: Machine, upstream: ScriptedUpstream) -> None:
        """Without root, in the user's own folders, with the user's keys; and gone again without a trace."""
        service.run("useradd", "--create-home", "agent")
        service.run("loginctl", "enable-linger", "agent")
        until(service.path("/run/user/1000/bus").exists)
        home = "/home/agent/.config"
        service.path(f"{home}/routerd/credentials").mkdir(parents=True)
        service.path(f"{home}/routerd/credentials/lab").write_text("key-of-a-user")
        text = re.sub(r"api_key = .*", 'api_key = "credential:key_lab"', config_text({"lab": upstream}))
        service.path(f"{home}/routerd/routerd.toml").write_text(text)
        service.path(f"{home}/systemd/user/routerd.socket.d").mkdir(parents=True)
        drop_in = service.path(f"{home}/systemd/user/routerd.socket.d/port.conf")
        drop_in.write_text("[Socket]\nListenStream=\nListenStream=127.0.0.1:8090\n")
        service.run("chown", "--recursive", "agent:", home)

        user = ("runuser", "--user=agent", "--", "env", "HOME=/home/agent", "XDG_RUNTIME_DIR=/run/user/1000")
        service.run(*user, "sh", "/src/systemd/install.sh", "--user", environ=LOCAL)
        assert service.do(hear("http://127.0.0.1:8090", HELLO)).status == 200
        assert upstream.requests[-1].headers["authorization"] == "Bearer key-of-a-user"
        assert "routerd 0" in service.run(*user, "/home/agent/.local/bin/routerd", "--version")
        service.run(*user, "systemctl", "--user", "restart", "routerd")
        assert service.do(hear("http://127.0.0.1:8090", HELLO)).status == 200
        service.run(*user, "sh", "/src/systemd/uninstall.sh", "--user", environ={"PURGE": "1"})
        assert not service.path(f"{home}/routerd").exists()
        assert not service.path("/home/agent/.local/share/routerd").exists()


class TestUninstalled:
    def test_configuration_and_state_stay_unless_purged(self, service: Machine) -> None:
        """And what stayed is taken up again by the next installation."""
        text = service.path(CONFIG).read_text()
        service.run("make", "-C", "/src", "uninstall")
        assert service.run("systemctl", "list-unit-files", "routerd*", "--no-legend", check=False) == ""
        assert not service.path("/opt/routerd").exists()
        assert not service.path("/usr/local/bin/routerd").is_symlink()
        assert service.path(CONFIG).read_text() == text
        assert service.path("/var/lib/routerd/routerd.db").exists()

        service.run("make", "-C", "/src", "install", environ=LOCAL)
        assert ask(service).status == 200
        service.run("make", "-C", "/src", "uninstall", "PURGE=1")
        assert not service.path("/etc/routerd").exists()
        assert not service.path("/var/lib/routerd").exists()
        assert service.run("getent", "passwd", "routerd", check=False) == ""
