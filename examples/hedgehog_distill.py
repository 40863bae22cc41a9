"""Turn a trained softmax run into a linear-time network by Hedgehog's two stages (arXiv 2402.04347, section 4.2).

python -m chela.train task=listops model=softmax                        a teacher; prints its folder, RUN
python examples/hedgehog_distill.py RUN student-folder [STEPS]          200 steps a stage unless said otherwise
"""

import sys
from collections.abc import Iterator
from itertools import islice

import torch
from torch import nn

from chela import param_groups
from chela.config.compose import load
from chela.models.convert import convert, distillation_loss, feature_maps
from chela.models.pretrained import save_pretrained
from chela.predict import load_run
from lra.batches import batch_indices, eval_batches
from lra.datamodule import Batch, collate
from lra.tasks.base import Records


def batches(records: Records, size: int) -> Iterator[Batch]:
    lengths, step = records.lengths(), 0
    while True:
        chosen = batch_indices(lengths, size, pool=8, seed=0, step=step)
        yield collate(records.read(chosen), int(lengths[chosen].max()), step)
        step += 1


@torch.no_grad()
def accuracy(model: nn.Module, records: Records) -> float:
    model.eval()
    lengths, correct = records.lengths(), 0
    for chosen in eval_batches(lengths, 128):
        batch = collate(records.read(chosen), int(lengths[chosen].max()), 0)
        correct += int((model(batch["inputs"], batch["mask"]).argmax(-1) == batch["labels"]).sum())
    return correct / len(records)


def main(run: str, folder: str, steps: int = 200) -> None:
    teacher, task = load_run(run)
    config = load(f"{run}/config.yaml")
    task.prepare(config.data)
    train, validation = task.dataset("train"), task.dataset("validation")
    student = convert(teacher)
    print(f"teacher {accuracy(teacher, validation):.2%}, student at first {accuracy(student, validation):.2%}")

    optimizer = torch.optim.Adam(feature_maps(student), lr=1e-2)
    for step, batch in enumerate(islice(batches(train, 16), steps)):
        loss = distillation_loss(teacher, student, batch["inputs"], batch["mask"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step in (0, steps - 1):
            print(f"step {step}: cross-entropy of the attention weights {loss.item():.4f}")
    print(f"student with learned feature maps {accuracy(student, validation):.2%}")

    optimizer = torch.optim.AdamW(param_groups(student.train(), lr=5e-4, weight_decay=0.01))
    for batch in islice(batches(train, config.trainer.batch_size), steps):
        loss = nn.functional.cross_entropy(student(batch["inputs"], batch["mask"]), batch["labels"])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
    print(
        f"student trained on the task {accuracy(student, validation):.2%}, saved in {save_pretrained(student, folder)}"
    )


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
