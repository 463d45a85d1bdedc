"""Markdown as the pages of studies use it: escaped text, tables, and the same page as self-contained HTML.

Knows nothing of studies. Raw HTML in the Markdown is shown as text.
"""

import importlib.resources
import re
from collections.abc import Sequence

import jinja2
from markdown_it import MarkdownIt
from markupsafe import Markup, escape

from siglit.reporting.gallery import data_uri

_SPECIAL = re.compile(r"[\\`*\[\]|~$]|(?<![^\W_])_|_(?![^\W_])")
"""Characters with a meaning in Markdown; an underscore within a word has none."""
_BLOCK_START = re.compile(r"^(\d*)([#+.)-])(?=[\s#]|$)")
"""What would begin a heading or a list at the start of a paragraph."""
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}


def text(value: object) -> str:
    """Data as literal text in one line of Markdown, also within a cell of a table."""
    line = " ".join(str(value).split())
    line = re.sub("[&<>]", lambda match: _ENTITIES[match[0]], line)
    return _BLOCK_START.sub(r"\1\\\2", _SPECIAL.sub(r"\\\g<0>", line))


def prose(value: str) -> str:
    """Markdown that a person wrote, without raw HTML; code keeps its angle brackets."""
    return re.sub(r"(```.*?```|`[^`]*`)|<", lambda match: match[1] or "&lt;", value.strip(), flags=re.DOTALL)


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A table of Markdown cells; the first `left` columns are aligned left, the others right."""
    rule = [":---" if column < left else "---:" for column in range(len(header))]
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *rows))


def bullets(items: Sequence[str], most: int = 30) -> str:
    """A list of plain texts; of many, the first `most` and the number of others."""
    lines = [f"- {text(item)}" for item in items[:most]]
    return "\n".join(lines + ([f"- … and {len(items) - most:,} more"] if len(items) > most else []))


def code(lines: Sequence[str]) -> str:
    """Commands, as a block of code."""
    return "\n".join(["```", *(" ".join(line.replace("```", "").split()) for line in lines), "```"])


def page(title: str, body: str, image: str, drawings: Sequence[tuple[str, bytes, bytes]]) -> str:
    """Markdown as one HTML page in the style of the run report.

    Args:
        title: plain text.
        body: the page in Markdown.
        image: address of an image in `body`, alone in its paragraph; the drawings take its place.
        drawings: (plain title, PNG for a light page, PNG for a dark page).
    """
    html = MarkdownIt("commonmark", {"html": False}).enable("table").render(body)
    html = html.replace("<table>", '<div class="scroll"><table class="metrics">').replace("</table>", "</table></div>")
    figures = "".join(_figure(*drawing) for drawing in drawings)
    html = re.sub(
        rf'<p><img src="{re.escape(str(escape(image)))}"[^>]*></p>',
        lambda _: f'<div class="grid plots">{figures}</div>',
        html,
    )
    files = importlib.resources.files("siglit")
    template = (files / "studies" / "page.html.j2").read_text(encoding="utf-8")
    style = (files / "reporting" / "page.css").read_text(encoding="utf-8")
    engine = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return engine.from_string(template).render(title=title, body=Markup(html), style=Markup(style))


def _figure(name: str, light: bytes, dark: bytes) -> str:
    source = f'<source media="(prefers-color-scheme: dark)" srcset="{data_uri(dark, "image/png")}">'
    picture = f'<picture>{source}<img class="wide" src="{data_uri(light, "image/png")}" alt="{escape(name)}"></picture>'
    return f'<figure class="card">{picture}</figure>'
