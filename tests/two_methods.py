"""The text of a study of two methods on the toy stream."""

from pathlib import Path

import toy

CONFIG = f"""
name = "toy"
stream = "{Path(toy.__file__)}:toy_stream"
rank = 4
seeds = [0, 1]
processes = 2

[training]
epochs = 2

[methods.sequential_merge]
alpha = 8.0
lr = 0.03

[methods.ours]
method = "eblora"
alpha = 8.0
lr = 0.03
scale_lr = 0.1
energy = 0.9
statistic_examples = 96
"""
