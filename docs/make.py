"""Fill the pages' tables, figures and sentences with numbers from committed results.

python docs/make.py                    every block of every page, and the two figures; then mkdocs build --strict
python docs/make.py means FOLDER …     what stands in such a block, to look at

A block of a page begins with ``<!-- from: COMMAND -->``, a command of this file, and ends with ``<!-- end -->``.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent)]  # the files beside this one, wherever it is loaded from
from committed import ROOT, bench, cells_of, full, mean_of, number_of, of, runs, scores, size_text, title_of  # noqa: E402
from drawings import figures  # noqa: E402

BLOCK = re.compile(r"(<!-- from: (?P<command>.+?) -->\n)(?P<body>.*?)(<!-- end -->)", re.S)
MINI = "experiments/results/lra_mini"
NAMES = {
    "chela": "**CHELA**",
    "chela_conv_only": "its convolution alone",
    "mega": "MEGA",
    "s4d": "S4D",
    "softmax": "softmax attention",
    "lightning": "Lightning Attention",
    "lion_s": "LION-S",
    "hedgehog": "Hedgehog",
    "linear": "linear attention",
    "majority class": "majority class",
}


def means(*words: str) -> str:
    """Return that table's means alone, the best in bold."""
    head, _, *rows = cells_of(full(*words))
    others = ("average", "parameters", "memory", *["tokens/s"] * (not any(word.startswith("bench=") for word in words)))
    kept = [place for place, title in enumerate(head) if place and not title.startswith(others)]
    named = [row for row in rows if row[0] in NAMES or row[0].startswith("chela_conv_only")]  # no variants
    out = []
    for row in sorted(named, key=lambda row: _place(row[0])):
        out.append([NAMES.get(row[0], row[0]), *(_mean(row[place], head[place]) for place in kept)])
    return grid([head[0], *(head[place].replace(" (loss, nats)", ", nats ↓") for place in kept)], out)


def _place(name: str) -> tuple[int, str]:
    return next((i for i, known in enumerate(NAMES) if name.split(" ")[0] == known.split(" ")[0]), len(NAMES)), name


def _mean(cell: str, heading: str) -> str:
    """Cut a cell to its mean with one decimal; a loss has three, a ratio two."""
    digits = 3 if "nats" in heading else 2 if "×" in heading else 1
    cell = re.sub(r"( ± [\d.]+)? \([^)]*\)(?=[*]|$)", "", cell)
    return re.sub(r"\d+\.\d+", lambda number: f"{float(number[0]):.{digits}f}", cell)


def reading(*words: str) -> str:
    """Return what a table of means says of CHELA: where it leads, what ties, its speed, the seeds, and the marks."""
    grid = cells_of(means(*words))
    head, rows = grid[0], {row[0]: dict(zip(grid[0], row, strict=True)) for row in grid[2:]}
    chela, alone = rows["**CHELA**"], rows["its convolution alone"]
    tasks = [task for task in head[1:] if "×" not in task and chela[task] != "–"]
    lead, tie, other = _standing(tasks, rows)
    said = [
        "Bold: the best of a column, and what is within two standard errors of it; with so few seeds that means "
        "*not resolved*, not equal.",
        f"Better than CHELA by two standard errors: {_ahead(tasks, rows)}.",
        f"In the mean it leads on {_listed(lead)}" + (f", ties on {_listed(tie)}" if tie else "") + ";",
        f"it is {_listed([f'{place} on {_listed(there)}' for place, there in other.items()])}.",
        f"Its convolution, trained alone, scores {_level(tasks, chela, alone)}.",
    ]
    speed = next((task for task in head if task.startswith("tokens/s")), None)
    if speed and chela[speed] != "–":
        said.append(
            f"Tokens/s: whole networks in training, at these tasks' short lengths, on one thread of an EPYC; "
            f"CHELA's is {chela[speed].rstrip('×')} times as fast as softmax attention's."
        )
    said.append(f"Seeds: {_seeds(full(*words))}.")
    if any("×" not in task and chela[task] == "–" for task in head[1:]):
        said.append("–: not run with this version.")
    return " ".join(said) + "\n"


def _standing(tasks: list[str], rows: dict[str, dict[str, str]]) -> tuple[list[str], list[str], dict[str, list[str]]]:
    """Return the tasks where CHELA's mean is first, where it shares that place, and the others by its place."""
    lead, tie, other = [], [], {}
    for task in tasks:
        mine = number_of(rows["**CHELA**"][task])
        values = [number_of(row[task]) for name, row in rows.items() if row[task] != "–" and name != "majority class"]
        place = sum(value < mine if "nats" in task else value > mine for value in values)
        if place:
            names = ("second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "last")
            other.setdefault(names[place - 1], []).append(title_of(task))
        else:
            (tie if values.count(mine) > 1 else lead).append(title_of(task))
    return lead, tie, other


def _ahead(tasks: list[str], rows: dict[str, dict[str, str]]) -> str:
    """Name the best system of each task where CHELA is not among the best."""
    found = []
    for task in (task for task in tasks if not rows["**CHELA**"][task].startswith("**")):
        bold = {name: number_of(row[task]) for name, row in rows.items() if row[task].startswith("**")}
        found.append(f"{(min if 'nats' in task else max)(bold, key=bold.__getitem__)} on {title_of(task)}")
    return _listed(found)


def _level(tasks: list[str], chela: dict[str, str], alone: dict[str, str]) -> str:
    """Say where the convolution alone is level with CHELA, and where ahead, to two standard errors."""
    good = [task for task in tasks if alone[task].startswith("**")]
    level, ahead = ([title_of(task) for task in good if chela[task].startswith("**") == both] for both in (True, False))
    return f"as well on {_listed(level)}" + (f", and better on {_listed(ahead)}" if ahead else "")


def _seeds(table: str) -> str:
    """Say how many seeds the cells of a task have; where systems differ, the least and the most."""
    head, _, *rows = cells_of(table)
    found: dict[str, list[str]] = {}
    for task, *column in zip(head, *(row for row in rows if row[0] in NAMES), strict=True):
        if counts := {int(seeds[1]) for cell in column if (seeds := re.search(r"\((\d+)[;)]", cell))}:
            told = " to ".join(map(str, sorted({min(counts), max(counts)})))
            found.setdefault(told, []).append(title_of(task))
    usual, *others = sorted(found, key=lambda told: -len(found[told]))
    return usual + (f" ({'; '.join(f'{told} on {_listed(found[told])}' for told in others)})" if others else "")


def beside(task: str, *words: str) -> str:
    """Return every system's mean on one task, the best first."""
    said = ", ".join(f"{name} {value}" for name, value in _ranked(task, *words))
    return f"{task}, test accuracy in %: {said}.\n"


def longer(*folders: str) -> str:
    """Return every system's mean on ListOps trees longer than any that it learned from, the best first."""
    found: dict[str, list[float]] = {}
    for result in (record["result"] for record in runs(*folders)):
        if "test_longer" in result:
            found.setdefault(NAMES[result["model"]].strip("*"), []).append(100 * result["test_longer"]["accuracy"])
    rows = sorted(((statistics.mean(values), name) for name, values in found.items()), reverse=True)
    return f"Test accuracy in %: {', '.join(f'{name} {mean:.1f}' for mean, name in rows)}.\n"


def _ranked(task: str, *words: str) -> list[tuple[str, str]]:
    """Return every system's mean accuracy on a task, the best first."""
    head, _, *rows = cells_of(means(*words))
    place = next(i for i, title in enumerate(head) if title.startswith(task))
    found = [(row[0].strip("*"), row[place].strip("*")) for row in rows if row[place] != "–"]
    return sorted(found, key=lambda row: number_of(row[1]), reverse=True)


def _listed(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names) or "none"


def why() -> str:
    """Return what speaks for CHELA, a number each."""
    names = ("chela", "mega", "softmax", "lightning", "chela_conv_only")
    hard = {name: mean_of(scores(name, "recall", "hard", "recall", "core")) for name in names}
    select = scores("chela", "select", "mini", "lra_mini")
    (name, next_best), *_ = [row for row in _ranked("Select", MINI) if row[0] != "CHELA"]
    measured = bench("generate")
    longest, row = max(measured), measured[max(measured)]
    near = max(length for length, at in measured.items() if at["softmax [ms]"] < at["chela [ms]"])

    def told(system: str) -> str:
        return f"{row[f'{system} [ms]'] * 1e3:.1f} ms and a state of {size_text(row[f'{system} [KiB]'])}"

    said = [
        f"**It recalls.** On *Recall hard* (28 pairs among 512 symbols) it predicts {hard['chela']} % of the values. "
        f"MEGA and softmax attention, which keep all keys, get {_listed(sorted({hard['mega'], hard['softmax']}))}, "
        f"Lightning Attention {hard['lightning']}, its own convolution alone {hard['chela_conv_only']}.",
        "**Every seed selects.** *Select* asks of four interleaved reviews whether one of them has a certain word. "
        f"The three seeds reach {_listed([f'{x:.1f}' for x in sorted(select)])} %, the next best, {name}, {next_best}.",
        f"**It generates after long contexts.** After {longest:,} tokens one more takes {told('chela')}, with "
        f"`long_kernel=ema` {told('chela ema')}; softmax attention takes {told('softmax')}. Lightning Attention is "
        f"cheaper still, {told('lightning')}, and after {near:,} tokens softmax attention is as fast as CHELA.",
    ]
    return "".join(f"- {line}\n" for line in said)


def limits() -> str:
    """Return where CHELA does not help, a number each."""
    grid = cells_of(means(MINI))
    chela, alone = (
        dict(zip(grid[0], next(row for row in grid if row[0] == NAMES[name]), strict=True))
        for name in ("chela", "chela_conv_only")
    )
    level = _level([task for task in grid[0][1:] if chela[task] != "–"], chela, alone)
    systems = ("chela", "chela_conv_only")
    nano = {name: statistics.mean(scores(name, "shakespeare", "nano", "core")) for name in systems}
    length, row = next(iter(bench("layers").items()))
    faster, memory = row["softmax [ms]"] / row["CHELA [ms]"], row["CHELA [MiB]"] / row["softmax [MiB]"]
    said = [
        f"Its convolution alone, without attention, scores {level}, to two standard errors; on "
        f"Path-X its mean is higher, {number_of(alone['Path-X'])} against {number_of(chela['Path-X'])}, and its loss "
        f"on Shakespeare at `preset=nano` lower, {nano['chela_conv_only']:.3f} against {nano['chela']:.3f} nats.",
        f"At {length:,} tokens a layer trains slower than softmax attention ({faster:.1f} times as fast) and takes "
        f"{memory:.1f} times its memory, on a CPU.",
        "No run on a GPU is committed. On the Long Range Arena (LRA) itself only a small network was trained; it "
        "trails MEGA, and S4 on Text, Image and Pathfinder, where it leaves chance only after easier pictures.",
    ]
    return "".join(f"- {line}\n" for line in said)


def grid(head: list[str], rows: list[list[str]], left: int = 1) -> str:
    """Return a Markdown table whose first columns are words and the others numbers."""
    lines = [head, ["---"] * left + ["---:"] * (len(head) - left), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def commands() -> str:
    """Return the mini tasks' table: what seed 0 of each command gave on one thread, and the fastest seed's minutes.

    A command says its steps where what is committed had others than the preset has now.
    """
    from chela.config.compose import resolve

    rows = []
    for task in ("listops", "text", "retrieval", "image", "pathfinder", "pathx", "select", "recall"):
        config = resolve([f"task={task}", "preset=mini"])
        layer, rate = dataclasses.asdict(config.model.mixer).items(), config.optimizer.lr
        committed = [(run["config"], run["result"]) for run in of("chela", task, "mini", "core")]
        same = [
            one for one in committed if layer <= one[0]["model"]["mixer"].items() and one[0]["optimizer"]["lr"] == rate
        ]
        minutes = min(result["wall_seconds"] for _, result in same) / 60
        had, first = next((run["trainer"], result) for run, result in same if run["seed"] == 0)
        command = f"chela train task={task}"
        for key in ("max_steps", "val_every"):
            if had[key] != getattr(config.trainer, key):
                command += f" trainer.{key}={had[key]}"
        parts = (100 * first["test"]["accuracy"], 100 * first["majority_accuracy"])
        rows.append([f"`{command}`", f"{minutes:.0f}", *(f"{part:.1f}" for part in parts)])
    return grid(["command", "minutes", "test accuracy, %", "majority"], rows)


def lite() -> str:
    """Return what the small network gets on four of the arena's own tasks, beside what papers print."""
    from experiments.summary import published

    printed_by = {row["name"]: row["values"] for row in published()}
    tasks = {"listops": 0, "text": 1, "image": 3, "pathfinder": 4}
    found = {task: scores("chela", task, "lite", "lra_lite") for task in tasks}
    alone = scores("chela_conv_only", "text", "lite", "lra_lite")
    rows = [
        ["CHELA here", "4 × 64", "10, on Pathfinder 2", *map(mean_of, found.values())],
        ["its convolution alone here", "4 × 64", "10", "–", mean_of(alone), "–", "–"],
    ]
    sizes = {
        "Transformer": ("Transformer, as LRA prints", "–", "–"),
        "S4-v2 (S4-LegS)": ("S4, as its paper prints", "6 × 256 or 512", "32 to 200"),
        "MEGA": ("MEGA, as its paper prints", "4 to 8 × 80 to 160", "50 to 200"),
    }
    for name, told in sizes.items():
        rows.append([*told, *(f"{printed_by[name][i]:.1f}" for i in tasks.values())])
    return grid(["", "blocks × width", "epochs", "ListOps", "Text", "Image", "Pathfinder *"], rows, left=3)


def layers() -> str:
    """Return how much faster than softmax attention a layer trains, at four lengths, and what it holds."""
    rows = {length: row for length, row in bench("layers").items() if "softmax [ms]" in row}
    faster, memory = (
        _listed([f"{row[over] / row[under]:.1f}" for row in rows.values()])
        for over, under in (("softmax [ms]", "CHELA [ms]"), ("CHELA [MiB]", "softmax [MiB]"))
    )
    return (
        f"At {_listed([f'{length:,}' for length in rows])} tokens a layer's training step is {faster} times as fast as "
        f"softmax attention's (below 1: slower) and takes {memory} times its memory.\n"
    )


def probes() -> str:
    """Return what CHELA's attention adds, means over seeds: scores with it, with its mean, with zeros."""
    found: dict[str, list[list[float]]] = {}
    for record in [*runs(MINI), *of("chela", "recall", "hard", "core")]:
        if record.get("probe") and record["result"]["model"] == "chela":
            probe, unit = record["probe"], record["result"]["score"]["scale"]
            title = record["result"]["task_title"] + (", 28 pairs" if record["result"]["preset"] == "hard" else "")
            told = [unit * probe["scores"][name] for name in ("as it is", "mean", "zeros")]
            found.setdefault(title, []).append([*told, probe["adds"]])
    rows = []
    for title, told in found.items():
        digits = 1 if told[0][0] > 9 else 3
        values = (round(statistics.mean(column), digits) + 0.0 for column in zip(*told, strict=True))  # no −0.0
        rows.append([title, str(len(told)), *(f"{value:.{digits}f}" for value in values)])
    return grid(["task", "seeds", "as it is", "mean", "zeros", "attention adds"], rows)


def steps() -> str:
    """Return the time of one symbol and the state after a context, for five systems."""
    measured = bench("generate")
    names = {"chela": "CHELA", "chela ema": "CHELA, `long_kernel=ema`", "s4d": "S4D"}
    names |= {"lightning": "Lightning Attention", "softmax": "softmax with its cache"}
    rows = []
    for name, title in names.items():
        told = (f"{row[f'{name} [ms]'] * 1e3:.1f} ms, {size_text(row[f'{name} [KiB]'])}" for row in measured.values())
        rows.append([title, *told])
    return grid(["context", *(f"{length:,}" for length in measured)], rows)


MAKERS: dict[str, Callable[..., str]] = {
    made.__name__: made
    for made in (full, means, reading, beside, longer, why, limits, commands, lite, layers, steps, probes)
}


def block(command: str) -> str:
    """Return what stands below a command."""
    program, script, name, *words = shlex.split(command)
    assert (program, script) == ("python", "docs/make.py") and name in MAKERS, (
        f"expected one of {list(MAKERS)}: {command}"
    )
    return MAKERS[name](*words)


def filled(text: str) -> str:
    """Return a page with every block made again."""
    return BLOCK.sub(lambda found: f"{found[1]}{block(found['command']).strip()}\n{found[4]}", text)


def pages() -> list[Path]:
    """Return the pages that may have blocks; the notebook stays as it was written."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    if len(sys.argv) > 1:
        sys.exit(print(MAKERS[sys.argv[1]](*sys.argv[2:])))
    for path in pages():
        path.write_text(filled(path.read_text()))
    figures()
