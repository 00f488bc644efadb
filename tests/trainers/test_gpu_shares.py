from __future__ import annotations

import math

import pytest

from engine import EngineConfig
from rollout.pool import within_gpu_share
from trainers import GRPOConfig
from trainers.gpu_shares import GPUShares, even_share


@pytest.mark.parametrize("num_gpus", [1, 2, 3, 8])
@pytest.mark.parametrize("num_actors", [2, 3, 7, 9, 64])
def test_even_shares_find_a_place_on_the_gpus(num_actors, num_gpus):
    share = even_share(num_actors, num_gpus)
    assert share * 10_000 == pytest.approx(round(share * 10_000))  # as Ray counts, or it would round up
    num_places = num_gpus * math.floor(1 / share + 1e-9)
    assert num_actors <= num_places < num_actors + num_gpus


def test_one_gpu_is_shared_by_engine_and_trainer_and_two_are_not():
    assert even_share(2, 1) == 0.5
    assert even_share(2, 2) == 1.0


def test_a_cpu_run_reserves_no_gpu():
    config, engine_config = GRPOConfig(num_engines=3), EngineConfig("m", device="cpu")
    assert GPUShares.from_config(config, engine_config) == GPUShares(engine=0.0, trainer=0.0)


def test_shares_that_are_given_count_where_this_machine_has_no_gpu():
    config = GRPOConfig(engine_gpus=0.25, trainer_gpus=1)
    shares = GPUShares.from_config(config, EngineConfig("m", device="cpu"))
    assert shares == GPUShares(engine=0.25, trainer=1)
    shares.require_room(4, 2.0)
    with pytest.raises(ValueError, match=r"num_engines=5 with engine_gpus=0.25 .* need 2.25 GPUs, and the clus"):
        shares.require_room(5, 2.0)


@pytest.mark.parametrize("gpus", [-1, 1.5, 0.5 + 1])
def test_parts_of_several_gpus_are_refused(gpus):
    with pytest.raises(ValueError, match=r"^trainer_gpus=.* must be a part of a GPU"):
        GRPOConfig(trainer_gpus=gpus)


def test_an_engine_with_a_part_of_a_gpu_leaves_the_rest_of_its_memory():
    config = EngineConfig("m", device="cpu", gpu_memory_utilization=0.8)
    assert within_gpu_share(config, 0.5).gpu_memory_utilization == pytest.approx(0.4)
    assert within_gpu_share(config, 1.0) is within_gpu_share(config, 0.0) is config
