from chela.config.compose import resolve_preset  # noqa: F401
from chela.config.groups import PRESETS  # noqa: F401


def cuda_devices():  # type: ignore[no-untyped-def]
    import torch

    return torch.cuda.device_count()
