"""Draw the README's two figures from committed results."""

from __future__ import annotations

import statistics
from typing import Any

from committed import ROOT, bench, scores, size_text


def figures() -> None:
    """Draw the README's two figures, the same bytes each time."""
    import matplotlib
    from matplotlib.figure import Figure

    fonts = {"svg.fonttype": "none", "font.size": 10, "font.family": "sans-serif"}
    matplotlib.rcParams |= {"svg.hashsalt": "chela", **fonts}
    blue, red, gray, brown = "#0969da", "#c33", "#8a8f98", "#bc6c00"

    def begun(*titles: str) -> tuple[Any, Any]:
        figure = Figure(figsize=(9, 3), layout="constrained")
        axes = figure.subplots(1, 2)
        for axis, text in zip(axes, titles, strict=True):
            axis.set_title(text, fontsize=11, loc="left")
            axis.spines[["top", "right"]].set_visible(False)
        return figure, axes

    def lengths(axis: Any, at: list[int], what: str) -> None:
        axis.set_xscale("log", base=2)
        axis.set_xticks(at, [f"{length // 1024}k" for length in at])
        axis.minorticks_off()
        axis.set_xlabel(what)

    def save(figure: Any, name: str) -> None:
        figure.savefig(ROOT / "docs" / "figures" / f"{name}.svg", metadata={"Date": None, "Creator": None})

    titles = ("Recall hard: 28 pairs, % of values predicted", "Time to generate one token (log scale)")
    figure, (left, right) = begun(*titles)
    bars = {"CHELA": ("chela", blue), "MEGA": ("mega", gray), "softmax attention": ("softmax", red)}
    bars |= {"Lightning Attention": ("lightning", brown), "its convolution alone": ("chela_conv_only", gray)}
    for place, (model, fill) in enumerate(bars.values()):
        value = statistics.mean(scores(model, "recall", "hard", "recall", "core"))
        left.barh(-place, value, color=fill, height=0.6)
        left.text(value + 1.5, -place, f"{value:.1f}", va="center")
    left.set_yticks(range(0, -len(bars), -1), bars)
    left.set_xlim(0, 115)
    measured = bench("generate")
    at, last = list(measured), measured[max(measured)]
    lines = {"softmax": ("softmax", "-", red), "chela": ("CHELA", "--", blue)}
    lines |= {"chela ema": ("CHELA, ema", "-", blue), "lightning": ("Lightning", "-", brown)}
    for name, (title, style, colour) in lines.items():
        times = [row[f"{name} [ms]"] * 1e3 for row in measured.values()]
        right.plot(at, times, style, color=colour, marker="o", ms=4)
        state, place = f"{title}: state {size_text(last[f'{name} [KiB]'])}", (at[-1], times[-1])
        right.annotate(state, place, (8, 0), textcoords="offset points", va="center", fontsize=9)
    right.set_yscale("log")
    right.set_yticks([1, 3, 10, 30, 100], ["1 ms", "3", "10", "30", "100 ms"])
    right.minorticks_off()
    right.set_xlim(at[0] * 0.9, at[-1] * 14)
    lengths(right, at, "tokens of context (CPU)")
    save(figure, "readme")

    measured = bench("layers")
    figure, (left, right) = begun("A layer's training step, ms (CPU)", "Memory of a step, MiB")
    for axis, unit in ((left, "ms"), (right, "MiB")):
        for name, colour in {"softmax": red, "CHELA": blue}.items():
            line = {length: row[f"{name} [{unit}]"] for length, row in measured.items() if f"{name} [{unit}]" in row}
            values = [value * (1e3 if unit == "ms" else 1) for value in line.values()]
            axis.plot(list(line), values, color=colour, marker="o", ms=4, label=name)
        axis.set_yscale("log")
        lengths(axis, list(measured), "tokens")
        axis.legend(frameon=False)
    save(figure, "speed")
