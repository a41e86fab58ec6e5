"""Short runs that are made in one process and in two, and compared. Started by torchrun, writes what each rank has."""

import gc
import json
import sys
from pathlib import Path

import safetensors.torch
import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model
from runs import QUIET
from tiny import make_model
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from sparselet import MaskSchedule, SparseletConfig, freeze_masks, reselect, to_adapter
from sparselet.training import TrainSettings, train
from sparselet.tuner import selection, sparselet_layers
from sparselet.tuner.distributed import first_masks

# The adapter's configuration, then the Trainer's arguments.
CASES: dict[str, tuple[dict, dict]] = {
    "dense": ({"score": "mcs"}, {"max_grad_norm": 0.02}),
    "dense-tiles": ({"score": "mcs_neg", "block_size": 4}, {}),
    "dense-accumulation": (
        {"score": "mcs_neg", "modules_to_save": ["lm_head"]},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1, "max_grad_norm": 0.05},
    ),
    "dense-batches": ({"score": "cs", "score_batches": 3}, {"optim": "sgd", "learning_rate": 0.5}),
    "gradient": ({"score": "gm", "initial_mask": "gradient"}, {}),
    "gradient-tiles": (
        {"score": "gm", "initial_mask": "gradient", "block_size": 4},
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}},
    ),
    "layer-drop": (
        {"score": "gm", "scope": "global", "layer_drop": True, "density": 0.005},
        {"ddp_find_unused_parameters": False},
    ),
    "random": ({"score": "random", "initial_mask": "random", "reselect_every": 1}, {}),
}


class Rows(Dataset):
    """16 rows of unlike lengths, of whose labels unlike numbers are counted."""

    def __init__(self):
        generator = torch.Generator().manual_seed(3)
        self.rows = []
        for i in range(16):
            ids = torch.randint(2, 258, (4 + i % 7,), generator=generator)
            labels = ids.clone()
            labels[: 1 + i % 3] = -100
            self.rows.append((ids, labels))

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, row):
        return self.rows[row]


def collate(rows):
    def padded(tensors, value):
        return torch.nn.utils.rnn.pad_sequence(list(tensors), batch_first=True, padding_value=value)

    ids, labels = zip(*rows, strict=True)
    mask = padded([torch.ones_like(i) for i in ids], 0)
    return {"input_ids": padded(ids, 0), "attention_mask": mask, "labels": padded(labels, -100)}


class Masks(TrainerCallback):
    """The masks after each step, as one tensor a step; comes after the schedule."""

    def __init__(self):
        self.steps = {}

    def on_step_end(self, args, state, control, model, **kwargs):
        layers = sparselet_layers(model).values()
        self.steps[f"step.{state.global_step}"] = torch.cat([layer.sparse_indices["default"].long() for layer in layers])


def make_trainer(directory, adapter, arguments, processes=1, model=None, **more):
    """A Trainer over 4 rows a step (or more, accumulated), of which each process takes its share."""
    model = model or make_model()
    if not isinstance(model, PeftModel):
        model = get_peft_model(model, SparseletConfig(**{"density": 0.1, "reselect_every": 2, **adapter}))
    rows = arguments.get("per_device_train_batch_size", 2) * 2 // processes
    arguments = {
        **QUIET,
        "output_dir": str(directory / "trainer"),
        **arguments,
        "per_device_train_batch_size": rows,
    }
    if processes > 1:
        arguments["ddp_backend"] = "gloo"
    return Trainer(model=model, args=TrainingArguments(**arguments), train_dataset=Rows(), data_collator=collate, **more)


def tensors(adapter):
    """Masks and values of an adapter by name."""
    return {f"{name}.{part}": getattr(delta, part) for name, delta in adapter.items() for part in ("indices", "values")}


def run(case, directory, processes=1):
    """Train, and return masks by step, then masks and values in the end."""
    masks = Masks()
    trainer = make_trainer(directory, *CASES[case], processes, callbacks=[MaskSchedule(), masks])
    trainer.train()
    adapter = to_adapter(trainer.model)
    return masks.steps | tensors(adapter) | {f"module.{name}": tensor for name, tensor in adapter.modules.items()}


def own_loop(directory, processes=1):
    """A loop without a Trainer; all rows have the same number of labels, and each process takes every second one."""
    model = get_peft_model(make_model(), SparseletConfig(density=0.1, score="mcs_neg"))
    rank = dist.get_rank() if processes > 1 else 0
    wrapped = DistributedDataParallel(model) if processes > 1 else model
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids = torch.randint(2, 258, (10, 4, 6), generator=torch.Generator().manual_seed(1))
    for step in range(8):
        batch = ids[step, rank::processes]
        wrapped(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step in (2, 4):
            batch = ids[8, rank::processes]
            reselect(wrapped, [{"input_ids": batch, "labels": batch}], optimizer)
    freeze_masks(model)
    return tensors(to_adapter(model))


def resumed(directory, processes=1):
    """Gone on with from a checkpoint of the selection phase."""
    adapter = {"score": "mcs_neg"}
    saving = {"save_strategy": "steps", "save_steps": 3}
    make_trainer(directory, adapter, saving, processes, callbacks=[MaskSchedule()]).train()
    trainer = make_trainer(directory, adapter, saving, processes, callbacks=[MaskSchedule()])
    trainer.train(resume_from_checkpoint=str(directory / "trainer" / "checkpoint-3"))
    return tensors(to_adapter(trainer.model))


def trained_before(directory, processes=1):
    """By another Trainer, which is still there and has wrapped the same model, with no mask selected."""
    before = make_trainer(directory, {"score": "gm"}, {"max_steps": 2}, processes)
    before.train()
    trainer = make_trainer(directory, {}, {}, processes, model=before.model, callbacks=[MaskSchedule()])
    trainer.train()
    assert before.state.global_step == 2
    return tensors(to_adapter(trainer.model))


def unlike_graphs(directory, processes=1):
    """A loss that uses the targets in another order on the second process, and one of them not at all."""
    model = get_peft_model(make_model(), SparseletConfig(density=0.1, score="gm"))
    layers = list(sparselet_layers(model).values())

    def loss(model, batch):
        x = torch.randn(3, 16, generator=torch.Generator().manual_seed(batch["process"]))
        order = layers[-2::-1] if batch["process"] else layers
        return sum((layer(x) ** 2).sum() for layer in order)

    own = [0, 1] if processes == 1 else [dist.get_rank()]
    wrapped = DistributedDataParallel(model) if processes > 1 else model
    reselect(wrapped, [{"process": number} for number in own], loss=loss)
    return tensors(to_adapter(model))


def unlike_scores(directory, processes=1):
    """As if the second process had averaged to something else."""
    model = get_peft_model(make_model(), SparseletConfig(density=0.1, score="gm"))

    def loss(model, batch):
        return model(input_ids=batch["ids"], labels=batch["ids"]).loss

    wrapped, averaged = DistributedDataParallel(model) if processes > 1 else model, selection.average
    if processes > 1 and dist.get_rank():
        selection.average = lambda gradient, group: gradient.copy_(averaged(gradient, group).flip(0))
    try:
        reselect(wrapped, [{"ids": torch.arange(2, 12).reshape(1, 10)}], loss=loss)
    finally:
        selection.average = averaged
    return tensors(to_adapter(model))


def unlike_masks(directory, processes=1):
    """Of unlike sizes too."""
    rank = dist.get_rank() if processes > 1 else 0
    masks = {"a": torch.arange(3) + rank, "b": torch.arange(2 + rank), "c": torch.arange(rank)}
    return masks if processes == 1 else first_masks(masks, torch.device("cpu"), dist.group.WORLD)


RUNS = {case: lambda directory, processes=1, case=case: run(case, directory, processes) for case in CASES}
RUNS |= {"own-loop": own_loop, "resumed": resumed, "trained-before": trained_before}
RUNS |= {"unlike-graphs": unlike_graphs, "unlike-scores": unlike_scores, "unlike-masks": unlike_masks}


# What is refused


def another_base(directory):
    make_trainer(directory, {}, {}, 2, model=make_model(seed=dist.get_rank()), callbacks=[MaskSchedule()]).train()


def other_masks(directory):
    adapter = {"initial_mask": "random", "score": "gm", "seed": dist.get_rank()}
    make_trainer(directory, adapter, {}, 2, callbacks=[MaskSchedule()]).train()


def fsdp(directory):
    make_trainer(directory, {}, {"fsdp": "full_shard"}, 2, callbacks=[MaskSchedule()])


def fsdp2_by_hand(directory):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = get_peft_model(make_model(), SparseletConfig(initial_mask="random", reselect_every=0))
    freeze_masks(model)
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids = torch.arange(2, 12).reshape(1, 10)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()


def own_group(directory):
    group = dist.new_group([0, 1])
    model = get_peft_model(make_model(), SparseletConfig())
    reselect(DistributedDataParallel(model, process_group=group), [])


def static_graph(directory):
    make_trainer(directory, {}, {"ddp_static_graph": True}, 2, callbacks=[MaskSchedule()]).train()


def communication_hook(directory):
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    wrapper = DistributedDataParallel(get_peft_model(make_model(), SparseletConfig()))
    wrapper.register_comm_hook(dist.group.WORLD, allreduce_hook)
    reselect(wrapper, [])


def no_wrapper(directory):
    trainer = make_trainer(directory, {}, {}, 2)
    model = get_peft_model(make_model(), SparseletConfig())
    MaskSchedule().on_train_begin(trainer.args, trainer.state, trainer.control, model=model)


def fewer_rows_than_processes(directory):
    schedule = MaskSchedule(rows=lambda step: [0])
    make_trainer(directory, {"initial_mask": "gradient", "score": "gm"}, {}, 2, callbacks=[schedule]).train()


def unused_target(directory):
    wrapper = DistributedDataParallel(get_peft_model(make_model(), SparseletConfig()))

    def loss(model, batch):
        return (
            model.base_model.model.model.embed_tokens(batch["ids"]).sum()
            + model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")(torch.ones(1, 16)).sum()
        )

    reselect(wrapper, [{"ids": torch.tensor([[3]])}], loss=loss)


def recipe(directory):
    train(TrainSettings(model="none", task="none"), directory / "out")


REFUSED = (another_base, other_masks, fsdp, fsdp2_by_hand, own_group, static_graph, communication_hook)
REFUSED += (no_wrapper, fewer_rows_than_processes, unused_target, recipe)


def main(directory):
    torch.set_num_threads(1)
    gc.freeze()  # each Trainer collects garbage, which takes longer than the training here
    TrainingArguments(output_dir=str(directory), use_cpu=True, ddp_backend="gloo").device  # noqa: B018 (joins the group)
    rank, messages = dist.get_rank(), {}
    for name, make in RUNS.items():
        safetensors.torch.save_file(make(directory / name, 2), directory / f"{name}.{rank}.safetensors")
    for refused in REFUSED:
        try:
            refused(directory / refused.__name__)
        except Exception as error:
            messages[refused.__name__] = f"{type(error).__name__}: {error}"
        dist.barrier()
    (directory / f"messages.{rank}.json").write_text(json.dumps(messages))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
