"""The command line: what each command prints, what it changes, and how it ends."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from routerd import __version__, cli
from routerd.__main__ import main

ROOT = Path(cli.__file__).parents[2]
PIPED = {"PATH": os.environ["PATH"], "OPENROUTER_API_KEY": "k", "HOME": "/nonexistent"}

SOUND = """
[server]
listen = ["unix:/run/routerd/routerd.sock", "127.0.0.1:9090"]
tokens = ["${HERMES_TOKEN}"]
[providers.lab]
base_url = "http://127.0.0.1:9001/v1"
models = { big = { context = 200_000, max_output = 8_000, input = 1.5, output = 6 }, cheap = { context = 70_000 } }
[providers.spare]
base_url = "http://127.0.0.1:9002/v1"
models = { big = { context = 100_000, input = 1, output = 4, tools = false } }
[routes.auto]
models = ["big", "cheap"]
"""
UNSOUND = '[server]\nlisten = "0.0.0.0:1"\n[defaults]\nprefer = "cheep"\n'


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No key and no config of this machine takes part."""
    for name in list(os.environ):
        if name.endswith(("_KEY", "_TOKEN")) or name.startswith(("XDG_", "HERMES_", "ROUTERD_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HERMES_TOKEN", "sk-hidden")
    monkeypatch.chdir(tmp_path)


def write(text: str) -> None:
    Path("routerd.toml").write_text(text)


class TestMain:
    @pytest.mark.parametrize("arguments", [["dance"], ["check", "--dance"], ["check", "extra"]])
    def test_wrong_usage_ends_with_2(self, arguments: list[str]) -> None:
        """As for every other program."""
        with pytest.raises(SystemExit) as end:
            main(arguments)

        assert end.value.code == cli.EXIT_USAGE

    def test_without_a_command_it_shows_them_all(self, capsys: pytest.CaptureFixture[str]) -> None:
        """And counts that as wrong usage."""
        assert main([]) == cli.EXIT_USAGE

        shown = capsys.readouterr().err
        assert all(name in shown for name in cli.names())

    def test_tells_its_version(self, capsys: pytest.CaptureFixture[str]) -> None:
        """One line, one version."""
        with pytest.raises(SystemExit) as end:
            main(["--version"])

        assert end.value.code == cli.EXIT_FINE
        assert capsys.readouterr().out == f"routerd {__version__}\n"

    @pytest.mark.parametrize("command", ["models", "hermes"])
    def test_a_bad_config_ends_with_78(self, command: str, capsys: pytest.CaptureFixture[str]) -> None:
        """Which systemd takes for a reason not to try again; every problem has been said."""
        write(UNSOUND)

        assert main([command]) == cli.EXIT_CONFIG
        assert len(capsys.readouterr().err.splitlines()) == 3

    @pytest.mark.parametrize("name", cli.names())
    def test_every_command_is_named_like_its_file(self, name: str) -> None:
        """That is how it is found without importing the others."""
        command = cli.command(name)

        assert name == command.NAME
        assert command.HELP

    @pytest.mark.parametrize("command", ["check", "models", "hermes"])
    def test_heavy_extras_are_not_imported_until_they_are_needed(self, command: str) -> None:
        """A command that draws no table and writes no YAML does not wait for what could."""
        code = f"import sys\nfrom routerd import cli\ncli.command({command!r})\nprint(*sys.modules)"
        ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)

        assert not {"rich", "ruamel.yaml", "aiohttp"} & set(ran.stdout.split())

    def test_a_reader_that_leaves_early_is_no_error(self) -> None:
        """``routerd models | head -1`` ends quietly."""
        piped = f"{sys.executable} -m routerd models | head -1"
        ran = subprocess.run(piped, shell=True, capture_output=True, text=True, check=True, env=PIPED, cwd=ROOT)

        assert ran.stderr == ""


class TestCheck:
    def test_a_sound_config_is_summed_up(self, capsys: pytest.CaptureFixture[str]) -> None:
        """What will listen, who will answer, in which order."""
        write(SOUND)

        assert main(["check"]) == cli.EXIT_FINE

        shown = capsys.readouterr().out
        assert "listen     unix:/run/routerd/routerd.sock, 127.0.0.1:9090\n" in shown
        assert "provider   lab: http://127.0.0.1:9001/v1, no key, 2 models\n" in shown
        assert "route      auto: lab/big | spare/big > lab/cheap (100,000 tokens)\n" in shown
        assert "sk-hidden" not in shown

    def test_every_problem_goes_to_stderr_and_it_ends_with_1(self, capsys: pytest.CaptureFixture[str]) -> None:
        """Here a bad config is the finding, not the obstacle."""
        write(UNSOUND)

        assert main(["check"]) == cli.EXIT_WRONG

        printed = capsys.readouterr()
        assert printed.out == ""
        assert [line.partition(":")[0] for line in printed.err.splitlines()[:3]] == [
            "server.tokens",
            "defaults.prefer",
            "providers",
        ]
        assert printed.err.splitlines()[3].startswith("3 problems in ")

    def test_a_file_can_be_named(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """One that is not there is a problem."""
        assert main(["check", "--config", "no.toml"]) == cli.EXIT_WRONG
        assert f"{tmp_path / 'no.toml'}: cannot be read" in capsys.readouterr().err

    def test_warnings_do_not_fail(self, capsys: pytest.CaptureFixture[str]) -> None:
        """They are said, marked as what they are."""
        write(SOUND.replace("context = 200_000", "context = 20_000"))

        assert main(["check"]) == cli.EXIT_FINE
        assert capsys.readouterr().err.startswith("warning: routes.auto: ")

    def test_simulation_is_said_loudly(self, capsys: pytest.CaptureFixture[str]) -> None:
        """Without a key and a config every answer would be made up."""
        assert main(["check"]) == cli.EXIT_FINE
        assert "SIMULATED" in capsys.readouterr().out


class TestModels:
    def test_prints_plain_columns_into_a_pipe(self, capsys: pytest.CaptureFixture[str]) -> None:
        """Routes, then one line for each offer, the cheapest of a model first."""
        write(SOUND)

        assert main(["models"]) == cli.EXIT_FINE

        lines = capsys.readouterr().out.splitlines()
        assert lines[0] == "auto: lab/big | spare/big > lab/cheap"
        assert lines[4:] == [
            "MODEL  PROVIDER   WINDOW  OUTPUT    IN  OUT  CACHED  CAN",
            "big    spare     100,000             1    4",
            "big    lab       200,000   8,000   1.5    6          tools",
            "cheap  lab        70,000          free               tools",
        ]

    def test_prints_json_on_demand(self, capsys: pytest.CaptureFixture[str]) -> None:
        """The same for programs."""
        write(SOUND)

        assert main(["models", "--json"]) == cli.EXIT_FINE

        printed = json.loads(capsys.readouterr().out)
        assert printed["routes"] == [
            {"name": "auto", "context_tokens": 100_000, "tiers": [["lab/big", "spare/big"], ["lab/cheap"]]}
        ]
        assert [(offer["model"], offer["provider"]) for offer in printed["models"]] == [
            ("big", "spare"),
            ("big", "lab"),
            ("cheap", "lab"),
        ]

    def test_draws_a_table_on_a_terminal(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """With every offer in it."""
        write(SOUND)
        monkeypatch.setenv("COLUMNS", "120")
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)

        assert main(["models"]) == cli.EXIT_FINE

        shown = capsys.readouterr().out
        assert "PROVIDER" in shown
        assert shown.count("lab") >= 2


class TestHermes:
    def test_shows_what_can_be_pasted(self, capsys: pytest.CaptureFixture[str]) -> None:
        """The token stands there as in the daemon's own config: by reference."""
        write(SOUND)

        assert main(["hermes"]) == cli.EXIT_FINE

        printed = capsys.readouterr().out
        assert "sk-hidden" not in printed
        assert yaml.safe_load(printed) == {
            "model": {
                "default": "auto",
                "provider": "custom",
                "base_url": "http://127.0.0.1:9090/v1",
                "api_key": "${HERMES_TOKEN}",
                "context_length": 100_000,
            },
            "custom_providers": [
                {
                    "name": "routerd",
                    "base_url": "http://127.0.0.1:9090/v1",
                    "api_key": "${HERMES_TOKEN}",
                    "model": "auto",
                    "api_mode": "chat_completions",
                    "models": {"auto": {"context_length": 100_000}},
                }
            ],
        }

    def test_a_literal_token_is_not_shown_either(self, capsys: pytest.CaptureFixture[str]) -> None:
        """A variable to be set stands in its place, and a comment says so."""
        write(SOUND.replace("${HERMES_TOKEN}", "sk-hidden"))

        assert main(["hermes"]) == cli.EXIT_FINE

        printed = capsys.readouterr().out
        assert "sk-hidden" not in printed
        assert printed.startswith("# set ROUTERD_TOKEN")
        assert yaml.safe_load(printed)["model"]["api_key"] == "${ROUTERD_TOKEN}"

    @pytest.mark.parametrize(
        ("listen", "address"),
        [("0.0.0.0:8080", "127.0.0.1:8080"), ("[::]:8080", "[::1]:8080"), ("192.168.1.5:80", "192.168.1.5:80")],
    )
    def test_gives_an_address_that_can_be_reached(
        self, listen: str, address: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Every address of the machine includes loopback."""
        write(SOUND.replace('"127.0.0.1:9090"', f'"{listen}"'))

        assert main(["hermes"]) == cli.EXIT_FINE
        assert yaml.safe_load(capsys.readouterr().out)["model"]["base_url"] == f"http://{address}/v1"

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            ((', "127.0.0.1:9090"', ""), "has no TCP address"),
            (("100_000", "32_000"), "Hermes does not start below 64,000"),
        ],
    )
    def test_says_why_hermes_could_not_use_the_daemon(
        self, change: tuple[str, str], reason: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Better now than when Hermes refuses to start."""
        write(SOUND.replace(*change))

        assert main(["hermes"]) == cli.EXIT_WRONG
        assert reason in capsys.readouterr().err

    def test_warns_of_a_variable_that_overrules_the_file(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Hermes prefers it to any ``base_url``."""
        write(SOUND)
        monkeypatch.setenv("CUSTOM_BASE_URL", "http://elsewhere")

        main(["hermes"])

        assert "CUSTOM_BASE_URL is set" in capsys.readouterr().err


EXISTING = """\
# my agent
model:
  default: some/old-model   # until routerd
  provider: openrouter
  api_mode: anthropic_messages
  max_tokens: 4096
agent: {api_max_retries: 6}
custom_providers:
- name: other
  base_url: http://other/v1
- name: routerd
  base_url: http://old/v1
  extra_headers: {x-team: a}
terminal:
  motto: 'quoted'
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Hermes' folder, with a sound config of the daemon in the working directory."""
    write(SOUND)
    monkeypatch.setenv("HERMES_HOME", str(tmp_path / "hermes"))
    return tmp_path / "hermes"


class TestHermesWrite:
    def test_makes_a_file_only_its_owner_can_read(self, home: Path) -> None:
        """The token stands in it."""
        assert main(["hermes", "--write"]) == cli.EXIT_FINE

        path = home / "config.yaml"
        assert yaml.safe_load(path.read_text())["model"]["api_key"] == "sk-hidden"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert [entry.name for entry in home.iterdir()] == ["config.yaml"]

    def test_uses_the_home_directory_where_nothing_else_is_said(self, tmp_path: Path) -> None:
        """``~/.hermes`` is where Hermes looks."""
        write(SOUND)

        assert main(["hermes", "--write"]) == cli.EXIT_FINE
        assert (tmp_path / ".hermes" / "config.yaml").is_file()

    def test_keeps_everything_else(self, home: Path) -> None:
        """Comments, quotes, other settings and other providers; only another endpoint's ``api_mode`` goes."""
        home.mkdir()
        path = home / "config.yaml"
        path.write_text(EXISTING)

        assert main(["hermes", "--write"]) == cli.EXIT_FINE

        text = path.read_text()
        written = yaml.safe_load(text)
        assert text.startswith("# my agent\n")
        assert "# until routerd" in text
        assert "motto: 'quoted'" in text
        assert "agent: {api_max_retries: 6}" in text
        assert written["model"]["default"] == "auto"
        assert written["model"]["max_tokens"] == 4096
        assert "api_mode" not in written["model"]
        assert [entry["name"] for entry in written["custom_providers"]] == ["other", "routerd"]
        assert written["custom_providers"][1]["base_url"] == "http://127.0.0.1:9090/v1"
        assert written["custom_providers"][1]["extra_headers"] == {"x-team": "a"}

    def test_keeps_what_was_there_in_a_backup(self, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """Byte for byte, private, and named in what is printed."""
        home.mkdir()
        (home / "config.yaml").write_text(EXISTING)

        main(["hermes", "--write"])

        (backup,) = home.glob("config.yaml.*.bak")
        assert backup.read_text() == EXISTING
        assert stat.S_IMODE(backup.stat().st_mode) == 0o600
        assert backup.name in capsys.readouterr().out

    def test_does_nothing_the_second_time(self, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """No backup of what has not changed."""
        main(["hermes", "--write"])
        main(["hermes", "--write"])

        assert [entry.name for entry in home.iterdir()] == ["config.yaml"]
        assert "is as it should be" in capsys.readouterr().out

    def test_understands_a_model_given_as_one_word(self, home: Path) -> None:
        """Older versions of Hermes wrote it so."""
        home.mkdir()
        (home / "config.yaml").write_text("model: some/old-model\ncustom_providers:\n")

        assert main(["hermes", "--write"]) == cli.EXIT_FINE
        assert yaml.safe_load((home / "config.yaml").read_text())["model"]["default"] == "auto"

    def test_leaves_a_link_a_link(self, home: Path, tmp_path: Path) -> None:
        """Dotfiles live elsewhere."""
        home.mkdir()
        (tmp_path / "dotfile.yaml").write_text("a: 1\n")
        (home / "config.yaml").symlink_to(tmp_path / "dotfile.yaml")

        main(["hermes", "--write"])

        assert (home / "config.yaml").is_symlink()
        assert yaml.safe_load((tmp_path / "dotfile.yaml").read_text())["a"] == 1

    @pytest.mark.parametrize("content", [b"a: [", b"- a\n", b"\xff", b"a: 1\na: 2\n", b"--- 1\n--- 2\n"])
    def test_does_not_touch_what_it_does_not_understand(
        self, home: Path, content: bytes, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """A file that is broken stays as it is, and so does the folder."""
        home.mkdir()
        (home / "config.yaml").write_bytes(content)

        assert main(["hermes", "--write"]) == cli.EXIT_WRONG

        assert "it was not changed" in capsys.readouterr().err
        assert (home / "config.yaml").read_bytes() == content
        assert [entry.name for entry in home.iterdir()] == ["config.yaml"]

    def test_says_what_the_system_refuses(self, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """A folder in the file's place, for one."""
        (home / "config.yaml").mkdir(parents=True)

        assert main(["hermes", "--write"]) == cli.EXIT_WRONG
        assert "Is a directory" in capsys.readouterr().err
