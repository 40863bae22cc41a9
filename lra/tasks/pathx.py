"""Path-X: Pathfinder at 128 pixels a side, a sequence of 16,384."""

from __future__ import annotations

from dataclasses import dataclass

from lra.options import option
from lra.tasks.pathfinder import Pathfinder


@dataclass
class PathX(Pathfinder):
    """Pathfinder, larger."""

    resolution: int = option(128, "pixels a side: 128; Pathfinder has others")

    title = "Path-X"


TASK = PathX
