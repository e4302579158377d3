"""The tutorials run as they are printed, from top to bottom, and show a reader something at every step."""

from __future__ import annotations

from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
TUTORIALS = sorted((Path(__file__).parent.parent / "docs" / "tutorials").glob("*.ipynb"))
SIZE = 40_000  # bytes: short enough to be read


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_a_tutorial_can_be_read_without_running_it(path: Path) -> None:
    """Its cells have what they give beside them, as text, and no failure; nothing in it is of one machine."""
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert path.stat().st_size < SIZE and len(code) <= 8
    assert sum(bool(cell.outputs) for cell in code) >= len(code) - 2, "an atlas is shown in a browser alone"
    for cell in code:
        for output in cell.outputs:
            assert output.output_type != "error" and set(output.get("data", ())) <= {"text/plain"}
    assert "/home/" not in path.read_text() and "127.0.0.1" not in path.read_text()


@pytest.mark.slow
def test_the_tutorials_run(tmp_path: Path) -> None:
    """Every cell, in new kernels and one folder, where the run is built once; what showed something shows the like."""
    from nbclient import NotebookClient

    for path in TUTORIALS:
        written = nbformat.read(path, as_version=4)
        executed = nbformat.read(path, as_version=4)
        NotebookClient(executed, timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute()
        for before, after in zip(written.cells, executed.cells, strict=True):
            if before.cell_type == "code" and before.outputs:
                assert _alike(_first_word(after), _first_word(before)), after.source


def _alike(one: str, other: str) -> bool:
    """The same word, or about the same number: processors round products of bf16 in ways of their own."""
    try:
        return float(one) == pytest.approx(float(other), rel=0.05)
    except ValueError:
        return one == other


def _first_word(cell: object) -> str:
    """Of what a cell shows as text."""
    texts = [
        output.get("text") or output.get("data", {}).get("text/plain", "")
        for output in cell.outputs  # type: ignore[attr-defined]
        if output.get("name") != "stderr"
    ]
    return "".join(texts).split()[0]
