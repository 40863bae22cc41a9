"""Score a trained run again, from its checkpoint.

python -m chela.evaluate run=runs/listops-mini/…                        the test set, by the best weights
python -m chela.evaluate run=… checkpoint=last split=validation
"""

from __future__ import annotations

import sys

from chela.cli import guarded
from chela.config import load
from chela.errors import UsageError

CHOICES = {"checkpoint": ("best", "last"), "split": ("test", "validation")}


def main(argv: list[str] | None = None) -> int:
    """Read the words, score the run, print one line; return the exit status."""
    words = sys.argv[1:] if argv is None else argv
    if not words or "--help" in words or "-h" in words:
        sys.stdout.write((__doc__ or "") + "\nFurther words: data.dir=FOLDER, data.root=FOLDER, as for chela.train.\n")
        return 0
    return guarded(lambda: evaluate(words))


def evaluate(words: list[str]) -> int:
    """Score the run that ``words`` name."""
    asked = {"checkpoint": "best", "split": "test", "data.dir": "", "data.root": ""}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or key not in {*asked, "run"}:
            raise UsageError(
                "expected run=FOLDER, checkpoint=best|last, split=test|validation, data.dir=FOLDER or "
                f"data.root=FOLDER, got {word[:80]!r}"
            )
        asked[key] = value
    for key, choices in CHOICES.items():
        if asked[key] not in choices:
            raise UsageError(f"{key}: expected one of {', '.join(choices)}, got {asked[key][:80]!r}")
    if "run" not in asked:
        raise UsageError("expected run=FOLDER, the folder that a training run printed")
    from chela.training.run import open_run

    run = open_run(asked["run"])
    config = load(run.config)
    if asked["data.dir"]:
        config.data.dir = asked["data.dir"]
    if asked["data.root"]:  # where the run's own lay may be of another machine, or gone
        config.data.root = None if asked["data.root"] == "null" else asked["data.root"]
    from chela.training import fit
    from chela.training.hardware import stdout_console

    found = fit.evaluate(config, run, asked["checkpoint"], asked["split"])
    stdout_console().print(
        f"{config.task.name} {config.preset} {config.model.name} seed {config.seed}: {asked['split']} accuracy "
        f"{found['accuracy']!r} of {found['count']:.0f}, loss {found['loss']!r}, by the {asked['checkpoint']} weights"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
