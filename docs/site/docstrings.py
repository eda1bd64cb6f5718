"""Docstrings, which are written for a terminal, as reStructuredText with sections for napoleon."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx

import cbloss_fused

HEADER = re.compile(r"\w+:$")
ONE_LINE = re.compile(r"(Attributes|Raises|Returns|Shape|Source|State): (?=\S)")
CODE = re.compile(r"`([^`]+)`")
MARKUP = re.compile(r"[\\*|]|_(?!\w)")  # what would be emphasis, a substitution or a reference


def to_rst(lines: list[str], link: Callable[[str], str]) -> list[str]:
    """link: from what stands between backquotes to code or a reference."""
    found: list[str] = []
    rest = [line.rstrip() for line in lines]
    while rest:
        line = rest.pop(0)
        if line.startswith(">>>"):
            found += ["", line, *_taken(rest, lambda following: following != "")]
        elif ONE_LINE.match(line) or line == "Returns:":
            block = [line, *_taken(rest, _goes_on)]
            label, _, text = " ".join(map(str.strip, block)).partition(": ")
            found += ["", f":{label}: {_inline(text, link)}", ""]
        elif line.endswith(":") and not HEADER.match(line) and _indented(rest):
            found += [_inline(line, link) + ":", *_taken(rest, lambda f: f == "" or f[0] == " ")]
        else:
            found.append(_inline(line, link))
    return found


def _indented(rest: list[str]) -> bool:
    """Whether a formula follows: after an empty line an indented one."""
    return len(rest) > 1 and rest[0] == "" and rest[1].startswith(" ")


def _goes_on(line: str) -> bool:
    """Whether a line belongs to the section above it."""
    return line != "" and not HEADER.match(line) and not ONE_LINE.match(line)


def _taken(rest: list[str], belongs: Callable[[str], bool]) -> list[str]:
    """The first lines of the rest that belong to a block, taken off it."""
    taken = []
    while rest and belongs(rest[0]):
        taken.append(rest.pop(0))
    return taken


def _inline(text: str, link: Callable[[str], str]) -> str:
    """Names between backquotes linked or code, all other characters as they are."""
    parts = CODE.split(text)
    parts[::2] = [MARKUP.sub(r"\\\g<0>", part) for part in parts[::2]]
    parts[1::2] = [link(part) for part in parts[1::2]]
    return "".join(parts)


def link_of(owner: Any, code: str) -> str:
    """owner: the class whose members `member` and `member(…)` are, or None."""
    name = code.partition("(")[0]
    if name in cbloss_fused.__all__:
        target = name
    elif owner is not None and name in vars(owner):
        target = f"{owner.__name__}.{name}"
    else:
        return f"``{code}``"
    return f":py:obj:`{code} <cbloss_fused.{target}>`"


def process(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    public = getattr(cbloss_fused, name.split(".")[1], None) if "." in name else None
    owner = public if isinstance(public, type) else None
    lines[:] = to_rst(lines, lambda code: link_of(owner, code))


def mend_dashes(app: Sphinx, doctree: nodes.document) -> None:
    """Between a parameter or an error and what it is."""
    for text in list(doctree.findall(nodes.Text)):
        if text.startswith(" -- "):
            text.parent.replace(text, nodes.Text(text.replace(" -- ", " – ", 1)))


def setup(app: Sphinx) -> None:
    app.connect("autodoc-process-docstring", process, priority=100)  # before napoleon
    app.connect("doctree-read", mend_dashes)
