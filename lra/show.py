"""A page that shows records with their labels as the model gets them: self-contained HTML, no network, no script."""

from __future__ import annotations

import base64
import html
import io
import math

import numpy as np

from lra.streams import permutation
from lra.tasks.base import Records, Task, sequences

_STYLE = "pre { white-space: pre-wrap; overflow-wrap: anywhere } img { image-rendering: pixelated; width: 256px }"


def page(task: Task, records: Records, split: str, number: int) -> str:
    """Return HTML of so many records of a split, a fixed random choice, as the model gets them; no script."""
    chosen = permutation(len(records), "show")[:number].tolist()
    title = f"{task.name}: {len(chosen)} of {len(records):,} records of {split}"
    parts = [f"<!doctype html><meta charset=utf-8><title>{title}</title><style>{_STYLE}</style><h1>{title}</h1>"]
    parts += [f"<p><strong>{html.escape(task.note)}</strong></p>"] if task.note else []
    for i, (encoded, label) in zip(chosen, records.read(chosen), strict=True):
        text = task.as_text(records.stored(i), encoded, label)
        named = f"{task.classes[int(label)]} ({label})" if task.classes else f"label {np.asarray(label).tolist()}"
        size = " and ".join(f"{len(sequence):,}" for sequence in sequences(encoded))
        parts.append(f"<h2>record {i}: {html.escape(named)}</h2><p>{size} positions of at most {task.l_max:,}</p>")
        parts += [f"<pre>{html.escape(text)}</pre>"] if text else map(_sequence, sequences(encoded))
    return "\n".join(parts) + "\n"


def _sequence(encoded: np.ndarray) -> str:
    """Return HTML of ids ``(L,)`` or values ``(L, F)``: a picture, lowest value black, where they may be one."""
    side = math.isqrt(len(encoded))
    if encoded.ndim != 2 or encoded.shape[1] != 1 or side**2 != len(encoded):
        return f"<pre>{np.round(encoded, 3).tolist()}</pre>"
    from PIL import Image

    low, high = float(encoded.min()), float(encoded.max())
    levels = np.rint((encoded - low) / max(high - low, 1e-9) * 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(levels.reshape(side, side)).save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img src="data:image/png;base64,{data}" alt=""><p>values {low:.3g} … {high:.3g}</p>'
