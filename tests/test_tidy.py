"""The house rules that no linter knows: what may import what, how long a function is, and where vendors are named."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import routerd
from routerd import catalog

ROOT = Path(routerd.__file__).parent
MODULES = {str(path.relative_to(ROOT)): ast.parse(path.read_bytes()) for path in sorted(ROOT.rglob("*.py"))}
FUNCTIONS = [
    (name, node)
    for name, tree in MODULES.items()
    for node in ast.walk(tree)
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
]

RANKS = {"canonical": 0, "dialects": 1, "policy": 1, "state": 1, "telemetry": 1, "providers": 2, "catalog": 2}
RANKS |= {"config": 3, "proxy": 4, "cli": 5, "__main__": 6, "__init__": -1}  # the package itself imports nothing
LINES_MAX = 70  # of a function: past this it is two things
EMPTY_NAMES = {"utils", "util", "helpers", "helper", "common", "manager", "misc"}
# Paths, headers and fields of the wire that bear their maker's name, whoever speaks it.
WIRE_WORDS = {("dialects/chat.py", "groq"), ("dialects/messages.py", "anthropic")}


def _part(name: str) -> str:
    """The folder, or the module at the top, that a file belongs to."""
    return name.partition("/")[0].removesuffix(".py")


def _imports(tree: ast.AST) -> Iterator[str]:
    """The parts of the package that a module imports from."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] == "routerd":
            parts = node.module.split(".")[1:2]
            yield from parts or [alias.name if alias.name in RANKS else "__init__" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = (alias.name.split(".") for alias in node.names)
            yield from (parts[1] if len(parts) > 1 else "__init__" for parts in names if parts[0] == "routerd")


def _words(tree: ast.AST) -> Iterator[str]:
    """Every identifier and every string that is no prose: sentences may name somebody as an example."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str | bytes):
            text = node.value if isinstance(node.value, str) else node.value.decode("latin-1")
            yield from () if " " in text else (text,)
        for field in ("id", "attr", "name", "arg", "asname", "module"):
            found = getattr(node, field, None)
            if isinstance(found, str):
                yield found


def test_imports_go_one_way() -> None:
    """A module imports from lower ranks and from its own folder, so the core never comes to depend on the shell."""
    wrong = [
        f"{name} imports {part}"
        for name, tree in MODULES.items()
        for part in _imports(tree)
        if part != _part(name) and RANKS[part] >= RANKS[_part(name)]
    ]

    assert not wrong


def test_imports_stand_at_the_top() -> None:
    """Except in the commands, whose heavy extras must not cost the daemon its memory."""
    late = [
        f"{name}:{node.lineno}"
        for name, function in FUNCTIONS
        for node in ast.walk(function)
        if isinstance(node, ast.Import | ast.ImportFrom) and _part(name) != "cli"
    ]

    assert not late


def test_functions_fit_on_a_page() -> None:
    """One that does not is two functions."""
    sizes = {f"{name}:{one.name}": (one.end_lineno or 0) - one.lineno + 1 for name, one in FUNCTIONS}

    assert not {function: size for function, size in sizes.items() if size > LINES_MAX}


def test_modules_are_named_for_what_they_hold() -> None:
    """A module called utils is one nobody knows what belongs in."""
    assert not [name for name in MODULES if EMPTY_NAMES & set(name.removesuffix(".py").split("/"))]


def test_vendors_are_named_in_two_folders_only() -> None:
    """What is special about a vendor is its file's and the catalog's business; all other code treats them alike."""
    names = "|".join(map(re.escape, catalog.load().providers))
    vendor = re.compile(rf"(?<![a-z0-9])(?:{names})(?![a-z0-9])", re.IGNORECASE)
    found = {
        (name, word)
        for name, tree in MODULES.items()
        if _part(name) not in ("providers", "catalog")
        for text in _words(tree)
        for word in vendor.findall(text)
    }

    assert found <= WIRE_WORDS
