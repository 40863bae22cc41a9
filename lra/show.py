"""A page that shows records with their labels as the model gets them: self-contained HTML, no network, no script."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable
from typing import Any

import numpy as np

from lra.streams import permutation
from lra.tasks.base import Records, Task
from lra.tasks.image import CLASSES
from lra.tasks.listops import evaluate, text

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
article { border-top: 1px solid #ccc; padding: 1rem 0; overflow-x: auto }
h2 { font-size: 1rem; margin: 0 0 .5rem } code, p.text { font-family: ui-monospace, monospace; font-size: 13px }
p.text { white-space: pre-wrap; overflow-wrap: anywhere } .cut { color: #b00; background: #fee }
img { image-rendering: pixelated; width: 256px; height: 256px; border: 1px solid #ccc }
svg text { font: 12px ui-monospace, monospace; text-anchor: middle } svg line { stroke: #999 }
.two { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem }
"""


def page(task: Task, records: Records, split: str, number: int) -> str:
    """HTML of `number` records, a fixed random choice, with their labels.

    Args:
        task: prepared.
        records: of `split`.
        split: for the heading.
        number: how many to show.
    """
    chosen = permutation(len(records), "show")[:number].tolist()
    draw = _DRAW.get(task.name, _sequence)
    articles = []
    for i in chosen:
        encoded, label = records[i]
        body, name = draw(task, records.stored(i), encoded, label)
        articles.append(
            f"<article><h2>record {i}: {html.escape(name)}</h2><p>{_size(task, encoded)}</p>{body}</article>"
        )
    title = f"{task.name}: {len(chosen)} of {len(records):,} records of {split}"
    note = f"<p><strong>{html.escape(task.note)}</strong></p>" if task.note else ""
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
        f"<h1>{title}</h1>{note}{''.join(articles)}</html>\n"
    )


def _size(task: Task, encoded: Any) -> str:
    if isinstance(encoded, tuple):
        return f"{len(encoded[0]):,} and {len(encoded[1]):,} tokens of at most {task.l_max:,}"
    return f"{len(encoded):,} positions of at most {task.l_max:,}"


def _sequence(task: Task, record: dict[str, Any], encoded: Any, label: int) -> tuple[str, str]:
    return _picture(encoded) if encoded.ndim == 2 else f"<code>{encoded.tolist()}</code>", f"label {label}"


def _tree(task: Task, record: dict[str, Any], encoded: np.ndarray, label: int) -> tuple[str, str]:
    """The expression as a tree, every operator with its value."""
    expression = text(encoded)
    body = f"<p><code>{html.escape(expression)}</code></p>{tree_svg(expression)}"
    return body, f"value {evaluate(expression)}, label {label}"


def tree_svg(expression: str, step: float = 24.0, level: float = 46.0) -> str:
    """An SVG drawing of a ListOps expression: digits from left to right, operators above the middle of their arguments.

    Args:
        expression: in words, `[MAX 2 9 ]`.
        step: pixels between digits.
        level: pixels between levels.
    """
    words = expression.split()
    shapes: list[str] = []
    opened: list[tuple[int, list[float]]] = []
    across, deepest = 0.0, 0
    root: list[float] = []
    for position, word in enumerate(words):
        if word != "]" and word.startswith("["):
            opened.append((position, []))
            deepest = max(deepest, len(opened))
            continue
        label = word
        if word == "]":
            start, below = opened.pop()
            x, y = (below[0] + below[-1]) / 2, len(opened) * level + 20
            shapes += [f'<line x1="{x:g}" y1="{y + 6:g}" x2="{b:g}" y2="{y + level - 22:g}"/>' for b in below]
            label = f"{words[start][1:]}={evaluate(' '.join(words[start : position + 1]))}"
        else:
            across += step
            x, y = across, len(opened) * level + 20
        width = 7.2 * len(label)
        shapes.append(f'<rect x="{x - width / 2:g}" y="{y - 12:g}" width="{width:g}" height="16" fill="white"/>')
        shapes.append(f'<text x="{x:g}" y="{y:g}">{label}</text>')
        (opened[-1][1] if opened else root).append(x)
    wide, high = across + 2 * step, (deepest + 1) * level
    lines = [shape for shape in shapes if shape.startswith("<line")]
    rest = [shape for shape in shapes if not shape.startswith("<line")]
    return f'<svg width="{max(wide, 80):g}" height="{high:g}">{"".join(lines + rest)}</svg>'


def _text(task: Any, record: dict[str, Any], encoded: np.ndarray, label: int) -> tuple[str, str]:
    return _document(task, record["text"]), ("negative", "positive")[label]


def _document(task: Any, raw: np.ndarray) -> str:
    """A text with what the encoding cuts off in another colour."""
    characters = task.encoding.convention == "s4"
    whole: Any = raw.tobytes().decode("utf-8", "replace") if characters else raw.tobytes()
    cut = task.encoding.cut(len(raw), len(whole))
    seen, unseen = whole[: len(whole) - cut], whole[len(whole) - cut :]
    if not characters:
        seen, unseen = seen.decode("utf-8", "replace"), unseen.decode("utf-8", "replace")
    unit = "characters" if characters else "bytes"
    rest = f'<span class="cut" title="not seen">{html.escape(unseen)}</span>' if cut else ""
    told = f"<p>{cut:,} of {len(whole):,} {unit} are cut off</p>" if cut else ""
    return f'{told}<p class="text">{html.escape(seen)}{rest}</p>'


def _pair(task: Any, record: dict[str, Any], encoded: Any, label: int) -> tuple[str, str]:
    body = "".join(f"<div>{_document(task, record[name])}</div>" for name in ("first", "second"))
    return f'<div class="two">{body}</div>', ("no citation", "the first cites the second")[label]


def _image(task: Task, record: dict[str, Any], encoded: np.ndarray, label: int) -> tuple[str, str]:
    return _picture(encoded), f"{CLASSES[label]} ({label})"


def _paths(task: Task, record: dict[str, Any], encoded: np.ndarray, label: int) -> tuple[str, str]:
    from lra.show_pathfinder import drawing

    picture = _picture(encoded.reshape(len(encoded), -1))
    return drawing(task, record, picture), ("the tips are on two paths (0)", "the tips are on one path (1)")[label]


def _picture(encoded: np.ndarray) -> str:
    """What the model sees, its lowest value black and its highest white."""
    from PIL import Image

    values = encoded.reshape(len(encoded), -1).astype(np.float64)
    side = int(np.sqrt(len(values)))
    low, high = values.min(), values.max()
    levels = np.rint((values - low) / max(high - low, 1e-9) * 255).astype(np.uint8)
    shape = (side, side, 3) if values.shape[1] == 3 else (side, side)
    buffer = io.BytesIO()
    Image.fromarray(levels.reshape(shape)).save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img src="data:image/png;base64,{data}" alt=""><p>values {low:.3g} … {high:.3g}</p>'


_DRAW: dict[str, Callable[..., tuple[str, str]]] = {
    "listops": _tree,
    "text": _text,
    "retrieval": _pair,
    "image": _image,
    "pathfinder": _paths,
    "pathx": _paths,
}
