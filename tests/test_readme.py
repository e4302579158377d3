"""The README's tree is the disk's, and its commands exist."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from typer.testing import CliRunner

from mnemoscope.cli import app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def drawn() -> set[str]:
    """Paths in the annotated tree: folders end in a slash, and what is deeper is indented by two."""
    block = README.split("<!-- tree", 1)[1].split("```", 2)[1]
    found: set[str] = set()
    stack: list[str] = []
    for line in block.strip("\n").splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        for name in re.split(r"\s{2,}", line.strip())[0].split():
            stack[depth:] = [name] if name.endswith("/") else stack[depth : depth + 1]
            parents = "".join(stack[:depth])
            found.add(parents + name)
    return found


def test_the_tree_is_the_disks() -> None:
    """Every Python file of src/ and every folder and page beside it is in the tree, and nothing else is."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "src", "docs"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    names = {
        path for path in listed if not path.endswith(("/__init__.py", "py.typed")) and (ROOT / path).exists()
    }
    files = {path for path in drawn() if not path.endswith("/") and path.startswith(("src/", "docs/"))}
    assert {path for path in names if "/templates/" not in path} == files
    assert all((ROOT / path).exists() for path in drawn())


def test_every_command_in_the_readme_exists() -> None:
    """`mnemoscope NAME` in the text is a command that has help."""
    words = set(re.findall(r"\$ mnemoscope (\w+)", README))
    assert {"build", "show", "find", "verify", "models"} <= words
    for word in words:
        assert CliRunner().invoke(app, [word, "--help"]).exit_code == 0, word


def test_make_targets_of_the_readme_exist() -> None:
    """`make NAME` in the text is a target."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"(?:^|`)make (\w+)", README, re.M)):
        assert re.search(rf"^{target}:", makefile, re.M), target
