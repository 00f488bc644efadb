from __future__ import annotations

from trainers.minibatches import split_groups, visiting_order


def rollouts_of(make_rollout, sizes: list[int]):
    return [make_rollout([5], [6], group_id=f"g{g}", index=i) for g, size in enumerate(sizes) for i in range(size)]


def test_groups_stay_whole_and_parts_hold_about_as_many(make_rollout):
    rollouts = rollouts_of(make_rollout, [2, 2, 2, 2, 2])
    assert split_groups(rollouts, range(10), 2) == [[0, 1, 2, 3], [4, 5, 6, 7, 8, 9]]
    assert split_groups(rollouts, range(10), 1) == [list(range(10))]


def test_samples_left_out_leave_no_empty_part(make_rollout):
    rollouts = rollouts_of(make_rollout, [2, 2, 2])
    assert split_groups(rollouts, [1, 4, 5], 3) == [[1], [4, 5]]
    assert split_groups(rollouts, [], 3) == []


def test_every_part_is_visited_once_an_epoch_in_an_order_fixed_by_the_seed():
    order = visiting_order(6, 3, seed=4)
    epochs = [order[:6], order[6:12], order[12:]]
    assert all(sorted(epoch) == list(range(6)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert order == visiting_order(6, 3, seed=4) != visiting_order(6, 3, seed=5)
