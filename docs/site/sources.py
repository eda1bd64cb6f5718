"""Links to source files lead to a page that shows the file."""

from __future__ import annotations

from collections.abc import Iterator
from os.path import relpath
from pathlib import Path, PurePosixPath
from typing import Any

from docutils import nodes
from sphinx.addnodes import download_reference
from sphinx.application import Sphinx

LANGUAGES = {".cpp": "c++", ".cu": "cuda", ".cuh": "cuda", ".h": "c++", ".py": "python"}
OTHERWISE = {"cbloss_fused/functional.py": "docs/api"}  # signatures and docstrings are there
linked: set[str] = set()


def to_pages(app: Sphinx, doctree: nodes.document) -> None:
    folder = PurePosixPath(app.env.docname).parent
    for node in list(doctree.findall(download_reference)):
        path = relpath(Path(app.srcdir, folder, node["reftarget"]).resolve(), app.srcdir)
        if Path(path).suffix not in LANGUAGES:
            continue
        page = OTHERWISE.get(path, f"sources/{path}")
        if page == f"sources/{path}":
            linked.add(path)
        link = nodes.reference("", "", refuri=relpath(f"{page}.html", folder), internal=True)
        link.extend(node.children)
        node.replace_self(link)


def pages(app: Sphinx) -> Iterator[tuple[str, dict[str, Any], str]]:
    for path in sorted(linked):
        text = Path(app.srcdir, path).read_text("utf-8")
        highlighter: Any = app.builder.highlighter
        body = highlighter.highlight_block(text, LANGUAGES[Path(path).suffix], linenos="inline")
        yield f"sources/{path}", {"title": path, "body": f"<h1>{path}</h1>{body}"}, "page.html"


def setup(app: Sphinx) -> None:
    app.connect("doctree-read", to_pages, priority=100)  # before downloads are gathered
    app.connect("html-collect-pages", pages)
