"""What is not installed is said in one line, which names the extra to install; all else works without."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from synthetic import make_run
from tiny import model_folder

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

NEEDED = [  # package, the extra that has it, a command that needs it
    ("gguf", "gguf", "models check {place}/model.gguf"),
    ("accelerate", "gguf", "models check {place}/model.gguf"),
    ("datasets", "datasets", "build no-model --corpus some/data -o {place}/run"),
    ("peft", "adapters", "models check {place}/model --adapter {place}/adapter"),
    ("fastapi", "web", "serve {place}/run"),
    ("fastapi", "web", "site {place}/run -o {place}/site"),
    ("starlette", "web", "serve --static {place}/pages"),
    ("uvicorn", "web", "serve {place}/run --port 0"),
    ("mcp", "mcp", "mcp {place}/run"),
    ("ray", "ray", "build no-model --corpus {place}/text.txt -o {place}/other --engine ray"),
    ("fsspec", "remote", "show memory://bucket/run"),
    ("s3fs", "remote", "show s3://bucket/run"),
    ("s3fs", "remote", "build no-model --corpus s3://bucket/a.txt -o {place}/other"),
    ("spacy", "nlp", "build no-model --corpus {place}/text.txt --segment sentence:spacy -o {place}/other"),
    ("simplemma", "nlp", "test {place}/run L1N3 --pattern lemma:go"),
]
SPARED = {"triton": "device"}  # without it torch does the same, slower
BESIDE = {  # come with another
    "huggingface_hub": "transformers",
    "markupsafe": "jinja2",
    "starlette": "fastapi",
    "mcp_types": "mcp",
}
WITH_TORCH = {"gguf", "accelerate", "peft"}  # the model is looked at first

# Each command in a process that was forked before anything of ours was imported but what every command needs.
SCRIPT = """
import json, os, sys
from mnemoscope.cli import main

def answer(hidden, words):
    read, write = os.pipe()
    if not (child := os.fork()):
        os.dup2(write, 2)
        sys.modules[hidden] = None
        sys.argv = ["mnemoscope", *words]
        code = 0
        try:
            main()
        except SystemExit as end:
            code = end.code
        finally:
            sys.stderr.flush()
            os._exit(code if isinstance(code, int) else 1)
    os.close(write)
    with os.fdopen(read) as said:
        line = said.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), line

given = json.load(sys.stdin)
assert not {name.partition(".")[0] for name in sys.modules} & {hidden for hidden, _ in given}
json.dump([answer(hidden, words) for hidden, words in given], sys.stdout)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("torch", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_what_is_missing_is_said_in_one_line(torch: bool, tmp_path: Path) -> None:
    """Exit code 2, and the command that installs it, for each part in each command that needs it."""
    rows = [row for row in NEEDED if (row[0] in WITH_TORCH) == torch]
    make_run(tmp_path / "run")
    for name in ("pages", "adapter"):
        (tmp_path / name).mkdir()
    for file in ("text.txt", "model.gguf", "pages/site.json", "adapter/adapter_model.safetensors"):
        (tmp_path / file).write_text("some text")
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    if torch:
        model_folder(tmp_path / "model")
    given = [(hidden, command.format(place=tmp_path).split()) for hidden, _, command in rows]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], input=json.dumps(given), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for (hidden, extra, command), (code, said) in zip(rows, json.loads(done.stdout), strict=True):
        told = f"{command} without {hidden}: {code}, {said}"
        *before, line = said.splitlines() or [""]
        assert code == 2 and "Traceback" not in said and not before, told
        assert hidden in line.lower() and f"pip install 'mnemoscope[{extra}]'" in line, told


def _imported(tree: ast.AST) -> Iterator[str]:
    """Packages that a file imports, anywhere, but for a type checker."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield str(node.module).partition(".")[0]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("find_spec"):
            yield from (each.value for each in node.args if isinstance(each, ast.Constant))
        yield from _imported(node)


def _named(requirements: list[str]) -> set[str]:
    return {re.split(r"[\[><=; ]", each)[0].lower().replace("-", "_") for each in requirements}


def test_every_optional_package_is_in_the_table() -> None:
    """Whatever is imported is part of Python, comes with a plain installation, or is listed above; and every extra that
    a user may ask for has a row."""
    found = set[str]()
    for file in (ROOT / "src").rglob("*.py"):
        found |= set(_imported(ast.parse(file.read_text(encoding="utf-8"))))
    core, of = _named(PROJECT["dependencies"]), packages_distributions()
    plain = {name for name in found if {each.lower().replace("-", "_") for each in of.get(name, [])} & core}
    optional = found - plain - set(sys.stdlib_module_names) - {"mnemoscope"}
    listed = {hidden for hidden, *_ in NEEDED} | SPARED.keys() | BESIDE.keys()
    assert set(BESIDE.values()) <= core | listed
    assert optional == listed & found, optional ^ (listed & found)
    assert listed - found <= {"gguf", "accelerate", "s3fs"}, (
        "of which other packages say that they are missing"
    )
    extras = {extra for _, extra, _ in NEEDED} | set(SPARED.values())
    assert extras == PROJECT["optional-dependencies"].keys() - {"bench", "dev"}
    for hidden, extra, _ in NEEDED:
        needs = _named(PROJECT["optional-dependencies"][extra])
        assert hidden in needs or BESIDE.get(hidden) in needs, (hidden, extra)
