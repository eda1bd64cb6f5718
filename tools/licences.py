"""What the package and its extras require, with licences, as docs/dependencies.md.

`python tools/licences.py` in an environment that has them all, without what these require:
`pip install --no-deps --target DIRECTORY` of each will do.
"""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TITLE = """# Dependencies

The core needs PyTorch, and Triton on GPUs, which PyTorch brings. All else is for an extra.
Nothing is fetched when the package is imported or runs, but by `experiments.fonts`, which asks
Debian's apt-get for fonts; nothing is unpickled but CIFAR's own files, by an unpickler that calls
nothing; nothing is evaluated or given to a shell. `tests/test_supply_chain.py` checks that.
`tools/licences.py` makes this table from the packages' own metadata.

| package | licence | for |
| --- | --- | --- |
"""


def required() -> dict[str, list[str]]:
    """Packages, and the extras that need them; "core" for the package itself."""
    found: dict[str, list[str]] = {}
    for line in metadata.requires("cbloss_fused") or []:
        name = re.split(r"[<>=\[; ]", line, maxsplit=1)[0]
        extra = re.search(r'extra == "(.*?)"', line)
        found.setdefault(name, []).append(extra[1] if extra else "core")
    return dict(sorted(found.items()))


def licence(name: str) -> str | None:
    """As the package states it; None: it is not installed."""
    try:
        about = metadata.metadata(name)
    except metadata.PackageNotFoundError:
        return None
    stated = [*(about.get_all("License-Expression") or []), *(about.get_all("License") or [])]
    classified = [
        value.rpartition(" :: ")[2]
        for value in about.get_all("Classifier") or []
        if value.startswith("License ::")
    ]
    if "License-Expression" in about or not classified:
        return stated[0].strip().splitlines()[0] if stated else "not stated"
    return ", ".join(classified)


def main() -> None:
    rows = [
        f"| {name} | {licence(name) or 'not installed here'} | {', '.join(extras)} |\n"
        for name, extras in required().items()
    ]
    (ROOT / "docs" / "dependencies.md").write_text(TITLE + "".join(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
