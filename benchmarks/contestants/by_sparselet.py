"""What sparselet does: steps and their parts, selection of masks, loading and switching."""

import functools
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from racing.worker import serve
from safetensors.torch import load_file as load_file_of
from torch import Tensor

from contestants.attending import same_attention, sparse_attention
from contestants.inputs import gradient_inputs, random_scores
from contestants.library import profile, route
from contestants.models import make_model, random_entries, targets
from contestants.steps import Training, kept, model_and_batch, several, step_job, swap_merged, trained
from sparselet import SparseAdapter, SparseDelta, SparseletConfig, freeze_masks, kernels, merging, reselect
from sparselet.apply import apply_temporarily
from sparselet.delta import BlockSize, block_for
from sparselet.fingerprint import fingerprint_weight
from sparselet.formats.checkpoint.write import export_checkpoint
from sparselet.masks import blocks_to_keep, top_k, top_k_global
from sparselet.models import load_model, load_tokenizer
from sparselet.tuner import SparseletLayer, sparselet_layers

NAME = "default"  # PEFT's name for the only adapter
A, B, NEW = "a", "b", "new"


def build(job: dict[str, Any]) -> Training:
    """An adapter whose masks are frozen, or, with `initial`, still to be selected.

    Frozen masks are random on the CPU. On a GPU they are chosen there, by the gradient: random ones are drawn on the CPU, which
    takes half a minute for a model of billions.
    """
    model, batch = model_and_batch(job)
    variant = job["variant"]
    initial = variant.get("initial", "random" if job["device"] == "cpu" else "gradient")
    score = "gm" if initial == "gradient" else "mcs"  # mcs cannot choose again what was never trained
    config = SparseletConfig(
        density=variant["density"], block_size=variant["block"], when="paper", initial_mask=initial, score=score
    )
    module = get_peft_model(model, config)
    if "initial" not in variant:
        if initial == "gradient":
            reselect(module, [batch])
        freeze_masks(module)
    return trained(module, batch)


def select(job: dict[str, Any]) -> Callable[[], Any]:
    """`reselect` on one batch, as after an ordinary step: the masks were selected before, and the values are not zero."""
    training = kept(job, build)
    if training.first is None:
        several(_phase(training))()
    return lambda: reselect(training.module, [training.batch], training.optimizer)


def selection_phase(job: dict[str, Any]) -> Callable[[], dict[str, Any]]:
    """The whole of a phase, from the first step or selection: what needs most memory."""
    training = kept(job, build)

    def start() -> dict[str, Any]:
        loss = several(_phase(training))()
        return {"first": training.first, "last": loss}

    return start


def _phase(training: Training) -> list[Callable[[], Any]]:
    def choose() -> Any:
        return reselect(training.module, [training.batch], training.optimizer)

    dense = next(iter(_layers(training))).sparse_mask[NAME].dense
    first = [training.step] if dense else []
    return [*first, choose, training.step, choose, training.step]


def part(job: dict[str, Any]) -> Callable[[], Any]:
    """One part of a step of all targets, by itself; `part` says which.

    product: the dense ∂L/∂W. gather: its masked entries. gradient: both, as the backward pass computes them. optimizer: its
    step. weights: the weights that a pass uses, all targets' once; a step builds them twice.
    """
    training = kept(job, build)
    if training.first is None:
        training.step()
    layers = list(_layers(training))
    dtype, device = layers[0].base_weight.dtype, layers[0].base_weight.device
    tokens = job["batch"] * job["tokens"]
    shapes = {layer.shape for layer in layers}
    # One tensor a shape: in training, too, a gradient is gathered from while it is still in the cache.
    dense = {shape: torch.randn(shape, device=device).to(dtype) for shape in shapes}
    passing = {n: torch.randn(tokens, n, device=device).to(dtype) for shape in shapes for n in shape}

    def product() -> None:
        for layer in layers:
            kernels.weight_gradient(passing[layer.in_features], passing[layer.out_features], layer.transposed)

    def gather() -> None:
        for layer in layers:
            kernels.gather(dense[layer.shape], layer.sparse_indices[NAME], layer.sparse_mask[NAME].block)

    def gradient() -> None:
        for layer in layers:
            x, passed = passing[layer.in_features], passing[layer.out_features]
            blocks, block = layer.sparse_indices[NAME], layer.sparse_mask[NAME].block
            kernels.masked_weight_gradient(x, passed, blocks, block, layer.transposed)

    def weights() -> None:
        for layer in layers:
            layer.effective_weight()

    assert training.optimizer is not None
    parts = {"product": product, "gather": gather, "gradient": gradient, "weights": weights}
    return {**parts, "optimizer": training.optimizer.step}[job["part"]]


def _layers(training: Training) -> Iterator[SparseletLayer]:
    return iter(sparselet_layers(training.module).values())


# Switching


def write(job: dict[str, Any]) -> Callable[[], dict[str, Any]]:
    """Two random adapters of `density`, as OUT/sparse-a and OUT/sparse-b. Returns the entries and targets of one."""
    model = make_model(job["model"], job["dtype"], job["device"])
    weights = {name: module.weight.detach() for name, module in targets(model).items()}
    fingerprints = {name: fingerprint_weight(weight) for name, weight in weights.items()}

    def start() -> dict[str, Any]:
        deltas: dict[str, SparseDelta] = {}
        for seed, name in enumerate((A, B)):
            generator = torch.Generator(job["device"]).manual_seed(seed)
            for target, weight in weights.items():
                shape = (weight.shape[0], weight.shape[1])
                indices = random_entries(shape, job["density"], generator)
                values = torch.randn(len(indices), generator=generator, device=indices.device) * 1e-3
                deltas[target] = SparseDelta(shape, indices.cpu(), values.cpu())
            SparseAdapter(deltas, {"task": f"synthetic-{name}"}, fingerprints).save(f"{job['out']}/sparse-{name}")
        return {"entries": sum(len(delta.indices) for delta in deltas.values()), "targets": len(deltas)}

    return start


@functools.cache
def plain(model: str, dtype: str, device: str, wrapped: bool) -> tuple[Any, dict[str, Tensor]]:
    """A model, and a copy of its targets' weights. One is kept to be `wrapped` by PEFT, one to stay as it is."""
    found = make_model(model, dtype, device)
    return found, {name: module.weight.detach().clone() for name, module in targets(found).items()}


@functools.cache
def resident(model: str, dtype: str, device: str, work: str) -> PeftModel:
    """A model with the adapters a (active) and b."""
    found = PeftModel.from_pretrained(plain(model, dtype, device, True)[0], f"{work}/sparse-{A}", adapter_name=A)
    found.load_adapter(f"{work}/sparse-{B}", B)
    return found


def model_of(job: dict[str, Any]) -> PeftModel:
    return resident(job["model"], job["dtype"], job["device"], job["work"])


def load_file(job: dict[str, Any]) -> Callable[[], SparseAdapter]:
    return lambda: SparseAdapter.load(f"{job['work']}/sparse-{B}")


def load(job: dict[str, Any]) -> Callable[[], Any]:
    """PEFT's `load_adapter` of a third adapter."""
    model = model_of(job)
    if NEW in model.peft_config:
        model.delete_adapter(NEW)
    return lambda: model.load_adapter(f"{job['work']}/sparse-{B}", NEW)


def merge(job: dict[str, Any]) -> Callable[[], None]:
    return swap_merged(model_of(job), (A, B))


def set_adapter(job: dict[str, Any]) -> Callable[[], None]:
    """The other adapter active; each pass then builds its weights. What is merged is taken out before the clock starts."""
    model = model_of(job)
    model.unmerge_adapter()
    return lambda: model.set_adapter(B if model.active_adapter == A else A)


def enter_and_exit(job: dict[str, Any]) -> Callable[[], None]:
    """An adapter in memory into a plain model's weights and out again, each as often as in a switch."""
    model, _ = plain(job["model"], job["dtype"], job["device"], False)
    adapter = _loaded(f"{job['work']}/sparse-{B}")

    def start() -> None:
        with apply_temporarily(model, adapter):
            pass

    return start


@functools.cache
def _loaded(path: str) -> SparseAdapter:
    return SparseAdapter.load(path)


def changed(job: dict[str, Any]) -> Callable[[], dict[str, int]]:
    """How many entries of the base weights the job `of` left different from what they were, once no adapter is resident."""
    wrapped = job["of"] != "enter and exit"
    model, before = plain(job["model"], job["dtype"], job["device"], wrapped)

    def start() -> dict[str, int]:
        if wrapped:
            model_of(job).unmerge_adapter()
        return _different(model, before)

    return start


def _different(model: Any, before: dict[str, Tensor]) -> dict[str, int]:
    bases = {name: getattr(model.get_submodule(name), "base_layer", model.get_submodule(name)) for name in before}
    return {
        "changed": sum(int((bases[name].weight != weight).sum()) for name, weight in before.items()),
        "entries": sum(weight.numel() for weight in before.values()),
    }


# Selection


def select_top(job: dict[str, Any]) -> Callable[[], Any]:
    """`top_k` of one target's scores, `top_k_global` of several."""
    scores = random_scores(job)
    k = round(job["density"] * sum(target.numel() for target in scores.values()))
    if len(scores) == 1:
        (only,) = scores.values()
        return lambda: top_k(only, k)
    return lambda: top_k_global(scores, k)


def same_top(job: dict[str, Any]) -> Callable[[], dict[str, int]]:
    """Whether what was selected has the same scores as torch.topk's choice; ties may fall elsewhere."""
    scores = random_scores(job)

    def start() -> dict[str, int]:
        found = select_top(job)()
        chosen = found if isinstance(found, dict) else dict.fromkeys(scores, found)
        ours = torch.cat([target[chosen[name]] for name, target in scores.items()]).sort(descending=True).values
        return {"same": int(torch.equal(ours, torch.topk(torch.cat(list(scores.values())), len(ours)).values))}

    return start


def masked_gradient(job: dict[str, Any]) -> Callable[[], Tensor]:
    """The masked entries of ∂L/∂W, at random blocks."""
    x, gradient = gradient_inputs(job)
    blocks, block = _blocks(tuple(job["shape"]), job["density"], job["block"], job["device"])
    return lambda: kernels.masked_weight_gradient(x, gradient, blocks, block)


def same_gradient(job: dict[str, Any]) -> Callable[[], dict[str, float]]:
    """The largest difference from the entries of the dense product, over the largest of these."""
    x, gradient = gradient_inputs(job)
    blocks, block = _blocks(tuple(job["shape"]), job["density"], job["block"], job["device"])

    def start() -> dict[str, float]:
        expected = kernels.gather((gradient.t() @ x).contiguous(), blocks, block)
        found = kernels.masked_weight_gradient(x, gradient, blocks, block)
        return {"difference": float((found - expected).abs().max() / expected.abs().max())}

    return start


@functools.cache
def _blocks(shape: tuple[int, int], density: float, block_size: BlockSize, device: str) -> tuple[Tensor, kernels.Block]:
    block = block_for(block_size, shape)
    total = shape[0] * shape[1] // (block[0] * block[1])
    chosen = torch.randperm(total, generator=torch.Generator().manual_seed(0))[: blocks_to_keep(density, total)]
    return chosen.sort().values.to(torch.int32).to(device), block


# Merging


def merge_in_memory(job: dict[str, Any]) -> Callable[[], SparseAdapter]:
    return lambda: merging.merge(job["adapters"], job["method"], parameters=job["parameters"])


def merge_to_file(job: dict[str, Any]) -> Callable[[], Path]:
    _clear(job["out"])
    return lambda: merging.merge_to(job["out"], job["adapters"], job["method"], parameters=job["parameters"])


def merge_to_checkpoint(job: dict[str, Any]) -> Callable[[], Path]:
    """What `sparselet export` does with a merge: the base model is loaded within the measurement."""
    _clear(job["out"])

    def start() -> Path:
        merged = merge_in_memory(job)()
        return export_checkpoint(load_model(job["model"]), load_tokenizer(job["model"]), merged, job["out"])

    return start


def merge_difference(job: dict[str, Any]) -> Callable[[], dict[str, float]]:
    """‖ΔW − (checkpoint − base)‖ / ‖ΔW‖ over all targets, ΔW being our merge and `checkpoint` another library's."""

    def start() -> dict[str, float]:
        theirs, base = (load_file_of(f"{directory}/model.safetensors") for directory in (job["checkpoint"], job["model"]))
        squares = [0.0, 0.0]
        for name, delta in merge_in_memory(job)().items():
            ours, change = delta.to_dense().double(), theirs[f"{name}.weight"].double() - base[f"{name}.weight"].double()
            squares[0] += float((ours - change).square().sum())
            squares[1] += float(ours.square().sum())
        return {"difference": (squares[0] / squares[1]) ** 0.5}

    return start


def _clear(directory: str) -> None:
    """Remove an output of an earlier run, and wait for the disk."""
    shutil.rmtree(directory, ignore_errors=True)
    os.sync()


JOBS = {
    "merge in memory": merge_in_memory,
    "merge to a file": merge_to_file,
    "merge to a checkpoint": merge_to_checkpoint,
    "merge difference": merge_difference,
    "step": step_job(build),
    "select": select,
    "selection phase": selection_phase,
    "part": part,
    "write": write,
    "load file": load_file,
    "load": load,
    "merge": merge,
    "set_adapter": set_adapter,
    "enter and exit": enter_and_exit,
    "changed": changed,
    "select top": select_top,
    "same top": same_top,
    "masked gradient": masked_gradient,
    "same gradient": same_gradient,
    "sparse attention": sparse_attention,
    "same attention": same_attention,
    "profile": profile,
    "route": route,
}

if __name__ == "__main__":
    serve(JOBS, ("sparselet", "torch", "transformers", "peft"))
