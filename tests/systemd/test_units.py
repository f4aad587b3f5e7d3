"""The units as files: what they promise each other and the daemon."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from routerd.config import load
from routerd.proxy import service
from tests.systemd.machine import ROOT

UNITS = ROOT / "systemd"
SERVICES = ("routerd.service", "routerd@.service", "user/routerd.service")


def setting(unit: str, name: str) -> list[str]:
    """Every value a unit gives to a name."""
    text = (UNITS / unit).read_text()
    return re.findall(rf"^{name}=(.*)$", text, re.MULTILINE)


def lines(unit: str) -> list[str]:
    return [line for line in (UNITS / unit).read_text().splitlines() if line and not line.startswith("#")]


@pytest.mark.parametrize("unit", SERVICES)
class TestEveryService:
    def test_systemd_waits_longer_for_the_end_than_the_daemon_for_its_clients(self, unit: str) -> None:
        """Else a drain would be killed in the middle."""
        (limit,) = setting(unit, "TimeoutStopSec")

        assert int(limit) >= service.DRAIN_S + service.LAST_WORDS_S + 5

    def test_a_bad_configuration_is_not_tried_again(self, unit: str) -> None:
        """The daemon's exit code for it is 78."""
        assert setting(unit, "RestartPreventExitStatus") == ["78"]
        assert setting(unit, "Restart") == ["on-failure"]

    def test_the_daemon_speaks_for_itself(self, unit: str) -> None:
        """It says when it is ready and that it is alive, and its connections have a place to wait."""
        assert setting(unit, "Type") == ["notify"]
        assert int(setting(unit, "WatchdogSec")[0]) <= 30
        assert int(setting(unit, "FileDescriptorStoreMax")[0]) > 0

    def test_a_crash_loop_never_reaches_the_start_limit(self, unit: str) -> None:
        """A daemon nobody watches must try for ever; only what starts faster than RestartSec= is stopped."""
        interval_s, burst, pause_s = (
            int(setting(unit, name)[0]) for name in ("StartLimitIntervalSec", "StartLimitBurst", "RestartSec")
        )

        assert interval_s / pause_s < burst

    def test_its_address_is_held_by_its_socket(self, unit: str) -> None:
        """A restart of the service leaves it alone."""
        socket = setting(unit, "Requires")[0].replace("%i", "")

        assert (UNITS / Path(unit).with_name(socket)).is_file()


def test_instances_differ_from_the_one_service_in_names_only() -> None:
    """Whatever is hardened in one is hardened in the other."""
    renamed = [
        line.replace("routerd@%i", "routerd")
        .replace("-%i", "")
        .replace("%i.toml", "routerd.toml")
        .replace(" at port %i", "")
        for line in lines("routerd@.service")
        if line != "EnvironmentFile=-/etc/routerd/%i.environment"
    ]

    assert renamed == lines("routerd.service")


def test_hermes_is_ordered_by_a_drop_in() -> None:
    """Its own unit is never touched, and it starts without routerd, too."""
    assert lines("hermes-gateway.service.d/routerd.conf") == [
        "[Unit]",
        "Wants=routerd.service",
        "After=routerd.service",
    ]


def test_the_example_configuration_starts_without_a_provider() -> None:
    """And says so, as a warning."""
    config = load(UNITS / "routerd.example.toml", {})

    assert config.providers == {}
    assert [warning.path for warning in config.warnings] == ["providers"]


def test_what_the_example_configuration_suggests_is_valid(tmp_path: Path) -> None:
    """With every suggestion taken up it still loads."""
    text = (UNITS / "routerd.example.toml").read_text()
    suggested = re.sub(r'^# (?=\[|[a-z_]+ = |"my)', "", text, flags=re.MULTILINE)
    path = tmp_path / "routerd.toml"
    path.write_text(suggested)
    names = ("key_openrouter", "key_groq", "key_local_token")
    for name in names:
        (tmp_path / name).write_text(f"{name}-secret")
    config = load(path, {"CREDENTIALS_DIRECTORY": str(tmp_path)})

    assert "tokens" in tomllib.loads(suggested)["server"]
    assert list(config.providers) == ["openrouter", "groq", "lab"]
    assert not config.warnings


@pytest.mark.real
@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd-analyze here")
@pytest.mark.parametrize("unit", ["routerd.service", "routerd@.service"])
def test_the_exposure_is_as_small_as_promised(unit: str) -> None:
    """By systemd's own reckoning, at most 1.2 of 10; what is left is the network, which is its purpose."""
    command = ("systemd-analyze", "security", "--offline=true", "--threshold=12", str(UNITS / unit))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "unrecognized option" in done.stderr:
        pytest.skip("this systemd-analyze cannot judge files")
    print(done.stdout.splitlines()[-1])

    assert done.returncode == 0, done.stdout
