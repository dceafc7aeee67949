"""The notebooks run from their first cell to their last, in an empty directory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bertile.run import qemu
from bertile.targets import rows

ROOT = Path(__file__).parent.parent
WIDGET = "application/vnd.jupyter.widget-view+json"
NOTEBOOKS = sorted((ROOT / "pipeline" / "docs").glob("*.ipynb"))


def test_there_are_notebooks_and_they_are_kept_without_results():
    assert len(NOTEBOOKS) == 3
    for path in NOTEBOOKS:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)
        assert "".join(cells[0]["source"]).startswith("# ")


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path: Path, tmp_path: Path, stages: str, monkeypatch) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    if path.stem == "cross_compile" and (reason := qemu.missing(rows.resolve("arm-a72"))):
        pytest.skip(reason)
    monkeypatch.setenv("XDG_CACHE_HOME", str(Path(stages).parent / "notebooks"))
    monkeypatch.setenv("HOME", str(tmp_path))  # where what is measured goes
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=1200, resources=resources).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert [o for o in outputs if o.output_type == "stream" and o.name == "stdout"]
    stages_shown = [o.data["text/plain"] for o in outputs if o.output_type == "display_data"]
    assert any("export " in text for text in stages_shown)
    assert any(WIDGET in o.data for o in outputs if o.output_type == "display_data")
