"""Writes the dashboards: ``python -m grafana.build``. The same code writes the same files."""

from __future__ import annotations

import json
from pathlib import Path

from grafana.overview import overview
from grafana.providers import providers
from grafana.quotas import quotas

FOLDER = Path(__file__).parent / "dashboards"


def files() -> dict[Path, str]:
    """What the folder of dashboards holds."""
    built = {"overview": overview(), "providers": providers(), "quotas": quotas()}
    return {
        FOLDER / f"{name}.json": json.dumps(board, indent=2, ensure_ascii=False) + "\n" for name, board in built.items()
    }


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for path, text in files().items():
        path.write_text(text, encoding="utf-8")
