"""What can be measured on a Pathfinder image alone, without knowing how it was made, and how two sets are compared.

Two sets of a statistic are compared by the two-sample Kolmogorov–Smirnov test with its asymptotic p-value, which is
conservative for statistics that take few values; a family of tests is held to one level by Holm's step-down rule.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numba import njit

INK = 20  # gray levels above this are ink: Lanczos ripples stay below
APART = 1e6  # path length where the markers are not joined


@njit(cache=True)
def components(on):  # type: ignore[no-untyped-def]
    """Label the 8-connected components of a boolean image: `(rows, columns)` int64, 0 off, and how many."""
    rows, columns = on.shape
    labels = np.zeros((rows, columns), np.int64)
    stack = np.empty((rows * columns, 2), np.int64)
    n = 0
    for y in range(rows):
        for x in range(columns):
            if not on[y, x] or labels[y, x]:
                continue
            n += 1
            labels[y, x] = n
            stack[0, 0], stack[0, 1] = y, x
            top = 1
            while top:
                top -= 1
                a, b = stack[top, 0], stack[top, 1]
                for i in range(max(0, a - 1), min(rows, a + 2)):
                    for j in range(max(0, b - 1), min(columns, b + 2)):
                        if on[i, j] and not labels[i, j]:
                            labels[i, j] = n
                            stack[top, 0], stack[top, 1] = i, j
                            top += 1
    return labels, n


@njit(cache=True)
def _steps(on, start, end):  # type: ignore[no-untyped-def]
    """Length of the shortest 8-connected walk over `on` from pixel to pixel, or -1."""
    rows, columns = on.shape
    distance = np.full((rows, columns), -1, np.int64)
    queue = np.empty((rows * columns, 2), np.int64)
    distance[start[0], start[1]] = 0
    queue[0, 0], queue[0, 1] = start[0], start[1]
    head, tail = 0, 1
    while head < tail:
        a, b = queue[head, 0], queue[head, 1]
        head += 1
        if a == end[0] and b == end[1]:
            return distance[a, b]
        for i in range(max(0, a - 1), min(rows, a + 2)):
            for j in range(max(0, b - 1), min(columns, b + 2)):
                if on[i, j] and distance[i, j] < 0:
                    distance[i, j] = distance[a, b] + 1
                    queue[tail, 0], queue[tail, 1] = i, j
                    tail += 1
    return -1


def _windows(image: np.ndarray, side: int) -> np.ndarray:
    return np.lib.stride_tricks.sliding_window_view(image, (side, side))


def blobs(image: np.ndarray) -> list[np.ndarray]:
    """Pixels of each blob as bright and as broad as a marker, `(·, 2)`, the largest first."""
    side = 2 if len(image) <= 32 else 4
    core = _windows(image, side).min(axis=(2, 3)) >= 160
    broad = np.zeros(image.shape, bool)
    for y, x in np.argwhere(core):
        broad[y : y + side, x : x + side] = True
    labels, n = components(broad)
    return sorted((np.argwhere(labels == k + 1) for k in range(n)), key=len, reverse=True)


def path_length(image: np.ndarray, found: list[np.ndarray]) -> float:
    """Shortest walk between the two largest blobs over ink widened by the gaps between dashes, or APART."""
    if len(found) < 2:
        return APART
    reach = 1 if len(image) <= 32 else 3
    wide = _windows(np.pad(image, reach), 2 * reach + 1).max(axis=(2, 3)) > INK
    steps = _steps(wide, *(np.rint(pixels.mean(axis=0)).astype(np.int64) for pixels in found[:2]))
    return float(steps) if steps >= 0 else APART


def marker_distance(found: list[np.ndarray]) -> float:
    """Distance between the two largest blobs, or 0."""
    return float(np.linalg.norm(found[0].mean(axis=0) - found[1].mean(axis=0))) if len(found) > 1 else 0.0


def measure(images: np.ndarray) -> dict[str, np.ndarray]:
    """Every statistic of each image, `(N,)`."""
    found = [blobs(image) for image in images]
    return {
        "ink share": (images > INK).mean(axis=(1, 2)),
        "mean": images.mean(axis=(1, 2)),
        "sd": images.std(axis=(1, 2)),
        "markers": np.array([len(b) for b in found]),
        "marker size": np.array([sum(map(len, b[:2])) for b in found]),
        "marker distance": np.array([marker_distance(b) for b in found]),
        "components": np.array([components(image > INK)[1] for image in images]),
        "path length": np.array([path_length(image, b) for image, b in zip(images, found, strict=True)]),
    }


def kolmogorov_smirnov(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Return the largest distance between two empirical distributions and its asymptotic p-value."""
    at = np.sort(np.concatenate([a, b]))
    rise = [np.searchsorted(np.sort(x), at, side="right") / len(x) for x in (a, b)]
    distance = float(np.abs(rise[0] - rise[1]).max())
    scaled = distance * math.sqrt(len(a) * len(b) / (len(a) + len(b)))
    if scaled < 0.2:
        return distance, 1.0
    p = 2 * sum((-1) ** (k - 1) * math.exp(-2 * (k * scaled) ** 2) for k in range(1, 101))
    return distance, min(1.0, max(0.0, p))


def two_proportions(a: np.ndarray, b: np.ndarray) -> float:
    """Return the p-value of the normal test that two 0/1 samples share their mean."""
    pooled = np.concatenate([a, b]).mean()
    z = abs(a.mean() - b.mean()) / math.sqrt(pooled * (1 - pooled) * (1 / len(a) + 1 / len(b)))
    return math.erfc(z / math.sqrt(2))


def rejected(p_values: Mapping[str, float], level: float) -> list[str]:
    """Return the names whose equality Holm's rule rejects, keeping the chance of any false one under `level`."""
    names: list[str] = []
    for k, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        if p > level / (len(p_values) - k):
            break
        names.append(name)
    return names


Measured = tuple[dict[str, np.ndarray], np.ndarray]
"""The statistics of a set of images, and the labels."""


def measured(images: np.ndarray, labels: np.ndarray) -> Measured:
    """Return what ``compare`` takes."""
    return measure(images), labels


def compare(ours: Measured, theirs: Measured) -> dict[str, float]:
    """Return the p-value of each test that two sets have one distribution.

    Each statistic is compared over all images, path length also within each label, and the labels' balance.
    """
    p_values = {name: kolmogorov_smirnov(values, theirs[0][name])[1] for name, values in ours[0].items()}
    for label in (0, 1):
        lengths = [statistics["path length"][labels == label] for statistics, labels in (ours, theirs)]
        p_values[f"path length, label {label}"] = kolmogorov_smirnov(*lengths)[1]
    p_values["label"] = two_proportions(ours[1], theirs[1])
    return p_values
