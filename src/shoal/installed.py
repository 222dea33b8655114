"""What is installed, told without importing it, which takes seconds: names that libraries know, read in their source,
and their versions against those that this shoal works with.

pip keeps to the versions of pyproject.toml when it installs shoal. What another package raised or lowered later is
found out here: one release of a library can change what every model computes, and say nothing.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from packaging.requirements import Requirement

from shoal.errors import UserError

CONSENT = "SHOAL_UNTESTED_VERSIONS"
"""Environment variable that lets shoal go on with other versions."""


@cache
def source(package: str, files: str) -> str:
    """The text of the ``files`` of an installed package; empty if there are none."""
    spec = find_spec(package)
    found = (file for folder in (spec and spec.submodule_search_locations) or () for file in Path(folder).glob(files))
    return "\n".join(file.read_text(encoding="utf-8") for file in sorted(found))


def names(package: str, file: str, part: str) -> tuple[str, ...]:
    """Texts that are set or listed in the class or table of a file that begins with ``part``; empty without one."""
    found = re.search(rf"^{re.escape(part)}.*\n(?:(?:[ \t].*)?\n)*", source(package, file), re.MULTILINE)
    return tuple(dict.fromkeys(re.findall(r'(?:= |\(\s*)"([^"\n]+)"', found[0]))) if found else ()


def untested() -> Iterator[tuple[str, str, str]]:
    """Name, installed version and wanted versions of each library whose version is none of those; the version of one
    that is not installed is empty."""
    for text in importlib.metadata.requires("shoal") or ():
        wanted = Requirement(text)
        if wanted.marker is not None and not wanted.marker.evaluate():  # an extra, or for another Python
            continue
        try:
            version = importlib.metadata.version(wanted.name)
        except importlib.metadata.PackageNotFoundError:
            version = ""
        if not version or not wanted.specifier.contains(version, prereleases=True):
            yield wanted.name, version, str(wanted.specifier)


@cache
def refuse_untested() -> None:
    """Refuse to work with libraries of other versions, unless the user has allowed it.

    Raises:
        UserError: one is installed in another version, or not at all.
    """
    found = [] if os.environ.get(CONSENT) == "1" else list(untested())
    if found:
        told = ", ".join(f"{name} is {version or 'not installed'}" for name, version, _ in found)
        fix = " ".join(f"'{name}{wanted}'" for name, _, wanted in found)
        raise UserError(f"{told}, with which this shoal is not tested; run `pip install {fix}`, or set {CONSENT}=1")
