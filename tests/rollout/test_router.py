from __future__ import annotations

import random
from collections.abc import Collection

import pytest

from rollout import router as router_module
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


class Bookkeeper:
    """The rule of the router as its docstrings say it, read off lists: who knows what, and who has how much to do."""

    def __init__(self, num_remembered: int) -> None:
        self.num_remembered = num_remembered
        self.known: dict[int, list[bytes]] = {}
        self.outstanding: dict[int, int] = {}

    def choose(self, prefixes: tuple[bytes, ...], avoid: Collection[int]) -> int:
        engines = [i for i in self.known if i not in avoid]
        limit = min(self.outstanding[i] for i in engines) + SLACK_TOKENS

        def num_known(engine_id: int) -> int:
            return max((n for n, prefix in enumerate(prefixes, 1) if prefix in self.known[engine_id]), default=0)

        candidates = [i for i in engines if self.outstanding[i] <= limit]
        return min(candidates, key=lambda i: (-num_known(i), self.outstanding[i], i))

    def place(self, engine_id: int, group: Routed) -> None:
        self.outstanding[engine_id] += group.num_tokens
        known = [prefix for prefix in self.known[engine_id] if prefix not in group.prefixes]
        self.known[engine_id] = [*known, *group.prefixes][-self.num_remembered :]


@pytest.mark.parametrize("seed", range(4))
def test_every_choice_is_what_a_look_at_all_engines_would_choose(seed, monkeypatch):
    monkeypatch.setattr(router_module, "REMEMBERED_PREFIXES", 12)
    draw = random.Random(seed)
    beginnings = [[draw.randrange(9) for _ in range(300)] for _ in range(6)]
    router, expected = Router(range(8)), Bookkeeper(12)
    expected.known, expected.outstanding = {i: [] for i in range(8)}, dict.fromkeys(range(8), 0)
    running: dict[str, tuple[Routed, int]] = {}
    for number in range(1500):
        event = draw.random()
        if event < 0.02 and len(expected.known) > 3:
            lost = draw.choice(list(expected.known))
            moved, avoid = router.remove_engine(lost), set(draw.sample(range(8), 2)) - {lost}
            del expected.known[lost]
            assert sorted(moved) == sorted(name for name, (_, engine_id) in running.items() if engine_id == lost)
            for assignment in router.move(moved, avoid):
                group, _ = running[assignment.group_id]
                expected.outstanding[lost] -= group.num_tokens
                assert assignment.engine_id == expected.choose(group.prefixes, avoid)
                expected.place(assignment.engine_id, group)
                running[assignment.group_id] = group, assignment.engine_id
        elif event < 0.06 and len(expected.known) < 8:
            back = min(set(range(8)) - expected.known.keys())
            router.add_engine(back)
            expected.known[back] = []
        elif event < 0.45 and running:
            name = draw.choice(list(running))
            group, engine_id = running.pop(name)
            router.release([name])
            expected.outstanding[engine_id] -= group.num_tokens
        else:
            prompt = draw.choice(beginnings)[: draw.randrange(20, 300)] + [number] * draw.randrange(100)
            [name] = router.reserve([None])
            group = Routed(group_id=name, num_tokens=draw.randrange(1, 1500), prefixes=prefixes_of(prompt))
            [assignment] = router.assign([group])
            assert assignment.engine_id == expected.choose(group.prefixes, ())
            expected.place(assignment.engine_id, group)
            running[name] = group, assignment.engine_id
        assert router.outstanding_tokens == expected.outstanding


def test_a_router_keeps_no_more_than_it_must(monkeypatch):
    """Of work that came and went, and of beginnings that no engine remembers."""
    monkeypatch.setattr(router_module, "REMEMBERED_PREFIXES", 50)
    router = Router(range(3))
    for number in range(400):
        names = [f"{number}-{i}" for i in range(3)]
        assert placed(router, *((name, 10) for name in names), prefixes=prefixes_of([number] * 20)) == [0, 1, 2]
        router.release(names)
        for i in range(3):
            assert placed(router, (f"{i}", 10), prefixes=prefixes_of([i, number] * 20)) == [i]
        router.release(["0", "1", "2"])
    assert len(router._knowing) == 3 * 50
    monkeypatch.setattr(router_module, "POOL_PREFIXES", 90)
    assert placed(router, *((f"{i}", 10) for i in range(3)), prefixes=prefixes_of([7] * 40)) == [0, 0, 0]
    assert len(router._known_prefixes[0]) == 90 // 3
    router.release(["0", "1", "2"])
    router.add_engine(0)  # anew: it has forgotten everything
    router.remove_engine(1)
    assert len(router._knowing) == 50
    assert len(router._by_load) < 200
    assert router.num_groups == 0
