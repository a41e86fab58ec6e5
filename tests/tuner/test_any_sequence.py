"""Random sequences of what PEFT, torch and users do to a model, against plain dense weights.

After every step a forward pass equals that of dense weights W + ΔW, where W was kept aside and ΔW is what would be saved, and
the parameters and the state dict show W. A loss may stay alive over any number of steps: its gradients are those of dense
autograd at the weights its forward pass used.
"""

import copy
import io
import warnings

import pytest
import torch
from helpers.paper import paper_config
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from peft import PeftModel, get_peft_model
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import sparselet
from sparselet.errors import SelectionError
from sparselet.tuner import sparselet_layers

NAMES = ("a", "b", "c")
MASKS = {
    "entries": {"density": 0.3},
    "tiles": {"density": 0.3, "block_size": 2},
    "rows": {"density": 0.3, "block_size": "row"},
    "columns": {"density": 0.3, "block_size": "column"},
    "dense": {"initial_mask": "dense"},
}
TARGETS = ({"target_modules": ["0", "2"]}, {"target_modules": ["0"]}, {"target_modules": ["2"]})
X = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.05, fused=True),
    "foreach": lambda p: torch.optim.AdamW(p, lr=0.05, foreach=True),
}


def network(dtype):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4)).to(dtype)


def loss_of(model, x):
    return (model(x.to(next(model.parameters()).dtype)).float() - 1).square().mean()


def list_of_adapters(layer):
    return sorted(layer.sparse_values)


class AnySequence(RuleBasedStateMachine):
    @initialize(dtype=st.sampled_from([torch.float32, torch.bfloat16]), mask=st.sampled_from(list(MASKS)))
    def start(self, dtype, mask):
        self.base, self.count = network(dtype), 0
        self.model = get_peft_model(copy.deepcopy(self.base), self.config(mask, TARGETS[0]), adapter_name="a")
        self.active, self.merged, self.enabled = ["a"], [], True
        self.kept, self.alive = None, None

    def config(self, mask, targets):
        self.count += 1
        start = {"initial_mask": "random", "reselect_every": 0, "score": "random", "seed": self.count}
        return paper_config(**{**start, **MASKS[mask], **targets})

    # What the dense model knows

    def layers(self):
        return sparselet_layers(self.model)

    def adapters(self):
        return sorted(self.model.peft_config)

    def used(self, layer):
        """What a layer's pass uses; as with every PEFT method, where nothing is merged that is what is active."""
        here = [name for name in self.merged if name in layer.sparse_values]
        return here or [name for name in self.active if self.enabled and name in layer.sparse_values]

    def weights(self, names_of):
        """The dense weight of each target: base plus what is saved of the adapters that `names_of` gives, rounded once."""
        result = {}
        for target, layer in self.layers().items():
            weight = self.base.get_submodule(target).weight.detach()
            total = weight.to(torch.promote_types(weight.dtype, torch.float32))
            for name in names_of(layer):
                total = total + layer.delta(name).to_dense()
            result[f"{target}.weight"] = total.to(weight.dtype)
        return result

    def values(self):
        return [layer.sparse_values[n] for layer in self.layers().values() for n in self.used(layer)]

    def learns(self):
        return not self.merged and any(value.requires_grad for value in self.values())

    # Adapters

    @rule(name=st.sampled_from(NAMES), mask=st.sampled_from(list(MASKS)), place=st.sampled_from(TARGETS))
    def add(self, name, mask, place):
        if name not in self.adapters():
            self.model.add_adapter(name, self.config(mask, place))
            self.merged = []  # PEFT's rule for every method
            for layer in self.layers().values():
                if name in layer.sparse_values:
                    with torch.no_grad():
                        layer.sparse_values[name].normal_(std=0.3)

    @rule(names=st.lists(st.sampled_from(NAMES), min_size=1, unique=True))
    def switch(self, names):
        names = [name for name in names if name in self.adapters()]
        if names:
            self.model.base_model.set_adapter(names)
            self.active, self.merged = names, []

    @precondition(lambda self: not self.merged and len(self.adapters()) > 1)
    @rule(name=st.sampled_from(NAMES))
    def delete(self, name):
        if name in self.adapters() and name not in self.active:
            self.model.delete_adapter(name)
            self.kept = None

    @rule(on=st.booleans())
    def enable(self, on):
        if on:
            self.model.base_model.enable_adapter_layers()
        else:
            self.model.base_model.disable_adapter_layers()
            self.merged = []
        self.enabled = on

    @precondition(lambda self: self.enabled)
    @rule(names=st.lists(st.sampled_from(NAMES), unique=True))
    def merge(self, names):
        names = [name for name in names if name in self.adapters()] or list(self.active)
        self.model.merge_adapter(names)
        self.merged += [name for name in names if name not in self.merged]

    @rule()
    def unmerge(self):
        self.model.unmerge_adapter()
        self.merged = []

    @rule()
    def ask_the_reference(self):
        """The pass of a DPO reference; it ends what is merged, as for every PEFT method."""
        with torch.no_grad(), self.model.disable_adapter():
            assert torch.equal(self.model(X.to(self.base[0].weight.dtype)), self.base(X.to(self.base[0].weight.dtype)))
        self.merged = []

    # Edits

    @precondition(lambda self: not self.merged)
    @rule(how=st.sampled_from(["add", "data", "new data", "vector", "swap"]), by=st.floats(-1, 1))
    def edit(self, how, by):
        parameters = [p for n, p in self.model.named_parameters() if "sparse_values" in n]
        if how == "vector":
            vector_to_parameters(parameters_to_vector(parameters).detach() * by, parameters)
            return
        for parameter in parameters:
            if how == "add":
                with torch.no_grad():
                    parameter.add_(by)
            elif how == "data":
                parameter.data.mul_(by)
            elif how == "new data":
                parameter.data = torch.full_like(parameter, by)
            elif parameter.ndim == 1:
                parameter.data = parameter.data.flip(0)

    @precondition(lambda self: not self.merged)
    @rule(by=st.floats(-0.1, 0.1))
    def edit_the_base(self, by):
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if "base_layer.weight" in name:
                    target = name.removeprefix("base_model.model.").removesuffix(".base_layer.weight")
                    parameter.add_(by)
                    self.base.get_submodule(target).weight.add_(by)
        if self.alive is not None:
            self.alive = (*self.alive[:2], "base")

    @precondition(learns)
    @rule(kind=st.sampled_from(list(OPTIMIZERS)))
    def step(self, kind):
        optimizer = OPTIMIZERS[kind](self.values())
        optimizer.zero_grad()
        loss_of(self.model, X).backward()
        optimizer.step()

    @precondition(learns)
    @rule()
    def step_in_backward(self):
        steps = {p: torch.optim.SGD([p], lr=0.05) for p in self.values()}
        hooks = [p.register_post_accumulate_grad_hook(lambda p: steps[p].step()) for p in steps]
        self.model.zero_grad()
        loss_of(self.model, X).backward()
        for hook in hooks:
            hook.remove()

    @precondition(lambda self: self.learns() and len(self.active) == 1)
    @rule()
    def select(self):
        sparselet.reselect(self.model, [X], loss=loss_of)
        self.alive = None

    # A loss that stays alive

    @precondition(learns)
    @rule()
    def forward(self):
        weights = {name: weight.requires_grad_() for name, weight in self.weights(self.used).items()}
        x = X.to(self.base[0].weight.dtype)
        dense = (torch.func.functional_call(self.base, weights, (x,)).float() - 1).square().mean()
        gradients = dict(zip(weights, torch.autograd.grad(dense, list(weights.values())), strict=True))
        expected = []
        for target, layer in self.layers().items():
            for name in self.used(layer):
                if layer.sparse_values[name].requires_grad:
                    blocks = None if layer.sparse_mask[name].dense else layer.sparse_indices[name].clone()
                    expected.append((layer, name, blocks, gradients[f"{target}.weight"]))
        loss = loss_of(self.model, X)
        assert torch.equal(loss, dense)
        self.alive = (loss, expected, None)

    @precondition(lambda self: self.alive is not None)
    @rule()
    def backward(self):
        (loss, expected, broken), self.alive = self.alive, None
        self.model.zero_grad()
        moved = any(name not in layer.sparse_values for layer, name, _, _ in expected)
        dense = any(blocks is None for _, _, blocks, _ in expected)
        try:
            loss.backward()
        except SelectionError:
            if not (broken or moved or dense):
                raise
            self.model.zero_grad()
            return
        assert not broken
        for layer, name, blocks, gradient in expected:
            value = layer.sparse_values[name]
            if not value.requires_grad:  # switched off meanwhile: torch drops the gradient of any such leaf
                continue
            wanted = gradient if blocks is None else sparselet.kernels.gather(gradient, blocks, layer.sparse_mask[name].block)
            torch.testing.assert_close(value.grad, wanted.to(value.dtype), rtol=2e-2, atol=2e-3)
        self.model.zero_grad()

    # Copies and files

    @rule()
    def copy_the_model(self):
        self.alive, self.model = None, copy.deepcopy(self.model)

    @precondition(lambda self: not self.merged)
    @rule()
    def keep_the_state(self):
        state = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self.kept = (state, copy.deepcopy(self.base), self.adapters(), self.weights(list_of_adapters))

    @precondition(lambda self: not self.merged and self.kept is not None)
    @rule()
    def put_the_state_back(self):
        state, base, adapters, weights = self.kept
        if adapters == self.adapters() and state.keys() == self.model.state_dict().keys():
            self.model.load_state_dict(state)
            self.base, self.alive = copy.deepcopy(base), None
            assert all(torch.equal(self.weights(list_of_adapters)[name], weight) for name, weight in weights.items())

    @precondition(lambda self: not self.merged)
    @rule()
    def pickle_the_state(self):
        file = io.BytesIO()
        torch.save(self.model.state_dict(), file)
        file.seek(0)
        other = copy.deepcopy(self.model)
        for parameter in other.parameters():
            parameter.data.zero_()
        other.load_state_dict(torch.load(file, weights_only=True))
        x = X.to(self.base[0].weight.dtype)
        assert torch.equal(other(x), self.model(x))

    # What holds

    @invariant()
    def a_pass_uses_base_and_changes(self):
        dtype = self.base[0].weight.dtype
        expected = torch.func.functional_call(self.base, self.weights(self.used), (X.to(dtype),))
        with torch.no_grad():
            assert torch.equal(self.model(X.to(dtype)), expected)

    @invariant()
    def the_base_is_shown(self):
        shown = self.weights(lambda layer: [name for name in self.merged if name in layer.sparse_values])
        state = self.model.state_dict()
        parameters = dict(self.model.named_parameters())
        for target in self.layers():
            name = f"base_model.model.{target}.base_layer.weight"
            assert torch.equal(parameters[name], shown[f"{target}.weight"])
            assert torch.equal(state[name], shown[f"{target}.weight"])


@pytest.mark.filterwarnings("ignore")
def test_any_sequence_of_calls_is_that_of_dense_weights():
    quick = settings(max_examples=200, stateful_step_count=12, deadline=None, suppress_health_check=list(HealthCheck))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = AnySequence.TestCase()
        run.settings = quick
        run.runTest()


def test_what_was_saved_answers_as_the_model(tmp_path):
    model = get_peft_model(
        network(torch.float32), paper_config(target_modules=["0", "2"], initial_mask="random", reselect_every=0)
    )
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.fill_(0.25)
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(network(torch.float32), tmp_path)(X), model(X))
