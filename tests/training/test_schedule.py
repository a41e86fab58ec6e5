"""`MaskSchedule` in a plain transformers `Trainer`: when masks are selected, on what, and what it leaves alone."""

import itertools
import logging
import re
from types import SimpleNamespace

import pytest
import torch
from helpers.paper import paper_config
from helpers.tiny import make_model
from helpers.training_runs import QUIET
from peft import LoraConfig, get_peft_model
from torch.utils.data import Dataset, IterableDataset
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator

from sparselet import MaskSchedule, freeze_masks, reselect, to_adapter
from sparselet.errors import SelectionError
from sparselet.tuner import sparselet_layers
from sparselet.tuner.mask_state import seeded

ROWS = 24


class Tokens(Dataset):
    """Rows of random tokens; the first token of row i is i."""

    def __init__(self, rows=ROWS, length=6):
        generator = torch.Generator().manual_seed(5)
        self.ids = torch.randint(30, 258, (rows, length), generator=generator)
        self.ids[:, 0] = torch.arange(rows)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, row):
        return {"input_ids": self.ids[row], "labels": self.ids[row]}


class Watch(TrainerCallback):
    """Notes the masks after each optimizer step; comes after the schedule."""

    def __init__(self):
        self.masks, self.selections, self.selecting = {}, {}, {}

    def note(self, step, model):
        layers = sparselet_layers(model)
        states = [layer.sparse_mask["default"] for layer in layers.values()]
        self.masks[step] = {name: layer.sparse_indices["default"].clone() for name, layer in layers.items()}
        (self.selections[step],) = {state.selections for state in states}
        (self.selecting[step],) = {state.selecting for state in states}

    def on_train_begin(self, args, state, control, model, **kwargs):
        self.note(0, model)

    def on_step_end(self, args, state, control, model, **kwargs):
        self.note(state.global_step, model)

    @property
    def selected_at(self):
        """The steps after which there was one selection more; 0 is before the first."""
        steps = sorted(self.selections)
        return [s for i, s in enumerate(steps) if self.selections[s] > (self.selections[steps[i - 1]] if i else 0)]

    @property
    def frozen_at(self):
        return min((step for step, selecting in self.selecting.items() if not selecting), default=None)


@pytest.fixture
def fit(tmp_path):
    """Train a tiny Llama with a schedule: 24 rows, 4 a batch, so 6 batches an epoch. Returns trainer and watch."""

    def run(adapter=None, schedule=None, trainer_class=Trainer, model=None, data=None, callbacks=None, **arguments):
        adapter = {"density": 0.1, "score": "gm", **(adapter or {})}
        model = get_peft_model(model or make_model(), paper_config(**adapter))
        watch = Watch()
        arguments = {
            **QUIET,
            "output_dir": str(tmp_path / "trainer"),
            "per_device_train_batch_size": 4,
            **arguments,
        }
        trainer = trainer_class(
            model=model,
            args=TrainingArguments(**arguments),
            train_dataset=data or Tokens(),
            callbacks=[schedule or MaskSchedule(), watch] if callbacks is None else [*callbacks, watch],
        )
        trainer.train()
        return trainer, watch

    return run


def assert_whole(trainer, density=0.1):
    """The masks are frozen, have their size, and what was trained is in them."""
    adapter = to_adapter(trainer.model)
    for layer in sparselet_layers(trainer.model).values():
        state = layer.sparse_mask["default"]
        assert not state.selecting
        assert state.pending is None
    for delta in adapter.values():
        assert delta.nnz == max(1, round(density * delta.size))
        assert delta.values.abs().sum() > 0


# When


def test_static_masks_are_selected_on_drawn_rows_before_the_first_step_and_stay(fit):
    trainer, watch = fit({"when": "static", "score_batches": 2}, num_train_epochs=1)
    assert watch.selected_at == [0]
    assert watch.frozen_at == 0
    assert all(torch.equal(watch.masks[0][name], mask) for name, mask in watch.masks[6].items())
    assert_whole(trainer)


def test_static_masks_of_the_weights_alone_need_no_schedule(fit):
    trainer, watch = fit({"when": "static", "score": "magnitude"}, callbacks=[], num_train_epochs=1)
    assert watch.frozen_at == 0
    assert_whole(trainer)


def test_a_refresh_exchanges_less_and_less_of_the_mask(fit):
    settings = {"when": "refresh", "reselect_every": 1, "selection_epochs": 1, "replaced": 0.5, "density": 0.3}
    trainer, watch = fit(settings, num_train_epochs=2)
    assert watch.selected_at == [0, 1, 2, 3, 4, 5, 6]
    assert watch.frozen_at == 6
    steps = [[watch.masks[step][name] for step in range(7)] for name in watch.masks[0]]
    new = [[1 - float(torch.isin(after, before).float().mean()) for before, after in itertools.pairwise(m)] for m in steps]
    assert all(shares == sorted(shares, reverse=True) and shares[-1] == 0 for shares in new)
    assert all(shares[0] == pytest.approx(0.5 * 5 / 6, abs=0.01) for shares in new)
    assert_whole(trainer, 0.3)


@pytest.mark.parametrize(("every", "expected"), [(1, [1, 2, 3, 4, 5, 6]), (2, [1, 2, 3, 4, 5, 6])], ids=["1", "2-shrinks"])
def test_masks_are_selected_during_the_first_epoch_and_then_frozen(fit, every, expected):
    trainer, watch = fit({"reselect_every": every})
    assert watch.selected_at == expected
    assert watch.frozen_at == 6
    assert all(torch.equal(watch.masks[12][name], mask) for name, mask in watch.masks[6].items())
    assert_whole(trainer)


@pytest.mark.parametrize("accumulation", [2, 3])
def test_steps_are_those_of_the_optimizer_not_micro_batches(fit, accumulation):
    trainer, watch = fit(
        {"reselect_every": 2},
        per_device_train_batch_size=1,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=1.5,
    )
    steps = ROWS // accumulation
    assert watch.selected_at == list(range(2, steps + 1, 2))
    assert watch.frozen_at == steps
    assert trainer.state.global_step == steps * 3 // 2


def test_a_last_short_accumulation_counts_as_a_step(fit):
    _, watch = fit({"reselect_every": 1}, data=Tokens(20), per_device_train_batch_size=4, gradient_accumulation_steps=2)
    assert watch.frozen_at == 3
    assert watch.selected_at == [1, 2, 3]


@pytest.mark.parametrize(
    ("batch", "phase", "interval", "expected"),
    [(4, 6, 1, [1, 2, 3, 4, 5, 6]), (3, 8, 2, [2, 4, 6, 8]), (2, 12, 3, [3, 6, 9, 12]), (1, 24, 6, [6, 12, 18, 24])],
)
def test_the_interval_shrinks_to_four_selections_and_the_log_says_so(fit, caplog, batch, phase, interval, expected):
    with caplog.at_level(logging.INFO, "sparselet"):
        _, watch = fit(per_device_train_batch_size=batch)
    assert watch.selected_at == expected
    assert watch.frozen_at == phase
    (line,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING and r.name == "sparselet"]
    assert (
        line == f"the selection phase has {phase} optimizer steps, so masks are selected every {interval} instead of every 100."
    )
    told = [int(step) for step in re.findall(r"step (\d+): masks selected: \d+ entries in 6 targets", caplog.text)]
    assert told == expected
    assert f"step {phase}: masks are frozen" in caplog.text


def test_an_interval_that_fits_is_kept_without_a_word(fit, caplog):
    _, watch = fit({"reselect_every": 5}, per_device_train_batch_size=1, num_train_epochs=1)
    assert watch.selected_at == [5, 10, 15, 20]
    assert watch.frozen_at == 24
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING and r.name == "sparselet"]


def test_a_phase_of_three_steps_selects_after_each(fit):
    _, watch = fit(per_device_train_batch_size=8)
    assert watch.selected_at == [1, 2, 3]


def test_reselect_every_0_selects_once_at_the_end_of_the_phase(fit, caplog):
    trainer, watch = fit({"reselect_every": 0})
    assert watch.selected_at == [6]
    assert watch.frozen_at == 6
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING and r.name == "sparselet"]
    assert_whole(trainer)


@pytest.mark.parametrize(("epochs", "phase"), [(0.5, 3), (1.5, 9), (2.0, 12), (7.0, 12), (0.0, 1), (0.01, 1)])
def test_the_phase_lasts_selection_epochs(fit, epochs, phase):
    trainer, watch = fit({"selection_epochs": epochs, "reselect_every": 1})
    assert watch.frozen_at == phase
    assert watch.selected_at == list(range(1, phase + 1))
    assert trainer.state.global_step == 12


def test_a_phase_cut_short_by_max_steps_ends_with_training(fit):
    trainer, watch = fit({"selection_epochs": 2, "reselect_every": 0}, max_steps=4)
    assert watch.selected_at == [4]
    assert_whole(trainer)


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


@pytest.mark.parametrize("every", [0, 1, 5], ids="every-{}".format)
def test_a_phase_cut_short_by_a_callback_still_ends_with_frozen_masks(fit, every):
    trainer, watch = fit({"reselect_every": every, "selection_epochs": 2}, callbacks=[MaskSchedule(), StopAt(2)])
    assert trainer.state.global_step == 2
    assert watch.selected_at == ([1, 2] if every == 1 else [])
    for delta in to_adapter(trainer.model).values():
        assert delta.nnz == max(1, round(0.1 * delta.size))
    assert_whole(trainer)


# How it starts


def test_initial_mask_gradient_selects_before_the_first_step_and_once(fit):
    trainer, watch = fit({"initial_mask": "gradient", "score": "mcs_neg"})
    assert watch.selected_at == [0]
    assert watch.frozen_at == 6
    assert all(torch.equal(watch.masks[12][name], mask) for name, mask in watch.masks[0].items())
    assert_whole(trainer)


def test_initial_mask_gradient_moves_on_with_a_score_that_ranks_untrained_entries(fit):
    trainer, watch = fit({"initial_mask": "gradient", "reselect_every": 2})
    assert watch.selected_at == [0, 1, 2, 3, 4, 5, 6]
    assert any(not torch.equal(watch.masks[0][name], mask) for name, mask in watch.masks[6].items())
    assert_whole(trainer)


def test_initial_mask_gradient_is_that_of_the_scoring_batches(fit):
    _, watch = fit({"initial_mask": "gradient", "score": "mcs_neg", "score_batches": 2, "seed": 3}, max_steps=1)
    data, order = Tokens(), torch.randperm(ROWS, generator=seeded(3, "scoring", 0)).tolist()
    model = make_model()
    for chunk in (order[:4], order[4:8]):
        ids = torch.stack([data[row]["input_ids"] for row in chunk])
        model(input_ids=ids, labels=ids).loss.backward()
    for name, mask in watch.masks[0].items():
        gradient = model.get_submodule(name).weight.grad.abs().flatten()
        expected = gradient.topk(len(mask)).indices.sort().values
        assert torch.equal(mask.long(), expected), name


def test_initial_mask_random_keeps_its_mask_where_the_score_cannot_move_it(fit):
    trainer, watch = fit({"initial_mask": "random", "score": "mcs_neg"})
    assert watch.selected_at == [0]
    assert watch.frozen_at == 6
    assert all(torch.equal(watch.masks[12][name], mask) for name, mask in watch.masks[0].items())
    assert_whole(trainer)


def test_a_model_whose_masks_are_frozen_is_left_alone(fit):
    model = get_peft_model(make_model(), paper_config(initial_mask="random", reselect_every=0))
    freeze_masks(model)

    class Frozen(Trainer):
        def __init__(self, model, **kwargs):
            super().__init__(model=frozen, **kwargs)

    frozen = model
    _, watch = fit(trainer_class=Frozen)
    assert watch.selected_at == [0]
    assert watch.frozen_at == 0


# What it scores on, and what it leaves alone


class Recording(Trainer):
    """Notes the first tokens of every batch of training, told from scoring batches by going through the Trainer."""

    def training_step(self, model, inputs, *args, **kwargs):
        self.__dict__.setdefault("seen", []).append(inputs["input_ids"][:, 0].tolist())
        return super().training_step(model, inputs, *args, **kwargs)


def test_scoring_leaves_the_order_of_the_training_data_as_it_is(fit, tmp_path):
    scheduled = [
        fit({"reselect_every": every, "score_batches": batches, "initial_mask": mask}, trainer_class=Recording)[0].seen
        for every, batches, mask in ((1, 3, "dense"), (0, 1, "dense"), (2, 2, "gradient"))
    ]
    lora = Recording(
        model=get_peft_model(make_model(), LoraConfig(target_modules=["q_proj"])),
        args=TrainingArguments(
            output_dir=str(tmp_path / "lora"),
            num_train_epochs=2,
            per_device_train_batch_size=4,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=Tokens(),
    )
    lora.train()
    assert sorted(row for batch in lora.seen[:6] for row in batch) == list(range(ROWS))
    assert lora.seen[:6] != lora.seen[6:]
    for seen in scheduled:
        assert seen == lora.seen


def test_scoring_leaves_the_global_generators_as_they_are(fit):
    class Draw(TrainerCallback):
        drawn = ()

        def on_step_end(self, *args, **kwargs):
            self.drawn += (torch.rand(()).item(),)

    draws = [Draw(), Draw()]
    for draw, every in zip(draws, (1, 0), strict=True):
        fit({"reselect_every": every}, callbacks=[MaskSchedule(), draw], max_steps=5)
    assert draws[0].drawn == draws[1].drawn


def test_scoring_batches_depend_on_seed_and_step_alone(fit):
    rows = {}

    def loss(model, batch):
        output = model(**batch)
        key.append(batch["input_ids"][:, 0].tolist())
        return output.loss

    for name, seed, learning_rate in (("a", 0, 1e-2), ("b", 0, 1e-3), ("c", 1, 1e-2)):
        rows[name] = key = []
        fit(
            {"reselect_every": 1, "seed": seed, "score_batches": 2},
            MaskSchedule(loss),
            learning_rate=learning_rate,
            max_steps=3,
        )
        assert len(key) == 6
        assert all(len(set(batch)) == 4 for batch in key)
        assert not set(key[0]) & set(key[1])
        assert key[0] != key[2]
    assert rows["a"] == rows["b"]
    assert rows["a"] != rows["c"]


def test_more_scoring_rows_than_there_are_go_round_again(fit):
    sizes = []

    def loss(model, batch):
        sizes.append(len(batch["input_ids"]))
        return model(**batch).loss

    fit({"reselect_every": 0, "score_batches": 3}, MaskSchedule(loss), data=Tokens(3), per_device_train_batch_size=8)
    assert sizes == [3, 3, 3]


def test_a_selection_is_that_of_reselect_at_the_trained_values(fit):
    """The schedule's choice at its first selection, made again by hand from the same dense start."""
    _, watch = fit({"reselect_every": 0, "selection_epochs": 0.5, "score": "mcs_neg"}, lr_scheduler_type="constant")

    class Peek(TrainerCallback):
        def on_step_end(self, args, state, control, model, optimizer, **kwargs):
            if state.global_step == 3:
                order = torch.randperm(ROWS, generator=seeded(0, "scoring", 3)).tolist()[:4]
                ids = torch.stack([Tokens()[row]["input_ids"] for row in order])
                reselect(model, [{"input_ids": ids, "labels": ids}], optimizer)
                freeze_masks(model)

    _, by_hand = fit({"reselect_every": 0, "score": "mcs_neg"}, callbacks=[Peek()], lr_scheduler_type="constant")
    assert all(torch.equal(by_hand.masks[12][name], mask) for name, mask in watch.masks[12].items())


# Trainers of other kinds


def last_token_loss(model, batch):
    logits = model(input_ids=batch["input_ids"]).logits[:, -2]
    return torch.nn.functional.cross_entropy(logits, batch["input_ids"][:, -1])


class LastToken(Trainer):
    """Its loss takes the labels out of the batch, as transformers' own does for a `compute_loss_func`."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self.__dict__.setdefault("losses", []).append(num_items_in_batch)
        inputs.pop("labels")
        return last_token_loss(model, inputs)


class FromLists(LastToken):
    """A collator that gives a list of rows, which become a batch in the loss."""

    def __init__(self, **kwargs):
        super().__init__(data_collator=list, **kwargs)

    def compute_loss(self, model, inputs, **kwargs):
        return super().compute_loss(model, default_data_collator(inputs), **kwargs)


class FunctionOfOutputs(Trainer):
    def __init__(self, **kwargs):
        super().__init__(compute_loss_func=self.of_outputs, **kwargs)

    @staticmethod
    def of_outputs(outputs, labels, num_items_in_batch):
        return torch.nn.functional.cross_entropy(outputs.logits[:, -2], labels[:, -1])


@pytest.mark.parametrize("mask", ["dense", "gradient"])
@pytest.mark.parametrize("trainer_class", [LastToken, FromLists, FunctionOfOutputs])
def test_the_loss_of_the_trainer_chooses_the_masks(fit, trainer_class, mask):
    adapter = {"reselect_every": 0} if mask == "dense" else {"initial_mask": mask, "score": "mcs"}
    (own, watch), (_, by_hand) = (fit(adapter, MaskSchedule(loss), trainer_class) for loss in (None, on_rows))
    assert all(torch.equal(by_hand.masks[12][name], mask) for name, mask in watch.masks[12].items())
    assert_whole(own)
    _, of_the_model = fit(adapter)
    assert any(not torch.equal(of_the_model.masks[12][name], mask) for name, mask in watch.masks[12].items())


def on_rows(model, batch):
    return last_token_loss(model, default_data_collator(batch) if isinstance(batch, list) else batch)


class Makes(LastToken):
    """Makes what its loss takes in the training step, from rows that are none of it."""

    def _prepare_inputs(self, inputs):
        return {"input_ids": (inputs["input_ids"] + 1) % 258, "labels": None}


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("mask", ["dense", "gradient"])
def test_a_trainer_that_makes_its_batches_is_scored_on_those_of_its_last_step(fit, accumulation, mask):
    adapter = {"initial_mask": mask, "selection_epochs": 0.5, "reselect_every": 0 if mask == "dense" else 3}
    dividing = {"per_device_train_batch_size": 4 // accumulation, "gradient_accumulation_steps": accumulation}
    trainer, watch = fit(adapter, trainer_class=Makes, **dividing)
    assert watch.selected_at == ([3] if mask == "dense" else [1, 2, 3])
    scored = len(trainer.losses) - 12 * accumulation
    assert scored == (accumulation if mask == "dense" else 3 * accumulation + 1)
    assert "compute_loss" not in vars(trainer)
    assert_whole(trainer)


@pytest.mark.parametrize("score_batches", [1, 2])
def test_masks_are_the_same_however_a_step_is_accumulated(fit, score_batches):
    class Unlike(Tokens):
        """Rows of which unlike numbers of labels are counted."""

        def __getitem__(self, row):
            labels = self.ids[row].clone()
            labels[: row % 5] = -100
            return {"input_ids": self.ids[row], "labels": labels}

    adapter = {"initial_mask": "gradient", "score": "mcs", "score_batches": score_batches}
    masks = [
        fit(adapter, data=Unlike(), max_steps=1, per_device_train_batch_size=size, gradient_accumulation_steps=8 // size)[
            1
        ].masks
        for size in (8, 4, 1)
    ]
    for divided in masks[1:]:
        assert all(torch.equal(divided[0][name], mask) for name, mask in masks[0][0].items())


def test_gradient_checkpointing_selects_and_trains_the_same(fit):
    plain, plain_watch = fit({"reselect_every": 2})
    saving, saving_watch = fit(
        {"reselect_every": 2}, activation_checkpointing=True, activation_checkpointing_kwargs={"use_reentrant": False}
    )
    assert saving_watch.selected_at == plain_watch.selected_at
    expected = to_adapter(plain.model)
    for name, delta in to_adapter(saving.model).items():
        assert torch.equal(delta.indices, expected[name].indices)
        torch.testing.assert_close(delta.values, expected[name].values)


def test_a_model_in_bfloat16_is_scheduled_too(fit):
    trainer, watch = fit({"reselect_every": 2}, model=make_model(torch.bfloat16))
    assert watch.frozen_at == 6
    assert_whole(trainer)


def test_the_optimizer_follows_each_selection(fit):
    trainer, _ = fit({"reselect_every": 1}, optim="adamw_torch_fused")
    for layer in sparselet_layers(trainer.model).values():
        parameter = layer.sparse_values["default"]
        state = trainer.optimizer.state[parameter]
        assert state["exp_avg"].shape == parameter.shape == state["exp_avg_sq"].shape


# What is refused


def begin(model, **changes):
    arguments = SimpleNamespace(
        world_size=1,
        process_index=0,
        n_gpu=0,
        fsdp=None,
        deepspeed=None,
        gradient_accumulation_steps=1,
        per_device_train_batch_size=4,
        device="cpu",
    )
    state = SimpleNamespace(global_step=0, max_steps=10)
    loader = torch.utils.data.DataLoader(changes.pop("data", Tokens()), batch_size=4)
    for key, value in changes.items():
        setattr(arguments, key, value)
    MaskSchedule().on_train_begin(arguments, state, None, model=model, train_dataloader=loader, optimizer=None)


def test_several_processes_may_train_frozen_masks():
    model = get_peft_model(make_model(), paper_config(initial_mask="random", reselect_every=0))
    freeze_masks(model)
    begin(model, world_size=2)


def test_data_without_a_length_are_refused():
    class Stream(IterableDataset):
        def __iter__(self):
            yield from Tokens()

    with pytest.raises(SelectionError, match="must have a length"):
        begin(get_peft_model(make_model(), paper_config()), data=Stream())


def test_a_model_with_two_active_adapters_is_refused():
    model = get_peft_model(make_model(), paper_config())
    model.add_adapter("second", paper_config())
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(SelectionError, match="exactly one adapter"):
        begin(model)
