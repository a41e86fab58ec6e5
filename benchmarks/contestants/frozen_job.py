"""What no adapter's training can go below: forward and backward of the frozen model over the same rows, in a fresh process.

    python benchmarks/contestants/frozen_job.py --model MODEL --task TASK

Batches, their order and their shared beginnings are those of `sparselet train`; the gradient goes back to the embeddings and
stops there. There is no optimizer, no selection of a mask, no validation, no checkpoint.
"""

import argparse
from pathlib import Path

from sparselet.generation.prefix import batch_loss
from sparselet.generation.prompts import prompt_format
from sparselet.models import load_model, load_tokenizer
from sparselet.tasks.task import load_task
from sparselet.training.collate import collator, encode
from sparselet.training.sampling import LengthGroupedSampler
from sparselet.training.settings import TrainSettings
from sparselet.training.trainer import length


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--task", type=Path, required=True)
    parser.add_argument("--train-rows", type=int, default=300)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch", type=int, default=16)
    asked = parser.parse_args()

    defaults = TrainSettings(task=str(asked.task))
    tokenizer, model = load_tokenizer(asked.model), load_model(asked.model)
    rows = load_task(asked.task, ("train",)).rows("train", asked.train_rows)
    form = prompt_format(model, tokenizer, defaults.chat_template)
    encoded = encode(rows, form, defaults.max_input_length, str(asked.task))
    collate = collator(model, form, share=True)
    order = LengthGroupedSampler([length(row) for row in encoded], asked.batch, defaults.seed, [len(encoded)])
    model.requires_grad_(False)
    model.enable_input_require_grads()
    model.train()
    for epoch in range(asked.epochs):
        order.set_epoch(epoch)
        numbers = list(order)
        for start in range(0, len(numbers), asked.batch):
            batch_loss(model, collate([encoded[i] for i in numbers[start : start + asked.batch]])).backward()
    assert all(p.grad is None for p in model.parameters())


if __name__ == "__main__":
    main()
