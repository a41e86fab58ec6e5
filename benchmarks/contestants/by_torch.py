"""What PyTorch and transformers alone do: the floors, full fine-tuning, a side product with a dense mask, top-k."""

from collections.abc import Callable, Mapping
from typing import Any

import safetensors.torch
import torch
from racing.worker import serve
from torch import Tensor, nn
from torch.nn import functional

from contestants.attending import dense_attention
from contestants.inputs import gradient_inputs, random_scores, switch_inputs
from contestants.library import forward
from contestants.models import targets
from contestants.steps import Training, model_and_batch, step_job, trained

SPARSE_FILE = "adapter_model.safetensors"


class SideProduct(nn.Module):
    """y = layer(x) + x (Ŵ ∘ M)ᵀ: the paper's W + Ŵ·M (Section 3.1) as a second, dense product, in float32.

    layer: frozen, [out, in]. Ŵ and M are dense float32 tensors of that shape.
    """

    def __init__(self, layer: nn.Module, mask: Tensor) -> None:
        super().__init__()
        self.layer, self.values = layer, nn.Parameter(torch.zeros_like(mask))
        self.mask = nn.Buffer(mask)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return y + functional.linear(x.float(), self.values * self.mask).to(y.dtype)


def floor(job: dict[str, Any]) -> Training:
    """Everything frozen, the gradient taken back to the first target's input. Asserts that this is so, unless `warm` is 0."""
    model, batch = model_and_batch(job)
    model.enable_input_require_grads()
    model.train()
    training = Training(model, batch, None)
    if not job["warm"]:  # what a step leaves behind in the heap would count as memory that was there before
        return training
    reached: list[Tensor] = []

    def watch(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        inputs[0].register_hook(reached.append)  # called when the gradient has come

    hook = next(iter(targets(model).values())).register_forward_pre_hook(watch)
    training.step()
    hook.remove()
    assert reached, "no gradient reaches the first target's input"
    assert all(p.grad is None for p in model.parameters()), "the floor computes gradients of weights"
    return training


def full(job: dict[str, Any]) -> Training:
    model, batch = model_and_batch(job)
    return trained(model.requires_grad_(True), batch)


def qkv(job: dict[str, Any]) -> Training:
    model, batch = model_and_batch(job)
    for module in targets(model).values():
        module.weight.requires_grad_(True)
    return trained(model, batch)


def side_product(job: dict[str, Any]) -> Training:
    model, batch = model_and_batch(job)
    for name, layer in targets(model).items():
        mask = torch.rand(layer.weight.shape, device=layer.weight.device) < job["variant"]["density"]
        model.set_submodule(name, SideProduct(layer, mask.float()))
    return trained(model, batch)


BUILDERS = {"floor": floor, "full": full, "qkv": qkv, "side product": side_product}


def read(job: dict[str, Any]) -> Callable[[], None]:
    """The adapters' files loaded to the device and summed, which touches each byte once. They are in the page cache."""
    read_bytes(job)()

    def start() -> None:
        for adapter in job["adapters"]:
            for tensor in safetensors.torch.load_file(f"{adapter}/{SPARSE_FILE}", job["device"]).values():
                tensor.sum()

    return start


def read_bytes(job: dict[str, Any]) -> Callable[[], None]:
    """The same files through one buffer."""
    buffer = bytearray(4 * 2**20)

    def start() -> None:
        for adapter in job["adapters"]:
            with open(f"{adapter}/{SPARSE_FILE}", "rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass

    return start


def rewrite(job: dict[str, Any]) -> Callable[[], None]:
    """The least of a switch: in each target, overwrite n entries (one adapter out), read n others and overwrite them."""
    made = switch_inputs(job)

    def start() -> None:
        for weight, out, displaced, into, values in made:
            weight[out] = displaced
            weight.index_select(0, into)
            weight[into] = values

    return start


def dense_product(job: dict[str, Any]) -> Callable[[], Tensor]:
    """∂L/∂W of all entries, [out, in]."""
    x, gradient = gradient_inputs(job)
    return lambda: gradient.t() @ x


def topk(job: dict[str, Any]) -> Callable[[], Any]:
    """torch.topk over all scores together, in one tensor beforehand. sorted: whether the best come in order."""
    scores = random_scores(job)
    together = next(iter(scores.values())) if len(scores) == 1 else torch.cat(list(scores.values()))
    del scores
    k = round(job["density"] * together.numel())
    return lambda: torch.topk(together, k, sorted=job["sorted"])


def by_variant(job: dict[str, Any]) -> Training:
    return BUILDERS[job["variant"]["kind"]](job)


JOBS: Mapping[str, Callable[[dict[str, Any]], Callable[[], Any]]] = {
    "step": step_job(by_variant),
    "read": read,
    "read bytes": read_bytes,
    "rewrite": rewrite,
    "dense product": dense_product,
    "topk": topk,
    "dense attention": dense_attention,
    "forward": forward,
}

if __name__ == "__main__":
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    serve(dict(JOBS), ("torch", "transformers"), threads=torch.get_num_threads(), gpu=device)
