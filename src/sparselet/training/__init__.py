"""Training one expert or baseline: the settings, `train`, and the mask schedule for any `Trainer`."""

from sparselet.training.schedule import MaskSchedule
from sparselet.training.settings import TrainSettings
from sparselet.training.train import Trained, train

__all__ = ["MaskSchedule", "TrainSettings", "Trained", "train"]
