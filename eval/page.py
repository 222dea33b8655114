"""A document as one HTML page that opens from disk: no script, no request, dark and light, made for phones too."""

from __future__ import annotations

import re
from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from shoal.figures import clean

from .document import Document


def to_html(document: Document) -> str:
    """The page. Everything is escaped by the template engine except the figures' SVG, which shoal draws itself."""
    return _template().render(document=document)


@cache
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("shoal.eval"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: clean(value) if isinstance(value, str) and not isinstance(value, Markup) else value,
    )
    environment.filters["code"] = _with_code
    environment.filters["breakable"] = _breakable
    environment.filters["figure"] = _with_interval
    environment.filters["kind"] = lambda block: type(block).__name__
    return environment.get_template("report.html")


def _with_code(text: str) -> Markup:
    """The text escaped, `like this` set as code; only used for the report's own sentences."""
    escaped = str(Markup.escape(clean(text)))
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", escaped))


def _with_interval(text: str) -> Markup:
    """A cell's figure escaped, with its interval on a line of its own below."""
    escaped = str(Markup.escape(clean(text)))
    return Markup(
        re.sub(
            r" (\[[^\]]*\])(?:, (.*))?$",
            lambda found: "".join(f' <span class="ci">{part}</span>' for part in found.groups() if part),
            escaped,
        )
    )


def _breakable(text: str) -> Markup:
    """The text escaped, with leave to break after an underscore: task names are long and phones narrow."""
    return Markup(str(Markup.escape(clean(text))).replace("_", "_<wbr>"))
