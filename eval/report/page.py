"""A document as one HTML page that opens from disk: no request, dark and light, made for phones and keyboards too.

The page's policy lets no script in and exactly one style sheet, by its hash: whatever a model or data set wrote could
not run or load anything even if it were not escaped.
"""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from importlib.resources import files

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from shoal.figures.style import clean

from .document import Document


def to_html(document: Document) -> str:
    """The page. Everything is escaped by the template engine except the figures' SVG, which shoal draws itself."""
    style = Markup((files("shoal.eval.report") / "templates" / "report.css").read_text(encoding="utf-8"))
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    # figures carry style attributes and, for heat maps, pictures inside themselves
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; style-src-elem 'sha256-{digest}'; img-src data:; "
        "base-uri 'none'; form-action 'none'; require-trusted-types-for 'script'"
    )
    return _template().render(document=document, style=style, policy=policy)


@cache
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("shoal.eval.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: clean(value) if isinstance(value, str) and not isinstance(value, Markup) else value,
    )
    environment.filters["code"] = _with_code
    environment.filters["breakable"] = _breakable
    environment.filters["figure"] = _with_interval
    environment.filters["verdict"] = _verdict
    environment.globals["percent"] = lambda share: f"{100 * share:.1f}%"
    environment.filters["kind"] = lambda block: type(block).__name__
    return environment.get_template("report.html")


def _with_code(text: str) -> Markup:
    """The text escaped, `like this` set as code; only used for the report's own sentences."""
    escaped = str(Markup.escape(clean(text)))
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", escaped))


def _with_interval(text: str) -> Markup:
    """A cell's figure escaped, with its interval, and what stands behind a comma or in brackets, on lines below."""
    escaped = str(Markup.escape(clean(text)))
    return Markup(
        re.sub(
            r"(?: (\[[^\]]*\]))?(?:, (.*)| (\(.*\)))?$",
            lambda match: "".join(f' <span class="ci">{part}</span>' for part in _parts(*match.groups(""))),
            escaped,
            count=1,
        )
    )


def _parts(interval: str, others: str, remark: str) -> list[str]:
    return [part for part in (interval, *others.split(", "), remark) if part]


def _verdict(text: str) -> str:
    """The class of a cell that begins with the sign of a verdict."""
    return {"▲": " good", "▼": " bad"}.get(text[:1], "")


def _breakable(text: str) -> Markup:
    """The text escaped, with leave to break after an underscore: task names are long and phones narrow."""
    return Markup(str(Markup.escape(clean(text))).replace("_", "_<wbr>"))
