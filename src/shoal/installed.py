"""What libraries know by name, read in their source: to import them takes seconds."""

from __future__ import annotations

import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path


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
