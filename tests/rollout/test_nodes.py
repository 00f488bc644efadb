from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from rollout import RolloutPool
from tests.rollout.nodes import PARAMS, SEED
from tests.rollout.waiting import IDS, LONG, PROMPTS

SOURCE_ROOT = Path(__file__).resolve().parents[2]
NUM_VERSIONS = 3


@pytest.fixture(scope="module")
def directory(model_dir, make_weights, tmp_path_factory) -> Path:
    """What a scenario needs: the model, and weights of three versions."""
    path = tmp_path_factory.mktemp("nodes")
    (path / "model").symlink_to(model_dir)
    for version in range(1, NUM_VERSIONS + 1):
        save_file(make_weights(version), path / f"{version}.safetensors")
    return path


@pytest.fixture(scope="module")
def undisturbed(local_ray, config, make_weights) -> dict[tuple[int, str], list]:
    """By policy version and length: what one engine draws, on one node, that nobody disturbs."""
    drawn = {}
    with RolloutPool(config, seed=SEED) as pool:
        for version in range(NUM_VERSIONS):
            if version:
                pool.sync_weights(make_weights(version), version)
            for name, params in (("short", PARAMS), ("long", LONG)):
                drawn[version, name] = pool.generate(PROMPTS, params, group_ids=IDS)
    return drawn


@pytest.fixture
def play(directory: Path) -> Callable[[str], dict[str, Any]]:
    """Runs a scenario of nodes.py; what it saw."""

    def run(scenario: str) -> dict[str, Any]:
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        command = [sys.executable, "-m", "tests.rollout.nodes", scenario, str(directory)]
        done = subprocess.run(command, cwd=SOURCE_ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return pickle.loads((directory / f"{scenario}.pickle").read_bytes())

    return run


def test_a_node_that_dies_in_a_stream_changes_no_bit_and_holds_nobody_up(play, undisturbed):
    seen = play("a_node_dies")
    assert seen["disturbed"] == undisturbed[1, "long"]
    assert seen["by one"] == undisturbed[2, "short"]
    after_death = seen["after death"]
    assert (len(after_death.engines), after_death.num_engines_starting, after_death.num_restarts) == (1, 1, 1)
    assert 0 < after_death.num_redrawn_groups < len(PROMPTS)
    assert [len(seen[f"{which} sync"].policy_versions) for which in ("first", "second")] == [2, 1]
    assert all(seen[f"{which} sync"].is_lockstep for which in ("first", "second"))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_node_that_comes_takes_the_place_of_one_that_died(play, undisturbed):
    seen = play("a_node_dies_and_another_comes")
    assert len(set(seen["nodes"])) == 2
    assert seen["spread"] == undisturbed[0, "long"]
    assert seen["disturbed"] == undisturbed[1, "long"]
    assert seen["by one"] == seen["by both"] == undisturbed[2, "short"]
    assert [stats.policy_version for stats in seen["after return"].engines] == [2, 2]
    assert seen["nodes at the end"][0] == seen["nodes"][0]
    assert seen["nodes at the end"][1] not in seen["nodes"]
    assert [len(seen[f"{which} sync"].policy_versions) for which in ("first", "second", "third")] == [2, 1, 2]
    assert all(seen[f"{which} sync"].is_lockstep for which in ("first", "second", "third"))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("mode", ["recompute", "wait"])
def test_a_node_that_dies_in_a_sync_leaves_no_engine_behind(play, undisturbed, mode, forward_logprobs, make_weights):
    seen = play(f"a_node_dies_in_a_{mode}_sync")
    assert seen["sync"].is_lockstep
    assert seen["versions"] == [2, 2]
    assert seen["after death"] == seen["after return"] == undisturbed[2, "short"]
    if mode == "wait":
        assert seen["groups"] == undisturbed[1, "long"]
        return
    weights = {version: make_weights(version) for version in (1, 2)}
    for rollout in [rollout for group in seen["groups"] for rollout in group][::5]:
        assert len(rollout.token_ids) == LONG.max_tokens
        under = {version: forward_logprobs(weights[version], rollout) for version in weights}
        assert rollout.logprobs == [under[v][i] for i, v in enumerate(rollout.policy_versions)]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_weights_outlive_every_node_that_had_an_engine(play, undisturbed):
    seen = play("all_nodes_die_and_others_come")
    assert seen["groups"] == undisturbed[1, "long"]
    assert seen["versions"] == [1, 1]
    assert seen["sync"].is_lockstep
    assert seen["after sync"] == undisturbed[2, "short"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_engine_without_a_place_holds_nobody_up(play, undisturbed):
    seen = play("no_place_for_a_replacement")
    stats = seen["while others serve"]
    assert (len(stats.engines), stats.num_engines_starting) == (1, 1)
    causes = [fault.cause for fault in stats.faults if fault.phase == "start"]
    place = "no place in the cluster for 20 s: it needs 1 CPUs and 0 GPUs in bundle 1 of its placement group"
    assert sum(place in cause for cause in causes) >= 2, causes
    assert "no engine is left to draw, and replacements fail" in seen["nobody serves"]
    assert "add a node" in seen["nobody serves"]
    assert (seen["scaled down"], seen["scaled up"]) == (1, 2)
    assert "more than the cluster's 1 CPUs" in seen["scaled up without a node"]
    for drawn in ("by one", "by the first to return", "by both"):
        assert seen[drawn] == undisturbed[0, "short"], drawn
