"""What PEFT's methods do: steps of LoRA, SHiRA and Super-Tuning; loading, merging and hot-swapping LoRA."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, PeftModel, ShiraConfig, SupertuningConfig, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from racing.worker import serve

from contestants.models import equal_rank, make_model, target_names, targets
from contestants.steps import Training, model_and_batch, step_job, swap_merged, trained

A, B, NEW = "a", "b", "new"


def build(job: dict[str, Any]) -> Training:
    """One of PEFT's methods on the targets, with its defaults but for what makes it as large as asked."""
    model, batch = model_and_batch(job)
    variant, names = job["variant"], target_names(model)
    if variant["kind"] == "lora":
        config = LoraConfig(r=variant["rank"], target_modules=names)
    elif variant["kind"] == "shira":  # r(m + n) numbers a target
        config = ShiraConfig(r=equal_rank(model, variant["density"]), target_modules=names)
        config.mask_fn = random_mask
    else:
        config = SupertuningConfig(sparsity=1 - variant["density"], target_modules=names)
    return trained(get_peft_model(model, config), batch)


def random_mask(base_layer: Any, r: int, random_seed: int | None = None, **_: Any) -> torch.Tensor:
    """Exactly r(m + n) ones. SHiRA's own shuffles all entries on the CPU, which takes a minute for a model of billions."""
    weight = base_layer.weight
    count = r * sum(weight.shape)
    mask = torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device)
    mask[torch.rand(weight.numel(), device=weight.device).topk(count).indices] = True
    return mask.view(weight.shape)


def write(job: dict[str, Any]) -> Callable[[], None]:
    """Two LoRA adapters of `rank` with random A and B, as OUT/lora-a and OUT/lora-b."""

    def start() -> None:
        for seed, name in enumerate((A, B)):
            torch.manual_seed(seed)
            model = make_model(job["model"], job["dtype"], job["device"])
            config = LoraConfig(r=job["rank"], target_modules=target_names(model), init_lora_weights=False)
            get_peft_model(model, config).save_pretrained(f"{job['out']}/lora-{name}")

    return start


@functools.cache
def resident(model: str, dtype: str, device: str, work: str, merging: bool) -> tuple[PeftModel, dict[str, torch.Tensor]]:
    """A model with the adapters a (active) and b, and a copy of its targets' base weights. One is kept for merging alone."""
    plain = make_model(model, dtype, device)
    before = {name: module.weight.detach().clone() for name, module in targets(plain).items()}
    found = PeftModel.from_pretrained(plain, f"{work}/lora-{A}", adapter_name=A)
    found.load_adapter(f"{work}/lora-{B}", B)
    return found, before


def resident_of(job: dict[str, Any]) -> tuple[PeftModel, dict[str, torch.Tensor]]:
    merging = "merge" in (job["do"], job.get("of"))
    return resident(job["model"], job["dtype"], job["device"], job["work"], merging)


def model_of(job: dict[str, Any]) -> PeftModel:
    return resident_of(job)[0]


def load(job: dict[str, Any]) -> Callable[[], Any]:
    """`load_adapter` of a third adapter."""
    model = model_of(job)
    if NEW in model.peft_config:
        model.delete_adapter(NEW)
    return lambda: model.load_adapter(f"{job['work']}/lora-{B}", NEW)


def merge(job: dict[str, Any]) -> Callable[[], None]:
    return swap_merged(model_of(job), (A, B))


def set_adapter(job: dict[str, Any]) -> Callable[[], None]:
    """The other adapter beside the weights; forward passes then go through A and B, whichever it is."""
    model = model_of(job)
    return lambda: model.set_adapter(B if model.active_adapter == A else A)


def hotswap(job: dict[str, Any]) -> Callable[[], None]:
    """Adapter a overwritten with the file of b: reading included, the weights stay unmerged."""
    model = model_of(job)
    return lambda: hotswap_adapter(model, f"{job['work']}/lora-{B}", A, torch_device=job["device"])


def changed(job: dict[str, Any]) -> Callable[[], dict[str, int]]:
    """How many entries of the base weights the job `of` left different from what they were, once no adapter is merged."""
    model, before = resident_of(job)

    def start() -> dict[str, int]:
        if any(module.merged_adapters for module in _layers(model)):
            model.unmerge_adapter()
        layers = {name.removesuffix(".base_layer"): m for name, m in _base(model).items()}
        return {
            "changed": sum(int((layers[name].weight != weight).sum()) for name, weight in before.items()),
            "entries": sum(weight.numel() for weight in before.values()),
        }

    return start


@functools.cache
def with_adapters(model: str, rank: int, adapters: int) -> PeftModel:
    """A model with random LoRA adapters expert-0, expert-1, …; scale 1."""
    torch.manual_seed(0)
    plain = make_model(model, "float32", "cpu")
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=target_names(plain), init_lora_weights=False)
    wrapped = get_peft_model(plain, config, adapter_name="expert-0")
    for i in range(1, adapters):
        wrapped.add_adapter(f"expert-{i}", config)
    return wrapped


def add_weighted_adapter(job: dict[str, Any]) -> Callable[[], None]:
    """A merge of LoRA adapters that are loaded already. The weights are 1 each, beside the method's own parameters."""
    names = [f"expert-{i}" for i in range(len(job["adapters"]))]
    model = with_adapters(job["model"], job["rank"], len(names))
    if "merged" in model.peft_config:
        model.delete_adapter("merged")
    more = {"combination_type": job["method"], **job["parameters"]}
    return lambda: model.add_weighted_adapter(names, [1.0] * len(names), "merged", **more)


def _layers(model: PeftModel) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "merged_adapters")]


def _base(model: PeftModel) -> dict[str, Any]:
    found = model.get_base_model().named_modules()
    return {name: module for name, module in found if name.endswith(".base_layer")}


JOBS = {
    "step": step_job(build),
    "write": write,
    "load": load,
    "merge": merge,
    "set_adapter": set_adapter,
    "hotswap": hotswap,
    "changed": changed,
    "merge in memory": add_weighted_adapter,
}

if __name__ == "__main__":
    serve(JOBS, ("torch", "transformers", "peft"))
