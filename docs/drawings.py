"""Draw the README's two figures from committed results."""

from __future__ import annotations

import statistics
from typing import Any

from committed import ROOT, bench, scores, size_text


def figures() -> None:
    """Draw the README's two figures, the same bytes each time."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams |= {
        "svg.hashsalt": "chela",
        "svg.fonttype": "none",
        "font.size": 10,
        "font.family": "sans-serif",
    }
    colour = {"chela": "#0969da", "chela ema": "#0969da", "softmax": "#c33", "s4d": "#8a8f98", "lightning": "#bc6c00"}

    def begun(title: tuple[str, str]) -> tuple[Any, Any]:
        figure = Figure(figsize=(9, 3), layout="constrained")
        axes = figure.subplots(1, 2)
        for axis, text in zip(axes, title, strict=True):
            axis.set_title(text, fontsize=11, loc="left")
            axis.spines[["top", "right"]].set_visible(False)
        return figure, axes

    def lengths(axis: Any, at: list[int], what: str) -> None:
        axis.set_xscale("log", base=2)
        axis.set_xticks(at, [f"{length // 1024}k" for length in at])
        axis.minorticks_off()
        axis.set_xlabel(what)

    def save(figure: Any, name: str) -> None:
        (ROOT / "docs" / "figures").mkdir(exist_ok=True)
        figure.savefig(ROOT / "docs" / "figures" / f"{name}.svg", metadata={"Date": None, "Creator": None})

    figure, (left, right) = begun(
        ("Recall hard: 28 pairs, % of values predicted", "Time to generate one token (log scale)")
    )
    bars = {"CHELA": ("chela", "#0969da"), "MEGA": ("mega", "#8a8f98"), "softmax attention": ("softmax", "#c33")}
    bars |= {"Lightning Attention": ("lightning", "#bc6c00"), "its convolution alone": ("chela_conv_only", "#8a8f98")}
    for place, (model, fill) in enumerate(bars.values()):
        value = statistics.mean(scores(model, "recall", "hard", "recall", "core") or [0])
        left.barh(-place, value, color=fill, height=0.6)
        left.text(value + 1.5, -place, f"{value:.1f}", va="center")
    left.set_yticks(range(0, -len(bars), -1), bars)
    left.set_xlim(0, 115)
    measured = bench("generate")
    at, last = list(measured), measured[max(measured)]
    for name, title in {
        "softmax": "softmax",
        "chela": "CHELA",
        "chela ema": "CHELA, ema",
        "lightning": "Lightning",
    }.items():
        style = "--" if name == "chela" else "-"
        right.plot(
            at, [row[f"{name} [ms]"] * 1e3 for row in measured.values()], style, color=colour[name], marker="o", ms=4
        )
        state = f"{title}: state {size_text(last[f'{name} [KiB]'])}"
        right.annotate(
            state, (at[-1], last[f"{name} [ms]"] * 1e3), (8, 0), textcoords="offset points", va="center", fontsize=9
        )
    right.set_yscale("log")
    right.set_yticks([1, 3, 10, 30, 100], ["1 ms", "3", "10", "30", "100 ms"])
    right.minorticks_off()
    right.set_xlim(at[0] * 0.9, at[-1] * 14)
    lengths(right, at, "tokens of context (CPU)")
    save(figure, "readme")

    measured = bench("layers")
    figure, (left, right) = begun(("A layer's training step, ms (CPU)", "Memory of a step, MiB"))
    for axis, unit in ((left, "ms"), (right, "MiB")):
        for name, title in {"softmax": "softmax", "CHELA": "CHELA"}.items():
            line = {length: row[f"{name} [{unit}]"] for length, row in measured.items() if f"{name} [{unit}]" in row}
            values = [value * (1e3 if unit == "ms" else 1) for value in line.values()]
            axis.plot(list(line), values, color=colour[name.lower()], marker="o", ms=4, label=title)
        axis.set_yscale("log")
        lengths(axis, list(measured), "tokens")
        axis.legend(frameon=False)
    save(figure, "speed")
