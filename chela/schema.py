from chela.config.schema import *  # noqa: F403
from chela.config.schema import Config, DataConfig, ModelConfig, OptimizerConfig, TrainerConfig, SCHEDULES  # noqa: F401
