"""A page that shows records with their labels as the model gets them: self-contained HTML, no network, no script."""

from __future__ import annotations

import base64
import html
import io
import math
from typing import TYPE_CHECKING

import numpy as np

from lra.streams import permutation

if TYPE_CHECKING:
    from lra.tasks.base import Records, Task

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
article { border-top: 1px solid #ccc; padding: 1rem 0; overflow-x: auto }
h2 { font-size: 1rem; margin: 0 0 .5rem } code, p.text { font-family: ui-monospace, monospace; font-size: 13px }
p.text { white-space: pre-wrap; overflow-wrap: anywhere } .cut { color: #b00; background: #fee }
img { image-rendering: pixelated; width: 256px; height: 256px; border: 1px solid #ccc }
.two { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem }
"""


def page(task: Task, records: Records, split: str, number: int) -> str:
    """Return HTML of ``number`` records of ``split``, a fixed random choice; each task draws its own."""
    chosen = permutation(len(records), "show")[:number].tolist()
    articles = []
    for i, (encoded, label) in zip(chosen, records.read(chosen), strict=True):
        body, caption = task.draw(records.stored(i), encoded, label)
        sizes = [f"{len(x):,}" for x in (encoded if task.pair else (encoded,))]
        size = f"{' and '.join(sizes)} {'tokens' if task.pair else 'positions'} of at most {task.l_max:,}"
        articles.append(f"<article><h2>record {i}: {html.escape(caption)}</h2><p>{size}</p>{body}</article>")
    title = f"{task.name}: {len(chosen)} of {len(records):,} records of {split}"
    note = f"<p><strong>{html.escape(task.note)}</strong></p>" if task.note else ""
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
        f"<h1>{title}</h1>{note}{''.join(articles)}</html>\n"
    )


def sequence(encoded: np.ndarray) -> str:
    """Return HTML of what the model sees, ids ``(L,)`` or values ``(L, F)``: a picture if it may be one, or numbers."""
    if encoded.ndim == 2 and math.isqrt(len(encoded)) ** 2 == len(encoded) and encoded.shape[1] in (1, 3):
        return picture(encoded)
    return f"<code>{np.round(encoded, 3).tolist()}</code>"


def picture(encoded: np.ndarray) -> str:
    """Return HTML of a square picture, pixels ``(L,)`` or ``(L, 1 or 3)``; lowest value black, highest white."""
    from PIL import Image

    values = encoded.reshape(len(encoded), -1).astype(np.float64)
    side = math.isqrt(len(values))
    low, high = values.min(), values.max()
    levels = np.rint((values - low) / max(high - low, 1e-9) * 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(levels.reshape((side, side, 3) if values.shape[1] == 3 else (side, side))).save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img src="data:image/png;base64,{data}" alt=""><p>values {low:.3g} … {high:.3g}</p>'
