"""Headings, paragraphs and grids of text as Markdown, LaTeX or HTML."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

FORMATS = ("md", "latex", "html")
NONE = "–"  # the cell of what has not been run

_LATEX = {"&": r"\&", "%": r"\%", "_": r"\_", "#": r"\#", "$": r"\$", "{": r"\{", "}": r"\}", "\\": r"\textbackslash{}"}
_LATEX |= {"±": r"$\pm$", "×": r"$\times$", "–": "--", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
_LATEX |= {"“": "``", "”": "''", "−": "$-$"}


@dataclass(frozen=True)
class Heading:
    """A title."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Paragraph:
    """A line of text."""

    text: str


@dataclass(frozen=True)
class Grid:
    """A table; the first column is its rows' names, ``words`` are the columns of text, which go to the left."""

    header: list[str]
    rows: list[list[str]]
    note: str = ""
    words: tuple[str, ...] = ()

    def is_words(self, column: int) -> bool:
        """Whether a column holds text."""
        return column == 0 or self.header[column] in self.words

    def compact(self) -> Grid:
        """Return it without the columns that hold nothing."""
        kept = [place for place in range(len(self.header)) if any(row[place] != NONE for row in self.rows)]
        rows = [[row[place] for place in kept] for row in self.rows]
        return Grid([self.header[place] for place in kept], rows, self.note, self.words)


Block = Heading | Paragraph | Grid


def render(blocks: Sequence[Block], kind: str) -> str:
    """Return the blocks as ``md``, ``latex`` or ``html`` (a part of a page)."""
    draw = {"md": _markdown, "latex": _latex, "html": _html}[kind]
    return "\n".join(draw(block) for block in blocks)


def _markdown(block: Block) -> str:
    if isinstance(block, Heading):
        return f"{'#' * block.level} {block.text}\n"
    if isinstance(block, Paragraph):
        return f"{block.text}\n"
    cells = [[text.replace("|", "\\|") for text in row] for row in (block.header, *block.rows)]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    rule = f"|{'|'.join('---' if block.is_words(column) else '---:' for column in range(len(block.header)))}|"
    return "\n".join([lines[0], rule, *lines[1:], *(["", block.note] if block.note else []), ""])


def _latex(block: Block) -> str:
    if isinstance(block, Heading):
        return f"\\{'sub' * (block.level - 2)}section*{{{_escaped(block.text)}}}\n"
    if isinstance(block, Paragraph):
        return f"{_escaped(block.text)}\n"
    rows = [" & ".join(map(_escaped, row)) + r" \\" for row in (block.header, *block.rows)]
    columns = "".join("l" if block.is_words(column) else "r" for column in range(len(block.header)))
    lines = [f"\\begin{{tabular}}{{{columns}}}", r"\toprule", rows[0], r"\midrule", *rows[1:]]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", _escaped(block.note), ""])


def _escaped(text: str) -> str:
    return "".join(_LATEX.get(letter, letter) for letter in text)


def _html(block: Block) -> str:
    if isinstance(block, Heading):
        return f"<h{block.level}>{html.escape(block.text)}</h{block.level}>"
    if isinstance(block, Paragraph):
        return f"<p>{html.escape(block.text)}</p>"
    head = "".join(f'<th scope="col">{html.escape(text)}</th>' for text in block.header)
    body = "".join(
        f'<tr><th scope="row">{html.escape(row[0])}</th>'
        + "".join(
            f"<td{' class=words' if block.is_words(column) else ''}>{html.escape(text)}</td>"
            for column, text in enumerate(row[1:], 1)
        )
        + "</tr>"
        for row in block.rows
    )
    note = f"<p>{html.escape(block.note)}</p>" if block.note else ""
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{note}'
