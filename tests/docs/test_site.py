"""The documentation site is built without a warning, and loads nothing from other hosts."""

import os
import re
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]


def pages(entry: object) -> list[str]:
    """File names below an entry of the nav."""
    if isinstance(entry, str):
        return [entry]
    values = entry.values() if isinstance(entry, dict) else entry
    assert not isinstance(values, str)
    return [page for value in values for page in pages(value)]  # pyright: ignore[reportGeneralTypeIssues]


def test_the_site_is_built_strictly_and_loads_nothing_from_elsewhere(tmp_path: Path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    built = list((tmp_path / "site").rglob("*.html"))
    assert len(built) > 15
    loaded = re.compile(r'<(?:script|img|iframe)[^>]+src="(?:https?:)?//[^"]+|<link[^>]+rel="?stylesheet"?[^>]+//[^"]+')
    assert [found for page in built for found in loaded.findall(page.read_text(encoding="utf-8"))] == []


def test_every_page_is_in_the_navigation_once():
    named = pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    assert sorted(named) == sorted(path.name for path in (ROOT / "docs").glob("*.md"))
