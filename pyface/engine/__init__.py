"""Training that every method shares: settings, the recipe interface, the loop, checkpoints and logs (on accelerate)."""

from pyface.engine.checkpoint import load_weights, read_about, save_weights
from pyface.engine.config import PROCEDURAL, TrainConfig, load_config, setting, to_toml
from pyface.engine.recipe import Recipe, Row
from pyface.engine.run import Run
from pyface.engine.trainer import Trainer

__all__ = [
    "PROCEDURAL",
    "Recipe",
    "Row",
    "Run",
    "TrainConfig",
    "Trainer",
    "load_config",
    "load_weights",
    "read_about",
    "save_weights",
    "setting",
    "to_toml",
]
