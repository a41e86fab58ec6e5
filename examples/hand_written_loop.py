"""A sparse expert in a training loop of your own, on a tiny random model: no download, a few seconds.

python examples/hand_written_loop.py
"""

import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from sparselet import SparseletConfig, freeze_masks, merge, reselect, to_adapter
from sparselet.apply import apply_temporarily


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )


def batch(seed: int) -> dict[str, torch.Tensor]:
    """Sequences that count up from a random start: something to learn."""
    start = torch.randint(0, 48, (8, 1), generator=torch.Generator().manual_seed(seed))
    ids = start + torch.arange(12)
    return {"input_ids": ids, "labels": ids}


def main() -> None:
    model = get_peft_model(tiny_model(), SparseletConfig(density=0.2, when="paper", score="mcs"))
    model.print_trainable_parameters()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-2)
    for step in range(1, 101):
        loss = model(**batch(step)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step in (10, 20, 30):
            print(f"step {step}: loss {loss.item():.3f}, {reselect(model, [batch(1000 + step)], optimizer)}")
    print(f"step {step}: loss {loss.item():.3f}")
    freeze_masks(model)
    expert = to_adapter(model, metadata={"task": "counting"})
    print(expert)

    base = tiny_model()
    with torch.no_grad(), apply_temporarily(base, merge([expert, expert])):
        print(f"merged with itself, in a fresh model: loss {base(**batch(9999)).loss.item():.3f}")
    with torch.no_grad():
        print(f"the base model again: loss {base(**batch(9999)).loss.item():.3f}")


if __name__ == "__main__":
    main()
