"""HTML building blocks.

What comes from data, such as volume ids and class names, passes through `html.escape`: in `text`,
and in all that takes plain text here. Figures hold numbers and names of stages only.
"""

import html
import itertools
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

STYLE = Path(__file__).with_name("page.css")

# The policy: should an escape be forgotten, nothing is run or fetched all the same.
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""


def document(title: str, body: Iterable[str]) -> str:
    """Makes a page; `title` is plain text. The ids in its figures get a number before them."""
    numbers = itertools.count()

    def numbered(svg: re.Match) -> str:
        number = next(numbers)
        return re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>f{number}-", svg[0])

    joined = re.sub(r"<svg .*?</svg>", numbered, "\n".join(body), flags=re.DOTALL)
    return PAGE.format(title=text(title), style=STYLE.read_text(), body=joined)


def text(value: object) -> str:
    """Escapes plain text for HTML."""
    return html.escape(str(value))


def section(level: int, title: str, *content: str) -> str:
    """Makes a section of HTML under a heading of a level."""
    return "\n".join(["<section>", f"<h{level}>{title}</h{level}>", *content, "</section>"])


def note(plain: str) -> str:
    """Makes a remark of plain text."""
    return f'<p class="note">{text(plain)}</p>'


def details(summary: str, content: str) -> str:
    """Makes HTML that opens when its plain summary is clicked."""
    return f"<details><summary>{text(summary)}</summary>{content}</details>"


def figure(svg: str, caption: str) -> str:
    """Puts a caption, HTML, under a figure."""
    return f"<figure>{svg}<figcaption>{caption}</figcaption></figure>"


def table(
    head: Sequence[str], rows: Iterable[Sequence[str]], marked: Sequence[int] = (), kind: str = ""
) -> str:
    """Makes a table of plain text; the first cell of a row is its head, `marked` rows stand out.

    `kind` "runs" has room for runs' names, "text" likewise, for cells of words.
    """
    lines = [f'<div class="scroll"><table class="{kind}"><thead><tr>']
    lines += [f'<th scope="col">{text(cell)}</th>' for cell in head]
    lines.append("</tr></thead><tbody>")
    for number, (first, *cells) in enumerate(rows):
        lines.append('<tr class="marked">' if number in marked else "<tr>")
        lines.append(f'<th scope="row">{text(first)}</th>')
        lines += [f"<td>{text(cell)}</td>" for cell in cells]
        lines.append("</tr>")
    return "".join([*lines, "</tbody></table></div>"])


def key(name: str, color: str, shape: str, link: str = "") -> str:
    """Makes a legend's entry: text after a patch of a CSS colour, "line", "dot" or "area"."""
    patch = f'<i class="{shape}" style="--key: {color}"></i>{text(name)}'
    return f'<a href="{link}">{patch}</a>' if link else f"<span>{patch}</span>"


def legend(keys: Iterable[str], *more: str) -> str:
    """Makes a legend of entries; see `key`."""
    return f'<p class="legend">{"".join(keys)}{"".join(more)}</p>'
