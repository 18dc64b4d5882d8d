"""The exponential moving average follows its decay."""

from __future__ import annotations

import copy

import torch
from torch import nn

from ldm_vae.training.trainer import Ema


def test_the_exponential_average_follows_its_decay():
    module = nn.Linear(1, 1, bias=False)
    ema = Ema(module, decay=0.9)
    start = copy.deepcopy(module.weight.detach())
    nn.init.constant_(module.weight, 1.0)
    ema.update(1000)
    torch.testing.assert_close(ema.module.weight, 0.9 * start + 0.1)
