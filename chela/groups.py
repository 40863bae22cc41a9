from chela.config.groups import *  # noqa: F403
from chela.config.groups import Layer, configs_folder, flat, is_file, label, names, read_group  # noqa: F401
