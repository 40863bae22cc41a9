"""``chela.train`` with a pause in each step of CHELA, so that its run lasts as long on any machine."""

from __future__ import annotations

import sys
import time
from typing import Any

from chela.train import main
from chela.training.step import LitModel

PAUSE = 0.25  # seconds

if __name__ == "__main__":
    if "model=chela" in sys.argv:
        step = LitModel.on_train_batch_start

        def slow(self: LitModel, *args: Any) -> None:
            time.sleep(PAUSE)
            step(self, *args)

        LitModel.on_train_batch_start = slow  # type: ignore[method-assign]
    sys.exit(main())
