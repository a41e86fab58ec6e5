"""The command line, in which the second process fails at the end of the fifth step. Started by torchrun."""

import os

from transformers import TrainerCallback

from sparselet.cli import train as verb
from sparselet.cli.main import run
from sparselet.errors import SparseletError

train = verb.train


class Fail(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 5 and os.environ["RANK"] == "1":
            raise SparseletError("no more")


def failing(*arguments, callbacks, **more):
    return train(*arguments, callbacks=[*callbacks, Fail()], **more)


if __name__ == "__main__":
    verb.train = failing
    run()
