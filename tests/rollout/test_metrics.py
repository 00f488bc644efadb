from __future__ import annotations

import os
import re
import signal
import time
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import ray

from engine import SamplingParams
from rollout import RolloutPool
from rollout.metrics import METRICS

SAMPLE = re.compile(r"^ray_(lockstep_\w+)\{(.*)\} (\S+)$", re.MULTILINE)
LABEL = re.compile(r'(\w+)="([^"]*)"')
PARAMS = SamplingParams(n=3, max_tokens=8, ignore_eos=True)
IDS = [f"my-group-{i}" for i in range(4)]

Scrape = list[tuple[str, dict[str, str], float]]  # name, labels, value


def scrape(pool: str) -> Scrape:
    """What Ray's metrics agent shows of a pool, to whoever asks as Prometheus does."""
    node = ray.nodes()[0]
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(address, timeout=10) as answer:
        text = answer.read().decode()
    samples = [(name, dict(LABEL.findall(labels)), float(value)) for name, labels, value in SAMPLE.findall(text)]
    return [sample for sample in samples if sample[1]["pool"] == pool]


def total(samples: Scrape, name: str, **labels: str) -> float:
    """Over all series that have these labels."""
    return sum(value for one, has, value in samples if one == name and labels.items() <= has.items())


def wait_for(pool: str, is_there: Callable[[Scrape], bool]) -> Scrape:
    deadline = time.monotonic() + 60
    while not is_there(samples := scrape(pool)):
        assert time.monotonic() < deadline, f"not among {sorted((name, value) for name, _, value in samples)}"
        time.sleep(0.5)
    return samples


@pytest.fixture(scope="module")
def samples(local_ray, config, make_weights) -> Scrape:
    """Of a pool that has generated, synced, collected, lost an engine that was at work, and replaced it."""
    with RolloutPool(
        replace(config, max_num_seqs=6),
        num_engines=2,
        name="watched",
        max_staleness=1,
        groups_per_version=4,
    ) as pool:
        pool.generate([[5, 6, 7]] * 4, PARAMS, group_ids=IDS)
        pool.submit([[5], [6], [7]], PARAMS)
        while pool.stats().num_groups_running:
            time.sleep(0.05)
        report = pool.sync_weights(make_weights(1), 1)
        pool.collect(3)
        with pytest.raises(ValueError, match="missing"):
            pool.sync_weights({}, 2)
        assert report.is_lockstep
        stream = pool.stream([[5]] * 4, replace(PARAMS, max_tokens=400), group_ids=IDS)
        os.kill(pool.engine_infos[1].pid, signal.SIGKILL)
        assert len(list(stream)) == 4
        pool.scale(2)
        while len(pool.engines) < 2:
            time.sleep(0.1)
        pool.generate([[8]] * 4, PARAMS)
        generated = (4 + 3 + 4) * 3 * 8
        yield wait_for(
            "watched",
            lambda seen: (
                total(seen, "lockstep_engine_generated_tokens_total") > generated + 400
                and total(seen, "lockstep_pool_engines_serving") == 2
                and total(seen, "lockstep_pool_restarts_total") == 1
                and total(seen, "lockstep_engine_requests_running", engine_id="1") == 0
                and total(seen, "lockstep_engine_inter_token_seconds_count", engine_id="0") > 0
                and total(seen, "lockstep_engine_inter_token_seconds_count", engine_id="1") > 0
                and total(seen, "lockstep_sync_failed_total") == 1
                and total(seen, "lockstep_staleness_max_versions") > 0
            ),
        )


def test_a_pools_life_is_counted(samples):
    def of(name: str, **labels: str) -> float:
        return total(samples, f"lockstep_{name}", **labels)

    assert of("pool_policy_version") == 1
    assert of("pool_groups_running") == 0
    assert of("pool_engines_starting") == 0
    assert of("pool_faults_total", phase="serve") == of("pool_faults_total") == 1
    assert of("pool_redrawn_groups_total") >= 1
    assert of("pool_groups_submitted_total") == of("pool_groups_collected_total") == 3
    assert of("staleness_limit_versions") == 1
    assert of("staleness_mean_versions") == of("staleness_max_versions") == 1


def test_a_sync_is_counted(samples, make_weights):
    assert total(samples, "lockstep_sync_completed_total") == 1
    weights = make_weights(1)
    assert total(samples, "lockstep_sync_bytes_total") == sum(4 * tensor.numel() for tensor in weights.values())
    assert 0 < total(samples, "lockstep_sync_pause_seconds_total") < 60
    assert 0 < total(samples, "lockstep_sync_seconds_total") < 60


def test_engines_are_counted_each_by_its_number(samples):
    for engine_id in ("0", "1"):
        assert total(samples, "lockstep_engine_steps_total", engine_id=engine_id) > 0
        assert total(samples, "lockstep_engine_time_to_first_token_seconds_count", engine_id=engine_id) > 0
        assert total(samples, "lockstep_engine_inter_token_seconds_count", engine_id=engine_id) > 0
        assert total(samples, "lockstep_engine_step_seconds_total", engine_id=engine_id, part="execute") > 0
    assert total(samples, "lockstep_engine_prefix_cache_queries_total") > 0
    assert total(samples, "lockstep_engine_requests_finished_total") >= 11 * 3


def test_gauges_of_an_engine_that_died_are_those_of_its_replacement(samples):
    for name in ("requests_running", "requests_waiting", "kv_cache_usage_ratio"):
        of_one = [value for one, has, value in samples if one == f"lockstep_engine_{name}" and has["engine_id"] == "1"]
        assert of_one == [0]  # one series, whichever process had the place


def test_labels_are_bounded(samples):
    ours = {"pool", "engine_id", "phase", "part", "le"}
    values = {value for _, has, _ in samples for value in has.values()}
    assert not [value for value in values for group_id in IDS if group_id in value]
    for name, has, _ in samples:
        spec = METRICS[re.sub(r"_(bucket|count|sum)$", "", name) if name not in METRICS else name]
        assert ours & has.keys() - {"le"} == set(spec.labels)
        assert has.get("engine_id", "0") in ("0", "1")


def test_the_documents_list_every_metric_there_is():
    text = (Path(__file__).parents[2] / "docs" / "observing.md").read_text()
    rows = re.findall(r"^\| `(lockstep_\w+)` \| (\w+) \| (.*) \| (.*) \|$", text, re.MULTILINE)
    assert rows == [
        (spec.name, spec.kind, ", ".join(f"`{label}`" for label in spec.labels), spec.meaning)
        for spec in METRICS.values()
    ]
