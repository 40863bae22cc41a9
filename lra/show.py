"""A page that shows records with their labels as the model gets them: self-contained HTML, no network, no script."""

from __future__ import annotations

import base64
import html
import io
import math

import numpy as np

from lra.streams import permutation
from lra.tasks.base import Records, Task, sequences

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
article { border-top: 1px solid #ccc; padding: 1rem 0 } h2 { font-size: 1rem; margin: 0 0 .5rem }
p.text { font: 13px ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere }
img { image-rendering: pixelated; width: 256px; height: 256px; border: 1px solid #ccc }
"""


def page(task: Task, records: Records, split: str, number: int) -> str:
    """Return HTML of so many records of a split, a fixed random choice, as the model gets them; no script."""
    chosen = permutation(len(records), "show")[:number].tolist()
    articles = []
    for i, (encoded, label) in zip(chosen, records.read(chosen), strict=True):
        text = task.as_text(records.stored(i), encoded, label)
        body = f'<p class="text">{html.escape(text)}</p>' if text else "".join(map(_sequence, sequences(encoded)))
        size = f"{' and '.join(f'{len(x):,}' for x in sequences(encoded))} positions of at most {task.l_max:,}"
        named = f"{task.classes[int(label)]} ({label})" if task.classes else f"label {np.asarray(label).tolist()}"
        articles.append(f"<article><h2>record {i}: {html.escape(named)}</h2><p>{size}</p>{body}</article>")
    title = f"{task.name}: {len(chosen)} of {len(records):,} records of {split}"
    note = f"<p><strong>{html.escape(task.note)}</strong></p>" if task.note else ""
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
        f"<h1>{title}</h1>{note}{''.join(articles)}</html>\n"
    )


def _sequence(encoded: np.ndarray) -> str:
    """Return HTML of ids ``(L,)`` or values ``(L, F)``: a picture, lowest value black, where they may be one."""
    side = math.isqrt(len(encoded))
    if encoded.ndim != 2 or encoded.shape[1] != 1 or side**2 != len(encoded):
        return f'<p class="text">{np.round(encoded, 3).tolist()}</p>'
    from PIL import Image

    low, high = float(encoded.min()), float(encoded.max())
    levels = np.rint((encoded - low) / max(high - low, 1e-9) * 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(levels.reshape(side, side)).save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img src="data:image/png;base64,{data}" alt=""><p>values {low:.3g} … {high:.3g}</p>'
