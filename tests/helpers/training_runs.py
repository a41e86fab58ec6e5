"""What tests of whole runs share: callbacks that look on or interrupt, and what a run left."""

import multiprocessing
import os
import signal
from pathlib import Path

import torch
from transformers import TrainerCallback

from sparselet.training import train
from sparselet.training.run_directory import RUN_FILE

# Of a Trainer of a few steps that writes and says nothing.
QUIET = {
    "num_train_epochs": 2,
    "learning_rate": 1e-2,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "logging_strategy": "no",
}
IDS = torch.arange(2, 22).reshape(2, 10)


class Look(TrainerCallback):
    """Keeps the validation losses, the steps, the model's first logits, and its last ones and weights."""

    def __init__(self):
        self.losses, self.steps = [], []
        self.weights, self.logits, self.first_logits = {}, None, None

    def on_train_begin(self, args, state, control, model, **kwargs):
        self.first_logits = logits(model)

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        self.losses.append(metrics["eval_loss"])

    def on_step_end(self, args, state, control, **kwargs):
        self.steps.append(state.global_step)

    def on_train_end(self, args, state, control, model, **kwargs):
        self.weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.logits = logits(model)


class StopAt(TrainerCallback):
    """Raises at the end of an optimizer step, as Ctrl-C would."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


class KillAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def train_and_die(settings, output, step):
    torch.set_num_threads(1)
    train(settings, output, callbacks=[KillAt(step)])


def killed_run(settings, output, step):
    """A run in a process of its own, killed at the end of a step."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sparselet.training", __name__])
    process = context.Process(target=train_and_die, args=(settings, output, step))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL


@torch.no_grad()
def logits(model):
    """The model's answer to two fixed rows, or None where its weights are of two dtypes."""
    if len({p.dtype for p in model.parameters() if p.numel()}) > 1:
        return None
    training = model.training
    found = model.eval()(input_ids=IDS).logits
    model.train(training)
    return found


def bytes_of(directory):
    """The files that a run wrote, but for the record of when and how long."""
    return {p.name: p.read_bytes() for p in Path(directory).iterdir() if p.name != RUN_FILE}
