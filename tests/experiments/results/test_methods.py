"""The table of methods: unique looks, anchors that exist, and tuning over all that the settings list."""

from itertools import product
from typing import Any

import pytest

from resq_rl.experiments.config.composition import load_settings
from resq_rl.experiments.results.methods import METHODS, Method, method_of, tuned_methods

HEURISTIC = [
    "heuristic.references=[previous,keyframe]",
    "heuristic.intervals=[4,8,0]",
    "heuristic.taus=[0.5,1.0]",
    "heuristic.frame_taus=[0.1,0.2]",
    "heuristic.scene_changes=[0.3]",
]


def candidates(key: str, *overrides: str) -> list[dict[str, Any]]:
    """The settings that a method tries on validation clips."""
    settings = load_settings("compare", [*HEURISTIC, *overrides])
    (method,) = [method for method in tuned_methods(settings) if method.key == key]
    assert method.candidates is not None
    policies = list(method.candidates(settings))
    assert len(policies) == len({repr(policy) for policy in policies})
    return [{**vars(policy), **policy.settings} for policy in policies]


def test_methods_are_told_apart_and_compared_with_methods_that_exist() -> None:
    for values in zip(*((m.key, m.title, m.colour, m.marker) for m in METHODS), strict=True):
        assert len(set(values)) == len(METHODS)
    keys = {method.key for method in METHODS}
    assert all(set(method.against) <= keys - {method.key} for method in METHODS)


def test_an_unknown_method_has_a_look_of_its_own() -> None:
    other = method_of("my_method")
    assert (other.title, other.candidates) == ("my method", None)
    assert other.colour not in {method.colour for method in METHODS}


@pytest.mark.parametrize(
    ("key", "varied"),
    [
        ("static_resq", {"level": range(4)}),
        ("skip_gate", {"tau": [0.5, 1.0]}),
        ("random", {}),
        ("dynamic_resq", {"tau": [0.5, 1.0]}),
    ],
)
def test_a_baseline_is_tuned_over_every_reference_interval_and_setting(key: str, varied: dict[str, Any]) -> None:
    listed = {"reference": ["previous", "keyframe"], "interval": [4, 8, 0], **varied}
    tried = {tuple(one[name] for name in listed) for one in candidates(key)}
    assert tried == set(product(*listed.values()))


def test_frame_level_methods_decide_against_the_keyframe() -> None:
    frame_level = "environment=frame_level"
    static = {(one["reference"], one["interval"], one["level"]) for one in candidates("static_resq", frame_level)}
    assert static == set(product(["keyframe"], [4, 8, 0], range(4)))
    magnitude = candidates("frame_magnitude", frame_level)
    assert {(one["interval"], one["tau"], one["scene_change"]) for one in magnitude} == set(
        product([4, 8, 0], [0.1, 0.2], [0.3, float("inf")])
    )


def test_what_is_tuned_follows_from_the_decisions() -> None:
    def keys(*overrides: str) -> set[str]:
        return {method.key for method in tuned_methods(load_settings("compare", list(overrides)))}

    assert keys() == {"static_resq", "skip_gate", "random", "dynamic_resq"}
    assert keys("environment=frame_level") == {"static_resq", "frame_magnitude"}


def test_refinements_change_one_setting_of_the_best() -> None:
    settings = load_settings("compare", ["heuristic.other_kappas=[[1,2,6],[1,3,9]]", *HEURISTIC])
    method: Method = method_of("dynamic_resq")
    assert method.candidates is not None
    policy: Any = method.candidates(settings)[0]
    refined = {name: [vars(p) for p in refine(settings.heuristic, policy)] for name, refine in method.refinements}
    assert [one["kappa"] for one in refined["kappa"]] == [(1.0, 2.0, 6.0), (1.0, 3.0, 9.0)]
    assert [one["scene_change"] for one in refined["scene change"]] == [0.3]
    assert all(one["tau"] == policy.tau for own in refined.values() for one in own)
