from chela.config.checks import *  # noqa: F403
