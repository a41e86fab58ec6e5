"""Short runs that are made in one process and in two, and compared. Started by torchrun, writes what each rank has."""

import contextlib
import gc
import json
import sys
from dataclasses import replace
from pathlib import Path

import safetensors.torch
import torch
import torch.distributed as dist
from helpers.paper import PAPER, paper_config
from helpers.tiny import make_adapter, make_model, save_base, save_task
from helpers.training_runs import QUIET, StopAt
from peft import PeftModel, get_peft_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from sparselet import MaskSchedule, freeze_masks, reselect, to_adapter
from sparselet.training import TrainSettings, train
from sparselet.tuner import scorer, sparselet_layers
from sparselet.tuner.distributed import broadcast_masks

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
        model = get_peft_model(model, paper_config(**{"density": 0.1, "reselect_every": 2, **adapter}))
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
    model = get_peft_model(make_model(), paper_config(density=0.1, score="mcs_neg"))
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


def unlike_start(directory, processes=1):
    """Another base model and another mask on the second process, to which DistributedDataParallel gives those of the first."""
    seed = dist.get_rank() if processes > 1 else 0
    adapter = paper_config(density=0.1, initial_mask="random", score="mcs_neg", seed=seed)
    model = get_peft_model(make_model(seed=seed), adapter)
    make_trainer(directory, {}, {}, processes, model=model, callbacks=[MaskSchedule()]).train()
    return tensors(to_adapter(model))


def sharded_by_hand(directory, processes=1):
    """FSDP2, with masks that do not move; all processes take the same rows."""
    model = get_peft_model(make_model(), paper_config(initial_mask="random", reselect_every=0))
    freeze_masks(model)
    if processes > 1:
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids = torch.arange(2, 12).reshape(1, 10)
    for _ in range(3):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    return tensors(to_adapter(model))


def unlike_graphs(directory, processes=1):
    """A loss that uses the targets in another order on the second process, and one of them not at all."""
    model = get_peft_model(make_model(), paper_config(density=0.1, score="gm"))
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
    model = get_peft_model(make_model(), paper_config(density=0.1, score="gm"))

    def loss(model, batch):
        return model(input_ids=batch["ids"], labels=batch["ids"]).loss

    wrapped, averaged = DistributedDataParallel(model) if processes > 1 else model, scorer.average
    if processes > 1 and dist.get_rank():
        scorer.average = lambda gradient, group: gradient.copy_(averaged(gradient, group).flip(0))
    try:
        reselect(wrapped, [{"ids": torch.arange(2, 12).reshape(1, 10)}], loss=loss)
    finally:
        scorer.average = averaged
    return tensors(to_adapter(model))


def unlike_masks(directory, processes=1):
    """Of unlike sizes too."""
    rank = dist.get_rank() if processes > 1 else 0
    masks = {"a": torch.arange(3) + rank, "b": torch.arange(2 + rank), "c": torch.arange(rank)}
    return masks if processes == 1 else broadcast_masks(masks, torch.device("cpu"), dist.group.WORLD)


def prepared(directory, processes=1, **changes):
    """Settings of a run on 13 rows, 4 a step, so that in the last one the second process has none; models made once."""
    if processes == 1 or dist.get_rank() == 0:
        save_base(directory / "base")
        save_task(directory / "task", train=13, validation=5)
        save_task(directory / "other", train=7, validation=3)
        make_adapter(make_model()).save(directory / "start")
        make_adapter(make_model(), density=0.5).save(directory / "core")
    if processes > 1:
        dist.barrier()
    paths = {"model": str(directory / "base"), "task": str(directory / "task")}
    if "init_from" in changes:
        changes["init_from"] = str(directory / changes["init_from"])
    if "freeze" in changes:
        changes["freeze"] = (str(directory / changes["freeze"]),)
    if changes.get("method") == "multitask":
        paths["task"] = (str(directory / "task"), str(directory / "other"))
    common = {"epochs": 2, "batch_size": 4, "learning_rate": 5e-3, "chat_template": False}
    if changes.get("method", "sparse") == "sparse" and "init_from" not in changes:
        common |= PAPER
    return TrainSettings(**{**paths, **common, **changes})


def written(directory):
    """What `train` wrote, and the losses it recorded."""
    record = json.loads((directory / "out" / "run.json").read_text())
    losses = [entry[key] for entry in record["history"] for key in ("loss", "eval_loss") if key in entry]
    found = {"losses": torch.tensor(losses)}
    for file in sorted((directory / "out").glob("*.safetensors")):
        found |= {f"{file.name}.{name}": tensor for name, tensor in safetensors.torch.load_file(file).items()}
    return found


def recipe(directory, processes=1, **changes):
    """`sparselet.train`."""
    settings = prepared(directory, processes, **changes)
    train(settings, directory / "out")
    return written(directory)


def recipe_resumed(directory, processes=1):
    """Interrupted in all processes, and gone on with."""
    settings = prepared(directory, processes, method="sparse", score="mcs_neg", save_steps=2, patience=2)
    with contextlib.suppress(KeyboardInterrupt):
        train(settings, directory / "out", callbacks=[StopAt(5)])
    assert not (directory / "out").exists()
    train(settings, directory / "out", resume=True)
    assert not list(directory.glob("*.partial"))
    return written(directory)


TRAINED = {
    "sparse": {"score": "mcs_neg"},
    "sparse-accumulation": {"score": "gm", "initial_mask": "gradient", "gradient_accumulation": 2, "patience": 1},
    "lora": {"method": "lora", "lora_rank": 2, "gradient_accumulation": 2},
    "full": {"method": "full", "learning_rate": 1e-3, "gradient_checkpointing": True},
    "full-qkv": {"method": "full-qkv"},
    "multitask": {"method": "multitask", "learning_rate": 1e-3},
    "second-stage": {"init_from": "start"},
    "frozen": {"method": "full-qkv", "freeze": "core", "weight_decay": 0.1, "profile": False},
    "frozen-entries": {"init_from": "core", "freeze": "start", "weight_decay": 0.1, "profile": False},
}

RUNS = {case: lambda directory, processes=1, case=case: run(case, directory, processes) for case in CASES}
RUNS |= {"own-loop": own_loop, "resumed": resumed, "trained-before": trained_before}
RUNS |= {"unlike-start": unlike_start, "sharded-by-hand": sharded_by_hand}
RUNS |= {"unlike-graphs": unlike_graphs, "unlike-scores": unlike_scores, "unlike-masks": unlike_masks}
RUNS |= {
    f"train-{name}": lambda directory, processes=1, changes=changes: recipe(directory, processes, **changes)
    for name, changes in TRAINED.items()
}
RUNS |= {"train-resumed": recipe_resumed}


# What is refused


def fsdp(directory):
    make_trainer(directory, {}, {"fsdp": "full_shard"}, 2, callbacks=[MaskSchedule()])


def sharded_selection(directory):
    model = get_peft_model(make_model(), paper_config())
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    reselect(model, [])


def own_group(directory):
    group = dist.new_group([0, 1])
    model = get_peft_model(make_model(), paper_config())
    reselect(DistributedDataParallel(model, process_group=group), [])


def static_graph(directory):
    make_trainer(directory, {}, {"ddp_static_graph": True}, 2, callbacks=[MaskSchedule()]).train()


def communication_hook(directory):
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    wrapper = DistributedDataParallel(get_peft_model(make_model(), paper_config()))
    wrapper.register_comm_hook(dist.group.WORLD, allreduce_hook)
    reselect(wrapper, [])


def no_wrapper(directory):
    trainer = make_trainer(directory, {}, {}, 2)
    model = get_peft_model(make_model(), paper_config())
    MaskSchedule().on_train_begin(trainer.args, trainer.state, trainer.control, model=model)


def fewer_rows_than_processes(directory):
    schedule = MaskSchedule(rows=lambda step: [0])
    make_trainer(directory, {"initial_mask": "gradient", "score": "gm"}, {}, 2, callbacks=[schedule]).train()


def unused_target(directory):
    wrapper = DistributedDataParallel(get_peft_model(make_model(), paper_config()))

    def loss(model, batch):
        return (
            model.base_model.model.model.embed_tokens(batch["ids"]).sum()
            + model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")(torch.ones(1, 16)).sum()
        )

    reselect(wrapper, [{"ids": torch.tensor([[3]])}], loss=loss)


def batch_not_divided(directory):
    train(TrainSettings(model="none", task="none", batch_size=6, gradient_accumulation=2), directory / "out")


def output_exists(directory):
    directory.mkdir(exist_ok=True)
    (directory / "out").write_text("of another run")
    dist.barrier()
    train(TrainSettings(model="none", task="none"), directory / "out")


def task_of_one_process(directory):
    settings = prepared(directory, 2)
    if dist.get_rank():
        settings = replace(settings, task=str(directory / "nowhere"))
    train(settings, directory / "out")


def other_settings(directory):
    train(replace(prepared(directory, 2), seed=dist.get_rank()), directory / "out")


REFUSED = (batch_not_divided, output_exists, task_of_one_process, other_settings)
REFUSED += (fsdp, sharded_selection, own_group, static_graph, communication_hook)
REFUSED += (no_wrapper, fewer_rows_than_processes, unused_target)


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
