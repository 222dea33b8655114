"""README as a package index shows it: links lead to this version in the repository, `Source` of [project.urls]."""

import re
import tomllib
from pathlib import Path

from setuptools import setup

project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
text = Path("README.md").read_text(encoding="utf-8")
if source := project.get("urls", {}).get("Source"):
    for before, kind in ((r"!\[[^\]]*\]\(", "raw"), (r"<img[^>]* src=\"", "raw"), (r"\]\(", "blob")):
        text = re.sub(rf"({before})(?![a-z]+:|#)", rf"\g<1>{source}/{kind}/v{project['version']}/", text)
setup(long_description=text, long_description_content_type="text/markdown")
