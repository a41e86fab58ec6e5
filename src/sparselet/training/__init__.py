"""Training one expert or baseline: the settings, the recipe, and the mask schedule for any `Trainer`."""

from sparselet.training.recipe import Trained, train
from sparselet.training.schedule import MaskSchedule
from sparselet.training.settings import TrainSettings

__all__ = ["MaskSchedule", "TrainSettings", "Trained", "train"]
