"""One seed for everything that is drawn."""

from __future__ import annotations

import random

import numpy as np
import torch

SEED = 0


def seed_everything(seed: int = SEED) -> None:
    """Seed Python, numpy and torch."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
