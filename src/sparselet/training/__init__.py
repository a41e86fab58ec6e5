"""Training one expert: the settings, the recipe, and the mask schedule for any `Trainer`."""

from sparselet.training.recipe import train
from sparselet.training.schedule import MaskSchedule
from sparselet.training.settings import TrainSettings

__all__ = ["MaskSchedule", "TrainSettings", "train"]
