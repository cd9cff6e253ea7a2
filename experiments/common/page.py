"""One page of text, tables and figures, as Markdown and as self-contained HTML."""

import base64
import html
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.common import files


class Heading(NamedTuple):
    """A heading of the second level."""

    text: str


class Text(NamedTuple):
    """A paragraph."""

    text: str


class Table(NamedTuple):
    """A table: a caption, the names of the columns, and the cells of each row."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


class Figure(NamedTuple):
    """A picture of a run: the file, which may be missing, and a caption."""

    path: Path
    caption: str


Part = Heading | Text | Table | Figure


def table(
    caption: str,
    values: Mapping[str, Any],
    rows: Mapping[str, str],
    columns: Mapping[str, tuple[str, str]],
) -> Table:
    """The table of values["ROW_KEY"].

    Args:
      caption: what was held fixed.
      values: for example a summary.
      rows: {ROW: its name in the table}.
      columns: {name: (KEY, format of the value)}.
    """
    cells = [
        [
            words,
            *(form.format(values[f"{row}_{key}"]) for key, form in columns.values()),
        ]
        for row, words in rows.items()
    ]
    return Table(caption, ("", *columns), cells)


def to_markdown(folder: Path, title: str, parts: Sequence[Part]) -> str:
    """The page as Markdown for a file in `folder`, to which the links are relative."""
    blocks = [f"# {title}", *(_markdown(part, folder) for part in parts)]
    return "\n\n".join(blocks) + "\n"


def write_page(folder: Path, name: str, title: str, parts: Sequence[Part]) -> None:
    """Writes NAME.md, which links to the figures, and NAME.html, which contains them.

    Args:
      folder: where the files are written; figures are linked relative to it.
      name: the name of the files without the ending.
      title: heading of the page.
      parts: its content. Figures without a file are left out.
    """
    parts = [p for p in parts if not isinstance(p, Figure) or p.path.exists()]
    text = to_markdown(folder, title, parts)
    files.write_atomic(folder / f"{name}.md", lambda file: file.write(text))
    body = "\n".join(_html(part) for part in parts)
    title = html.escape(title)
    whole = (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f"<title>{title}</title>\n<style>{_STYLE}</style></head>\n"
        f"<body><h1>{title}</h1>\n{body}\n</body></html>\n"
    )
    files.write_atomic(folder / f"{name}.html", lambda file: file.write(whole))


_STYLE = (
    "body{max-width:60em;margin:2em auto;padding:0 1em;font-family:sans-serif;"
    "line-height:1.5}table{border-collapse:collapse;margin:1em 0}"
    "td,th{border:1px solid #999;padding:.3em .7em;text-align:right}"
    "td:first-child,th:first-child{text-align:left}caption{text-align:left}"
    "img{max-width:100%}figure{margin:1em 0}"
)


def _markdown(part, folder):
    match part:
        case Heading(text):
            return f"## {text}"
        case Text(text):
            return text
        case Table(caption, columns, rows):
            lines = [columns, ["---", *["--:"] * (len(columns) - 1)], *rows]
            cells = "\n".join(f"| {' | '.join(line)} |" for line in lines)
            return f"{caption}\n\n{cells}".lstrip()
        case Figure(path, caption):
            return f"![{caption}]({Path(os.path.relpath(path, folder)).as_posix()})"


def _html(part):
    match part:
        case Heading(text):
            return f"<h2>{html.escape(text)}</h2>"
        case Text(text):
            return f"<p>{_inline(text)}</p>"
        case Table(caption, columns, rows):
            head, *body = [
                "".join(f"<{tag}>{_inline(cell)}</{tag}>" for cell in row)
                for tag, row in [("th", columns), *[("td", row) for row in rows]]
            ]
            lines = "\n".join(f"<tr>{row}</tr>" for row in [head, *body])
            return f"<table><caption>{_inline(caption)}</caption>\n{lines}</table>"
        case Figure(path, caption):
            data = base64.b64encode(path.read_bytes()).decode()
            caption = html.escape(caption)
            return (
                f'<figure><img alt="{caption}" src="data:image/png;base64,{data}">'
                f"<figcaption>{caption}</figcaption></figure>"
            )


def _inline(text):
    """Text with `code` as HTML."""
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", html.escape(text))
