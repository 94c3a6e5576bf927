"""What changed between a saved run and this one, as lines that a person can act on."""

from __future__ import annotations

import json

from agentlightning.checkpoint import compare_fingerprints

SAVED = {
    "breaking": {"lora": {"r": 8, "target_modules": ["q", "v"]}, "data": "abc", "lr": 1e-5},
    "harmless": {"threads": 2, "seed": None},
}


def test_equal_after_a_file() -> None:
    now = {**SAVED, "breaking": {**SAVED["breaking"], "lora": {"r": 8, "target_modules": ("q", "v")}}}
    assert compare_fingerprints(json.loads(json.dumps(SAVED)), now) == ([], [])


def test_differences_by_kind_and_key() -> None:
    now = {
        "breaking": {"lora": {"r": 16, "target_modules": ["q"]}, "data": "abc", "lr": 1e-5},
        "harmless": {"threads": 4, "seed": 1},
    }
    assert compare_fingerprints(SAVED, now) == (
        ["lora.r: saved 8, now 16", 'lora.target_modules: saved ["q", "v"], now ["q"]'],
        ["seed: saved null, now 1", "threads: saved 2, now 4"],
    )


def test_a_key_of_one_side_only_is_a_difference() -> None:
    breaking, harmless = compare_fingerprints({"breaking": {"a": 1}}, {"breaking": {"b": {"c": "x"}}, "harmless": {"d": 1}})
    assert breaking == ["a: saved 1, now absent", 'b.c: saved absent, now "x"']
    assert harmless == ["d: saved absent, now 1"]


def test_types_count() -> None:
    assert compare_fingerprints({"breaking": {"x": 1}}, {"breaking": {"x": True}})[0] == ["x: saved 1, now true"]
    assert compare_fingerprints({"breaking": {"x": "1"}}, {"breaking": {"x": 1}})[0] == ['x: saved "1", now 1']
    assert compare_fingerprints({"breaking": {"x": {}}}, {"breaking": {"x": None}})[0] == ["x: saved {}, now null"]
