"""Several processes: what is refused."""

import os

import torch
from accelerate.state import AcceleratorState, is_initialized
from accelerate.utils import DistributedType
from torch import nn
from transformers import TrainingArguments

from sparselet.errors import ConfigError, SelectionError
from sparselet.tuner.distributed import wrappers
from sparselet.tuner.layer import is_sharded

ELSEWHERE = {
    DistributedType.FSDP: "FSDP",
    DistributedType.DEEPSPEED: "DeepSpeed",
    DistributedType.MEGATRON_LM: "Megatron-LM",
}


def refuse_several() -> None:
    """Raise ConfigError in one of several processes, as torchrun and `accelerate launch` start them, or on several devices."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1:
        raise ConfigError(
            f"a run writes its output and checkpoints from one process, but there are {processes} (WORLD_SIZE). Start it "
            "without torchrun, or train over several processes with a transformers Trainer and sparselet.MaskSchedule()."
        )
    devices = torch.cuda.device_count()
    if devices > 1:
        raise ConfigError(
            f"a run trains on one device, but {devices} are visible, over which transformers copies the model in every step "
            "(DataParallel). Choose one: CUDA_VISIBLE_DEVICES=0."
        )


def refuse_sharding(args: TrainingArguments, model: nn.Module) -> None:
    """Raise SelectionError where no process holds the whole model and its optimizer, or one process several copies."""
    kind = ELSEWHERE.get(AcceleratorState().distributed_type) if is_initialized() else None
    if args.fsdp:
        kind = "FSDP"
    elif args.deepspeed:
        kind = "DeepSpeed"
    elif any(is_sharded(parameter) for parameter in model.parameters()):
        kind = "a model of sharded tensors (DTensor)"
    elif args.n_gpu > 1:
        kind = f"DataParallel over {args.n_gpu} devices in one process"
    if kind is not None:
        raise SelectionError(
            f"sparse adapters cannot be trained with {kind}: their values are written into whole weights, in place, and masks "
            "change the size of what is trained. Use DistributedDataParallel, which each process of `torchrun "
            "--nproc-per-node N` gets where neither fsdp nor deepspeed is set, or one process with one device "
            "(CUDA_VISIBLE_DEVICES=0)."
        )


def selected_on(args: TrainingArguments, model: nn.Module) -> list[nn.Module]:
    """What masks are selected on: the model itself, or where there are processes each DistributedDataParallel around it.

    There is more than one if Trainers before have wrapped the model too. Raises SelectionError if there is none.
    """
    if args.world_size == 1:
        return [model]
    found = wrappers(model)
    if not found:
        raise SelectionError(
            f"there are {args.world_size} processes, but no DistributedDataParallel around the model, the only way in which "
            "masks can be selected over several. Start the Trainer with torchrun, without another kind of parallelism."
        )
    return list(found)
