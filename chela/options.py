from chela.core.modules import expect_trusted  # noqa: F401
from chela.layers.mixers import CONTEXT, mixer_options, systems  # noqa: F401


def of_today(options):  # type: ignore[no-untyped-def]
    return options
