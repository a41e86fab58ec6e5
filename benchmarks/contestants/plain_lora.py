"""An expert as one would train and measure it without sparselet: PEFT's LoRA, transformers' Trainer, model.generate.

    python benchmarks/contestants/plain_lora.py --model MODEL --task TASK --out OUT

Everything that no option sets is left at its default. The loss is on the answer and its end token. The collator is
DataCollatorForSeq2Seq, which pads to the longest row of a batch, and does not hide the end token from the loss where it is also
the padding token, as DataCollatorForLanguageModeling would. Writes OUT/answers.json, the answers to the test rows, and their
Rouge-L.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from rouge_score.rouge_scorer import RougeScorer
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments


def read_rows(file: Path, count: int) -> list[dict[str, str]]:
    """The first `count` rows of a JSONL file, each with `input` and `target`."""
    return [json.loads(line) for line in file.read_text().splitlines()[:count]]


def load_tokenizer(model: str) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left", trust_remote_code=False)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def prompt_of(tokenizer: Any, text: str) -> str:
    """The prompt through the chat template, if there is one."""
    if tokenizer.chat_template is None:
        return text
    return tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False)


def encode(tokenizer: Any, row: dict[str, str]) -> dict[str, list[int]]:
    """Prompt, answer and end token, with no loss on the prompt."""
    prompt = tokenizer(prompt_of(tokenizer, row["input"]), add_special_tokens=False)["input_ids"]
    space = " " if tokenizer.chat_template is None else ""
    answer = [*tokenizer(space + row["target"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    ids = prompt + answer
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [-100] * len(prompt) + answer}


def train(model: Any, tokenizer: Any, rows: Sequence[dict[str, str]], asked: argparse.Namespace) -> Any:
    """The model with a trained LoRA adapter."""
    wrapped = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM"))
    arguments = TrainingArguments(
        output_dir=str(asked.out),
        num_train_epochs=asked.epochs,
        per_device_train_batch_size=asked.batch,
        learning_rate=asked.learning_rate,
        report_to="none",
    )
    encoded: Any = [encode(tokenizer, row) for row in rows]
    Trainer(
        model=wrapped, args=arguments, train_dataset=encoded, data_collator=DataCollatorForSeq2Seq(tokenizer, model=model)
    ).train()
    wrapped.save_pretrained(asked.out)
    return wrapped


@torch.inference_mode()
def generate(model: Any, tokenizer: Any, prompts: Sequence[str], batch: int, max_new_tokens: int) -> list[str]:
    """Greedy answers, `batch` prompts at a time in the order they come."""
    model.eval()
    answers = []
    for start in range(0, len(prompts), batch):
        texts = [prompt_of(tokenizer, prompt) for prompt in prompts[start : start + batch]]
        inputs = tokenizer(texts, padding=True, add_special_tokens=False, return_tensors="pt").to(model.device)
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        answers += tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [answer.strip() for answer in answers]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--task", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--train-rows", type=int, default=300)
    parser.add_argument("--test-rows", type=int, default=200)
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    asked = parser.parse_args()

    tokenizer = load_tokenizer(asked.model)
    model = AutoModelForCausalLM.from_pretrained(asked.model, dtype=torch.float32, trust_remote_code=False)
    wrapped = train(model, tokenizer, read_rows(asked.task / "train.jsonl", asked.train_rows), asked)
    rows = read_rows(asked.task / "test.jsonl", asked.test_rows)
    answers = generate(wrapped, tokenizer, [row["input"] for row in rows], asked.batch, asked.max_new_tokens)
    scorer = RougeScorer(["rougeL"])
    scores = [scorer.score(row["target"], answer)["rougeL"].fmeasure for row, answer in zip(rows, answers, strict=True)]
    result = {"rougeL": 100 * sum(scores) / len(scores), "answers": answers}
    (asked.out / "answers.json").write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
