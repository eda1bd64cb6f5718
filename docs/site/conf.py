"""The site: pages as they are on GitHub, put in order here; `make docs` builds it."""

import re
import shutil
import sys
from pathlib import Path

from sphinx.application import Sphinx

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE)]

import cbloss_fused

project = "cbloss_fused"
author = copyright = "The cbloss_fused authors"
version = release = cbloss_fused.__version__

RESULTS = "\n".join(
    f"{path.parent.name if path.stem == 'results' else path.stem} </{path.relative_to(ROOT)}>"
    for folder in ("results", "results/kanji", "machine_code")
    for path in sorted((ROOT / "bench" / folder).glob("*.md"))
    if path.stem != "README"
)
# Page titles are their first headings, unless they are too long for the navigation.
NAVIGATION = {
    "README": """
:::{toctree}
:hidden:
:caption: Use

docs/choosing
docs/options
docs/recipes
examples/README
docs/migration
docs/troubleshooting
docs/api
:::

:::{toctree}
:hidden:
:caption: How it works

docs/numerics
docs/kernels
docs/speed
bench/scaling
bench/results/README
:::

:::{toctree}
:hidden:
:caption: Project

CHANGELOG
CONTRIBUTING
docs/dependencies
:::
""",
    "bench/results/README": f"""
:::{{toctree}}
:hidden:

{RESULTS}
:::
""",
}
TITLES = {"bench/results/kanji/results": "# Twenty losses on kanji\n\n"}  # of a page without
FOLDER = re.compile(r"\]\(([^):#]+)\)")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "docstrings",
    "sources",
]
root_doc = "README"
include_patterns = ["*.md", "examples/*.md", "docs/*.md", "docs/*.rst", "bench/**.md"]
exclude_patterns = [".*", "build", "**/__pycache__"]

myst_enable_extensions = ["colon_fence", "linkify"]
myst_heading_anchors = 4

smartquotes = False  # "softmax" is Python
nitpicky = True  # a reference must lead somewhere

autodoc_typehints = "none"  # the docstrings say more, and overloads repeat every signature
autodoc_member_order = "bysource"
napoleon_attr_annotations = False
napoleon_numpy_docstring = False
napoleon_use_param = False  # several names may share a line

toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_title = project
html_copy_source = False
html_static_path = ["static"]
html_css_files = ["site.css"]


def complete(app: Sphinx, page: str, source: list[str]) -> None:
    """Links to a folder lead to its README, as on GitHub; the navigation comes after the text."""
    folder = (ROOT / page).parent

    def to_readme(link: re.Match[str]) -> str:
        return f"]({link[1]}/README.md)" if (folder / link[1] / "README.md").exists() else link[0]

    text = FOLDER.sub(to_readme, source[0])
    source[0] = TITLES.get(page, "") + text + NAVIGATION.get(page, "")


def make_index(app: Sphinx, error: Exception | None) -> None:
    """The address of the site itself shows the README."""
    if error is None:
        shutil.copyfile(app.outdir / "README.html", app.outdir / "index.html")


def setup(app: Sphinx) -> None:
    app.connect("source-read", complete)
    app.connect("build-finished", make_index)
