"""A fixed tenth of validation between whole ones: looked at, and nothing of the run depends on it."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import torch

from chela.config.compose import resolve
from chela.config.identity import fingerprint
from chela.training.score import data_of
from tests.training.launches import TINY, assert_equal, launch, left_by, only_run


def test_a_run_with_tenths_is_the_same_run(tiny: tuple[str, ...], straight: dict[str, Any], tmp_path: Path) -> None:
    ended = launch(*tiny, "trainer.tenth_every=3", "trainer.progress=plain")
    assert ended.status == 0, ended.err
    run = only_run(tmp_path)
    with open(run / "metrics.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    tenths = [row for row in rows if row["split"] == "tenth"]
    assert [row["step"] for row in tenths] == ["3", "6", "9"]  # 12 is a validation
    assert {float(row["accuracy"]) * 3 % 1 for row in tenths} <= {0.0}  # 3 of the 30 records
    assert all(float(row["evaluation"]) > 0 for row in rows if row["split"] != "train")
    assert all(row["evaluation"] == "" for row in rows if row["split"] == "train")
    assert "step 3: a tenth of validation loss" in ended.out and "step 2: validation loss" in ended.out
    left = left_by(run)
    left["metrics"] = [row for row in left["metrics"] if row["split"] != "tenth"]
    assert_equal(left, straight)
    assert straight["result"]["epochs"] == 2.0 and straight["result"]["lra"] is False  # tiny is no task of LRA's


def test_the_tenth_is_fixed_and_no_part_of_the_fingerprint(tiny: tuple[str, ...]) -> None:
    config = resolve([*TINY, *tiny])
    assert fingerprint(config) == fingerprint(resolve([*TINY, *tiny, "trainer.tenth_every=7"]))
    seen = []
    for seed in (0, 1):
        data = data_of(resolve([*TINY, *tiny, f"seed={seed}"]))
        seen.append(torch.cat([batch["inputs"].sum(1) for batch in data.tenth_dataloader()]))
    assert len(seen[0]) == 3 and torch.equal(*seen)
    whole = torch.cat([batch["inputs"].sum(1) for batch in data.val_dataloader()])
    assert set(seen[0].tolist()) <= set(whole.tolist())


def test_blocks_computed_again_give_the_same_run(
    tiny: tuple[str, ...], straight: dict[str, Any], tmp_path: Path
) -> None:
    assert fingerprint(resolve([*tiny, "trainer.checkpoint_activations=false"])) == fingerprint(resolve([*tiny]))
    assert launch(*tiny, "trainer.checkpoint_activations=true").status == 0
    found = left_by(only_run(tmp_path))
    for part in ("last", "best", "result"):
        found[part]["fingerprint"] = straight[part]["fingerprint"]
    assert_equal(found, straight)
