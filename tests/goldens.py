"""Write down what a change of the code's form must leave as it is, to be compared by ``diff -r BEFORE AFTER``.

    python -m tests.goldens FOLDER [configs] [tables] [weights]

configs: what ``--cfg`` prints of every task × model × preset, and its fingerprint. tables: the table of each folder of
results. weights: a hash of the weights after 30 steps in five settings, which depends on the processor: write both
sides on one machine.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SETTINGS = {
    "plain": ["task=listops"],
    "accumulate": ["task=listops", "trainer.accumulate=2"],
    "carry": ["task=corpus", "data.carry=true"],
    "two processes": ["task=listops", "trainer.devices=2"],
    "sequence parallel": ["task=listops", "trainer.devices=2", "trainer.sequence_parallel=2"],
}


def configs(folder: Path) -> None:
    """Write a file for each task: configuration and fingerprint of each model and preset."""
    from chela.config.compose import names, read_group, resolve, to_yaml
    from chela.config.identity import fingerprint

    for task in names("task"):
        texts = []
        for preset in read_group("task", task)[0]["presets"]:
            for model in names("model"):
                config = resolve([f"task={task}", f"model={model}", f"preset={preset}"])
                texts.append(f"# {preset} {model} {fingerprint(config)}\n{to_yaml(config)}")
        (folder / f"{task}.yaml").write_text("".join(texts))


def tables(folder: Path) -> None:
    """Write the table of each folder of results."""
    from experiments.table import main as table

    for path in sorted((ROOT / "experiments/results").iterdir()):
        if path.name != "bench":
            out = io.StringIO()
            with contextlib.chdir(ROOT), contextlib.redirect_stdout(out):
                table([f"experiments/results/{path.name}"])
            (folder / f"{path.name}.md").write_text(out.getvalue())


def weights(folder: Path) -> None:
    """Train for 30 steps in each setting."""
    import torch

    text = folder / "numbers.txt"
    text.write_text("".join(f"{number}\n" for number in range(3000)))
    hashes = {}
    for name, words in SETTINGS.items():
        runs = folder / "runs" / name.replace(" ", "_")
        always = [f"runs={runs}", "preset=tiny", "trainer.max_steps=30", "trainer.accelerator=cpu", "trainer.threads=1"]
        always += ["trainer.matmul=mkl"]
        always += [f"data.dir={folder / 'data'}", "trainer.progress=none", "tensorboard=false"]
        root = [f"data.root={text}"] if "task=corpus" in words else []
        subprocess.run([sys.executable, "-m", "chela.train", *words, *always, *root], cwd=ROOT, check=True)
        [path] = runs.rglob("last.ckpt")
        state = torch.load(path, map_location="cpu", weights_only=True)["model"]
        digest = hashlib.sha256()
        for key in sorted(state):
            digest.update(key.encode() + state[key].contiguous().view(torch.uint8).numpy().tobytes())
        hashes[name] = digest.hexdigest()[:16]
    (folder / "weights.json").write_text(json.dumps(hashes, indent=1) + "\n")


def main(folder: Path, parts: list[str]) -> None:
    """Write the parts asked for; all, where none is."""
    for part in (configs, tables, weights):
        if not parts or part.__name__ in parts:
            (folder / part.__name__).mkdir(parents=True, exist_ok=True)
            part(folder / part.__name__)


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute(), sys.argv[2:])
