"""Routing against distances written out in numpy, and prompts whose expert is known."""

import numpy as np
import pytest
import torch

from sparselet.errors import ArgumentError, ShapeMismatch, WrongBase
from sparselet.profiles.collect import describe_prompts
from sparselet.profiles.profile import Profile
from sparselet.profiles.router import Router

WIDTH, COUNT = 24, 40
PRINT = {"dtype": "float32", "sample": "0" * 16, "signs": "1" * 16}


def states_of(task, count=COUNT, seed=0, spread=1.0):
    """Prompts around a mean of their own, spread along two directions of their own; one dimension is loud in all tasks."""
    own = torch.Generator().manual_seed(task)
    mean, directions = torch.randn(WIDTH, generator=own), torch.randn(2, WIDTH, generator=own)
    draw = torch.Generator().manual_seed(1000 * seed + task)
    states = mean + spread * (
        torch.randn(count, 2, generator=draw) @ directions + 0.3 * torch.randn(count, WIDTH, generator=draw)
    )
    states[:, 0] = 100 * torch.randn(count, generator=draw)
    return states


def profile_of(states, fingerprint=PRINT):
    return Profile({}, {}, frozenset(), describe_prompts(states), {"layer": fingerprint}, 1, 1)


def library(tasks=5, **changes):
    return {f"task {t}": profile_of(states_of(t), **changes) for t in range(tasks)}


@pytest.mark.parametrize("rule", ["residual", "mean"])
def test_the_distances_are_those_of_the_formula(rule):
    profiles, states = library(), states_of(2, 7, seed=1)
    found = Router(profiles, rule).distances(states).numpy()
    samples = [states_of(t).double().numpy() for t in range(5)]
    s = np.sqrt(np.mean([x.var(axis=0) for x in samples], axis=0))
    for t, x in enumerate(samples):
        difference = (states.double().numpy() - x.mean(axis=0)) / s
        if rule == "residual":
            _, _, v = np.linalg.svd((x - x.mean(axis=0)) / s, full_matrices=False)
            difference = difference - difference @ v[:8].T @ v[:8]
        np.testing.assert_allclose(found[:, t], np.linalg.norm(difference, axis=1), rtol=2e-2)


@pytest.mark.parametrize("rule", ["residual", "mean"])
def test_prompts_go_to_their_expert_by_a_margin(rule):
    spread = {"residual": 1.0, "mean": 0.3}[rule]  # only a residual sees past the tasks' own directions
    router = Router({f"task {t}": profile_of(states_of(t, spread=spread)) for t in range(5)}, rule)
    for task in range(5):
        routes = router.route(states_of(task, 20, seed=1, spread=spread))
        assert [route.expert for route in routes] == [f"task {task}"] * 20
        assert not any(route.unsure for route in routes)
        assert list(routes[0].distances.values()) == sorted(routes[0].distances.values())


def test_a_prompt_between_two_experts_is_unsure():
    profiles = library(2)
    between = torch.stack([p.prompts.mean for p in profiles.values()]).mean(0, keepdim=True)
    (route,) = Router(profiles, "mean").route(between)
    assert route.unsure
    assert route.margin == pytest.approx(0, abs=1e-5)
    assert not Router(profiles, "mean", margin=0.0).route(between)[0].unsure


def test_what_cannot_be_routed_is_refused_before_any_work():
    profiles = library(2)
    with pytest.raises(ArgumentError, match="among at least two experts, got 1"):
        Router(library(1))
    with pytest.raises(ArgumentError, match="rule must be one of residual, mean, got 'cosine'"):
        Router(profiles, "cosine")
    with pytest.raises(ArgumentError, match=r"margin must be a number in \[0, 1\), got 1"):
        Router(profiles, margin=1)
    with pytest.raises(WrongBase, match="the profiles of task 0 and other"):
        Router({**profiles, "other": profile_of(states_of(3), {**PRINT, "sample": "f" * 16})})
    with pytest.raises(ShapeMismatch, match="prompt states of 24 and 5 dimensions"):
        Router({**profiles, "other": profile_of(torch.randn(9, 5))})
    with pytest.raises(ShapeMismatch, match=r"shape \[2, 5\]; expected \[prompts, 24\]"):
        Router(profiles).distances(torch.ones(2, 5))


def test_prompts_that_are_all_alike_have_no_directions():
    same = {name: profile_of(torch.full((4, 3), value)) for name, value in (("a", 1.0), ("b", 2.0))}
    assert Router(same).route(torch.full((1, 3), 1.1))[0].expert == "a"
