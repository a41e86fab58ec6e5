"""The job of PEFT: `add_weighted_adapter` of LoRA adapters that are loaded already."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from racing.worker import serve
from transformers import AutoModelForCausalLM

TARGETS = ["q_proj", "k_proj", "v_proj"]


@functools.cache
def model_with_adapters(model: str, rank: int, adapters: int) -> PeftModel:
    """Random A and B in each adapter; scale 1."""
    torch.manual_seed(0)
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS, init_lora_weights=False)
    found = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model, trust_remote_code=False), config, adapter_name="expert-0"
    )
    for i in range(1, adapters):
        found.add_adapter(f"expert-{i}", config)
    return found


def add_weighted_adapter(job: dict[str, Any]) -> Callable[[], None]:
    """Beside the adapters' own parameters, the weights are 1 each."""
    model = model_with_adapters(job["model"], job["rank"], job["adapters"])
    if "merged" in model.peft_config:
        model.delete_adapter("merged")
    names = [f"expert-{i}" for i in range(job["adapters"])]
    return lambda: model.add_weighted_adapter(
        names, [1.0] * len(names), "merged", combination_type=job["method"], **job["parameters"]
    )


if __name__ == "__main__":
    serve({"in memory": add_weighted_adapter}, ("peft", "torch", "transformers"))
