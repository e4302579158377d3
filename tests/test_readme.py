"""The README's tree is the disk's, and its commands exist."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mnemoscope.cli import app

ROOT = Path(__file__).parents[1]
SPINE = {"", "text", "model", "run", "mine", "neuron"}
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
    """Every file of the spine, every folder of a wing and every page is in the tree, and nothing else is."""
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
    pages = {path for path in names if Path(path).parent == Path("docs")}
    spine = {path for path in names if path.startswith("src/") and _room(path) in SPINE} | pages
    files = {path for path in drawn() if not path.endswith("/") and path.startswith(("src/", "docs/"))}
    assert spine == files
    wings = {str(Path(path).parent) + "/" for path in names - spine}
    folders = {path for path in drawn() if path.endswith("/") and path.startswith("src/")}
    features = {path for path in folders if _room(path) not in SPINE} - {"src/mnemoscope/"}
    assert wings == features | {"docs/pictures/", "docs/tutorials/"}
    assert all((ROOT / path).exists() for path in drawn())


def _room(path: str) -> str:
    """The room of a file or folder of the package; "" for what lies above all rooms."""
    parts = Path(path).parts[2:]
    return parts[0] if parts and "." not in parts[0] else ""


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


# -- the pages ---------------------------------------------------------------------------------------------------

PACKAGE = ROOT / "src" / "mnemoscope"
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def _defined(body: list[ast.stmt]) -> dict[str, ast.stmt]:
    """Functions, classes and constants by their names."""
    names: dict[str, ast.stmt] = {}
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id: node for target in targets if isinstance(target, ast.Name)}
    return names


def exists(name: str) -> bool:
    """Whether `module.function` or `module.Class.method`, below the package, is defined in that very module."""
    parts = name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        base = PACKAGE.joinpath(*parts[:end])
        for file in (base.with_suffix(".py"), base / "__init__.py"):
            if file.exists():
                body = ast.parse(file.read_text(encoding="utf-8")).body
                for part in parts[end:]:
                    if (node := _defined(body).get(part)) is None:
                        return False
                    body = getattr(node, "body", [])
                return True
    return False


def test_names_of_the_architecture_exist() -> None:
    """Every file and function that the page names is there: a page that lies is worse than none."""
    spans = set(re.findall(r"`([\w./]+)`", ARCHITECTURE))
    files = {span for span in spans if span.endswith((".py", ".txt"))}
    folders = {span for span in spans if span.endswith("/")}
    functions = {span for span in spans - files - folders if "." in span and "/" not in span}
    assert len(files) > 20 and len(functions) > 20
    for path in files | folders:
        assert (PACKAGE / path).exists() or (ROOT / path).exists(), path
    assert not {name for name in functions - {"module.function"} if not exists(name)}
    assert (
        not exists("mine.build.nothing") and not exists("no.such") and not exists("run.reading.Run.nothing")
    )


def _lines(paths: Iterable[Path]) -> int:
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)


def test_what_is_to_be_read_is_as_long_as_it_says() -> None:
    """The spine, and the afternoon with a part of it, to within 5 %."""
    spine, afternoon = (
        int(said.replace(",", "")) for said in re.findall(r"about\s([\d,]+)\slines", ARCHITECTURE)
    )
    listed = ARCHITECTURE.partition("## An afternoon")[2].partition("The rest of the spine")[0]
    files = [path for room in SPINE for path in (PACKAGE / room).glob("*.py")]
    assert _lines(files) == pytest.approx(spine, rel=0.05)
    assert _lines(PACKAGE / name for name in re.findall(r"`([\w/]+\.py)`", listed)) == pytest.approx(
        afternoon, rel=0.05
    )


def test_links_of_the_pages_lead_somewhere() -> None:
    """A relative link in a page is a file."""
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([\w./-]+)(?:#[\w-]+)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), (page.name, target)


def test_the_version_is_the_same_everywhere() -> None:
    """The package, the build, and the citation."""
    versions = {
        re.search(rf"^{key} ?[=:] ?\"?([\d.]+)\"?$", (ROOT / path).read_text(encoding="utf-8"), re.M)[1]
        for path, key in {
            "pyproject.toml": "version", "CITATION.cff": "version", "src/mnemoscope/__init__.py": "__version__"
        }.items()
    }  # fmt: skip
    assert len(versions) == 1
