from __future__ import annotations

import pytest

from rollout.router import SLACK_TOKENS, Routed, Router, prefixes_of


def placed(router: Router, *groups: tuple[str, int], prefixes: tuple[bytes, ...] = ()) -> list[int]:
    """Where groups of (id, tokens) go."""
    router.reserve([group_id for group_id, _ in groups])
    routed = [Routed(group_id=group_id, num_tokens=num_tokens, prefixes=prefixes) for group_id, num_tokens in groups]
    return [assignment.engine_id for assignment in router.assign(routed)]


def test_groups_go_where_fewest_tokens_are_outstanding():
    router = Router(range(3))
    assert placed(router, ("a", 100), ("b", 10), ("c", 10), ("d", 5), ("e", 50)) == [0, 1, 2, 1, 2]
    assert router.outstanding_tokens == {0: 100, 1: 15, 2: 60}


def test_released_work_no_longer_counts():
    router = Router(range(2))
    placed(router, ("a", 100), ("b", 10))
    router.release(["a"])
    assert router.outstanding_tokens == {0: 0, 1: 10}
    assert placed(router, ("c", 1)) == [0]


def test_a_prompt_goes_where_most_of_its_beginning_is_known_unless_that_engine_is_much_busier():
    router, prompt = Router(range(3)), list(range(300))
    assert placed(router, ("a", 50), ("b", 400), prefixes=prefixes_of(prompt[:40])) == [0, 0]
    assert placed(router, ("c", 10), prefixes=prefixes_of([9] * 200)) == [1]
    assert placed(router, ("d", 10), prefixes=prefixes_of(prompt[:100])) == [0]  # its first 32 tokens are known there
    assert placed(router, ("e", 10), prefixes=prefixes_of(prompt[:20])) == [2]  # too short to be remembered
    placed(router, ("f", SLACK_TOKENS), prefixes=prefixes_of(prompt))
    assert placed(router, ("g", 10), prefixes=prefixes_of(prompt)) == [1]


def test_beginnings_are_equal_where_the_tokens_are():
    assert len(prefixes_of([1] * 31)) == 0
    assert len(prefixes_of([1] * 32)) == 1
    assert len(prefixes_of([1] * 300)) == 4
    one, other = prefixes_of(list(range(300))), prefixes_of([*range(100), 7, *range(101, 300)])
    assert [a == b for a, b in zip(one, other, strict=True)] == [True, True, False, False]


def test_ids_left_to_the_pool_count_up_and_avoid_the_callers():
    router = Router([0])
    assert router.reserve([None, "g1", None]) == ["g0", "g1", "g2"]
    router.release(["g0", "g1", "g2"])
    assert router.reserve([None]) == ["g3"]


def test_an_id_that_is_in_use_is_refused_and_nothing_is_taken():
    router = Router(range(2))
    placed(router, ("a", 3))
    with pytest.raises(ValueError, match="'a' is still running"):
        router.reserve(["b", "a"])
    assert router.num_groups == 1
    with pytest.raises(ValueError, match="no running group has the id 'b'"):
        router.locate(["a", "b"])
    assert router.locate(["a"]) == {0: ["a"]}


def test_groups_of_an_engine_that_is_gone_move_and_those_released_meanwhile_do_not():
    router = Router(range(2))
    assert placed(router, ("a", 3), ("b", 4), ("c", 5)) == [0, 1, 0]
    assert sorted(router.remove_engine(0)) == ["a", "c"]
    assert placed(router, ("d", 1)) == [1]
    router.release(["c"])
    moved = router.move(["a", "c"])
    assert [(assignment.group_id, assignment.engine_id) for assignment in moved] == [("a", 1)]
    assert router.outstanding_tokens == {0: 0, 1: 8}
    router.add_engine(0)
    assert placed(router, ("e", 1)) == [0]
    router.add_engine(2)
    assert [one.engine_id for one in router.move(["e"], avoid={0, 2})] == [1]
