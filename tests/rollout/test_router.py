from __future__ import annotations

import pytest

from rollout.router import Router


def test_groups_go_where_fewest_tokens_are_outstanding():
    router = Router(3)
    placed = router.assign([(None, 100), (None, 10), (None, 10), (None, 5), (None, 50)])
    assert [assignment.engine_index for assignment in placed] == [0, 1, 2, 1, 2]
    assert router.outstanding_tokens == [100, 15, 60]


def test_released_work_no_longer_counts():
    router = Router(2)
    router.assign([("a", 100), ("b", 10)])
    router.release(["a"])
    assert router.outstanding_tokens == [0, 10]
    assert router.assign([("c", 1)])[0].engine_index == 0


def test_ids_left_to_the_pool_count_up_and_avoid_the_callers():
    router = Router(1)
    assert [a.group_id for a in router.assign([(None, 1), ("g1", 1), (None, 1)])] == ["g0", "g1", "g2"]
    router.release(["g0", "g1", "g2"])
    assert router.assign([(None, 1)])[0].group_id == "g3"


def test_an_id_that_is_running_is_refused_and_nothing_is_placed():
    router = Router(2)
    router.assign([("a", 3)])
    with pytest.raises(ValueError, match="'a' is still running"):
        router.assign([("b", 4), ("a", 5)])
    assert router.outstanding_tokens == [3, 0]
    with pytest.raises(ValueError, match="no running group has the id 'b'"):
        router.locate(["a", "b"])
    assert router.locate(["a"]) == {0: ["a"]}
