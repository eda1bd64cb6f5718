"""The command line's parser of arguments."""

from __future__ import annotations

import argparse
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage, and exits with status 2."""

    def check_at_least_one(self, options: argparse.Namespace, *names: str) -> None:
        """End with an error if an option that is given is below 1."""
        for name in names:
            value = getattr(options, name)
            if value is not None and value < 1:
                self.error(f"--{name} {value}: expected at least 1")

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.splitlines())}\n")
