"""What can be measured on a Pathfinder image alone, without knowing how it was made, and how two sets are compared.

Two sets of a statistic are compared by the two-sample Kolmogorov–Smirnov test with its asymptotic p-value, which is
conservative for statistics that take few values; a family of tests is held to one level by Holm's step-down rule.
"""

import itertools
import math

import numpy as np

INK = 20  # gray levels above this are ink: Lanczos ripples stay below
APART = 1e6  # path length where the markers are not joined


def widened(images: np.ndarray, reach: int = 1) -> np.ndarray:
    """The largest value of each pixel's neighbourhood, `(N, rows, columns)`."""
    padded, (rows, columns) = np.pad(images, ((0, 0), (reach, reach), (reach, reach))), images.shape[1:]
    out = images.copy()
    for i in range(2 * reach + 1):
        for j in range(2 * reach + 1):
            np.maximum(out, padded[:, i : i + rows, j : j + columns], out=out)
    return out


def components(on: np.ndarray) -> np.ndarray:
    """Give the pixels of each 8-connected component of boolean images one number of their own; off is 0."""
    labels = np.where(on, np.arange(1, on[0].size + 1, dtype=np.int16).reshape(on.shape[1:]), 0)
    while not np.array_equal(grown := np.where(on, widened(labels), 0), labels):
        labels = grown
    return labels


def blobs(images: np.ndarray) -> list[list[np.ndarray]]:
    """Pixels of each blob as bright and as broad as a marker, `(·, 2)`, the largest first, of each image."""
    side = 2 if images.shape[1] <= 32 else 4
    core = np.lib.stride_tricks.sliding_window_view(images, (side, side), axis=(1, 2)).min(axis=(3, 4)) >= 160
    broad = np.zeros(images.shape, bool)
    for k, y, x in np.argwhere(core):
        broad[k, y : y + side, x : x + side] = True
    return [
        sorted((np.argwhere(labels == n) for n in np.unique(labels[labels > 0])), key=len, reverse=True)
        for labels in components(broad)
    ]


def path_lengths(images: np.ndarray, found: list[list[np.ndarray]]) -> np.ndarray:
    """Shortest walk between the two largest blobs over ink widened by the gaps between dashes, or APART."""
    on, reached = widened(images, 1 if images.shape[1] <= 32 else 3) > INK, np.zeros(images.shape, bool)
    lengths, ends = np.full(len(images), APART), np.zeros(images.shape, bool)
    for k, pixels in enumerate(found):
        if len(pixels) > 1:
            for marked, blob in zip((reached, ends), pixels, strict=False):
                marked[(k, *np.rint(blob.mean(axis=0)).astype(int))] = True
    for steps in itertools.count():
        lengths[(reached & ends).any(axis=(1, 2)) & (lengths == APART)] = steps
        if np.array_equal(grown := reached | (widened(reached) & on), reached):
            return lengths
        reached = grown


def marker_distance(found: list[np.ndarray]) -> float:
    """Distance between the two largest blobs, or 0."""
    return float(np.linalg.norm(found[0].mean(axis=0) - found[1].mean(axis=0))) if len(found) > 1 else 0.0


Measured = tuple[dict[str, np.ndarray], np.ndarray]


def measured(images: np.ndarray, labels: np.ndarray) -> Measured:
    """Every statistic of each image, `(N,)`, and the labels."""
    found = blobs(images)
    return {
        "ink share": (images > INK).mean(axis=(1, 2)),
        "mean": images.mean(axis=(1, 2)),
        "sd": images.std(axis=(1, 2)),
        "markers": np.array([len(b) for b in found]),
        "marker size": np.array([sum(map(len, b[:2])) for b in found]),
        "marker distance": np.array([marker_distance(b) for b in found]),
        "components": np.array([len(np.unique(labels[labels > 0])) for labels in components(images > INK)]),
        "path length": path_lengths(images, found),
    }, labels


def kolmogorov_smirnov(a: np.ndarray, b: np.ndarray) -> float:
    """Asymptotic p-value of the largest distance between two empirical distributions."""
    at = np.sort(np.concatenate([a, b]))
    rise = [np.searchsorted(np.sort(x), at, side="right") / len(x) for x in (a, b)]
    scaled = np.abs(rise[0] - rise[1]).max() * math.sqrt(len(a) * len(b) / (len(a) + len(b)))
    if scaled < 0.2:
        return 1.0
    return min(1.0, 2 * sum((-1) ** (k - 1) * math.exp(-2 * (k * scaled) ** 2) for k in range(1, 101)))


def two_proportions(a: np.ndarray, b: np.ndarray) -> float:
    """p-value of the normal test that two 0/1 samples share their mean."""
    pooled = np.concatenate([a, b]).mean()
    z = abs(a.mean() - b.mean()) / math.sqrt(pooled * (1 - pooled) * (1 / len(a) + 1 / len(b)))
    return math.erfc(z / math.sqrt(2))


def rejected(ours: Measured, theirs: Measured, level: float) -> list[str]:
    """The tests by which Holm's rule says that two sets differ, the chance of any false one under `level`.

    Each statistic is compared over all images, path length also within each label, and the labels' balance.
    """
    p_values = {name: kolmogorov_smirnov(values, theirs[0][name]) for name, values in ours[0].items()}
    for label in (0, 1):
        lengths = [statistics["path length"][labels == label] for statistics, labels in (ours, theirs)]
        p_values[f"path length, label {label}"] = kolmogorov_smirnov(*lengths)
    p_values["label"] = two_proportions(ours[1], theirs[1])
    names: list[str] = []
    for k, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        if p > level / (len(p_values) - k):
            break
        names.append(name)
    return names
