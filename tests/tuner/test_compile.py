"""torch.compile: one graph, and the numbers of the model that is not compiled."""

import pytest
import torch
from helpers.paper import paper_config
from helpers.tiny import make_gpt2, make_model
from peft import get_peft_model

import sparselet

IDS = torch.randint(2, 250, (2, 9), generator=torch.Generator().manual_seed(0))


def trained(make, block_size, compiled, steps=3):
    """The losses of some steps, and the values then. A graph break is an error."""
    torch.compiler.reset()
    model = get_peft_model(make(), paper_config(initial_mask="random", density=0.3, block_size=block_size))
    sparselet.freeze_masks(model)
    values = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(values.values(), lr=1e-2)
    forward = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        logits = forward(input_ids=IDS).logits  # GPT-2's own loss writes to a log, which cannot be traced
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses), values


@pytest.mark.parametrize("make", [make_model, make_gpt2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("block_size", [1, 2, "row", "column"])
def test_a_compiled_model_trains_as_one_that_is_not_in_one_graph(make, block_size):
    expected, values = trained(make, block_size, compiled=False)
    found, compiled = trained(make, block_size, compiled=True)
    assert expected[0] > expected[-1]
    torch.testing.assert_close(found, expected)
    for name, value in values.items():
        torch.testing.assert_close(compiled[name], value, rtol=1e-4, atol=1e-6)
