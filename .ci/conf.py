"""Makes a site of the pages that lie beside the code: `make docs`."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parent.parent
# In the order of the table of contents.
PAGES = {
    "Use": (
        "pipeline/cli/QUICKSTART",
        "pipeline/text/README",
        "pipeline/server/README",
        "pipeline/cli/README",
        "pipeline/export/README",
        "pipeline/families/README",
        "pipeline/quantize/README",
        "pipeline/lower/README",
        "pipeline/compress/README",
        "pipeline/tune/README",
        "pipeline/tune/measure/README",
        "pipeline/bundle/README",
        "pipeline/bundle/C",
        "pipeline/integrations/README",
        "pipeline/targets/README",
        "pipeline/integrations/FRAMEWORKS",
        "pipeline/verify/README",
        "pipeline/report/README",
        "pipeline/cli/TROUBLESHOOTING",
        "pipeline/docs/api",
    ),
    "Notebooks": (
        "pipeline/docs/embed_and_search",
        "pipeline/docs/classify_and_quantize",
        "pipeline/docs/cross_compile",
    ),
    "How it works": (
        "pipeline/README",
        "pipeline/graph/README",
        "schedules/README",
        "pipeline/backends/cuda/README",
        "pipeline/bench/README",
        "pipeline/bench/RESULTS",
        "pipeline/studies/README",
        ".github/CONTRIBUTING",
        "CHANGELOG",
    ),
}

project = "Bertile"
extensions = ["myst_nb", "sphinx.ext.autodoc"]
root_doc = "README"
include_patterns = ["README.md", *(f"{page}.*" for pages in PAGES.values() for page in pages)]
html_theme = "furo"
html_title = project
myst_heading_anchors = 4
nb_execution_mode = "off"  # the tests run them
autodoc_member_order = "bysource"
autodoc_typehints = "description"


def setup(app):
    """Put the table of contents behind the front page, where the page itself has none."""
    app.connect("source-read", _with_contents)
    app.connect("build-finished", _with_index)


def _with_contents(_app, name, source):
    if name == root_doc:
        for caption, pages in PAGES.items():
            lines = "\n".join(pages)
            source[0] += f"\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{lines}\n```\n"


def _with_index(app, error):
    if error is None and app.builder.name == "html":
        page = '<meta http-equiv="refresh" content="0; url=README.html">\n'
        Path(app.outdir, "index.html").write_text(page, encoding="utf-8")
