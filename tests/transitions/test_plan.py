from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from invdyn.errors import DataError
from invdyn.sequences.base import SequencePlan, SourceFile
from invdyn.transitions.plan import TEST, TRAIN, VAL, ExtractionPlan, limit_rows, make_plan, split_episodes
from invdyn.transitions.windows import Window


def recording(num_actions: list[int], per_file: int = 3) -> SequencePlan:
    actions = np.array(num_actions, dtype=np.int64)
    number = np.arange(len(actions))
    return SequencePlan(
        files=tuple(SourceFile(f"/r/{i}.hdf5", f"{i}.hdf5", 1, 1) for i in range(-(-len(actions) // per_file))),
        file_index=number // per_file,
        episode_index=number % per_file,
        num_states=actions + 1,
        num_actions=actions,
        state_dim=3,
        action_dim=2,
        attributes={},
    )


def plan_of(sequences: SequencePlan, window: Window = Window(), **options: Any) -> ExtractionPlan:  # noqa: B008
    return make_plan(sequences, window, **{"dataset_name": "d", "val_ratio": 0.1, "test_ratio": 0.1, **options})


@given(
    total=st.integers(1, 60),
    val_ratio=st.sampled_from([0.0, 0.01, 0.1, 0.4]),
    test_ratio=st.sampled_from([0.0, 0.1, 0.3]),
    seed=st.integers(0, 1000),
)
def test_splits(total: int, val_ratio: float, test_ratio: float, seed: int) -> None:
    sequences = recording([2] * total)
    wanted = [max(1, round(ratio * total)) if ratio else 0 for ratio in (val_ratio, test_ratio)]
    assume(sum(wanted) < total)
    split = split_episodes(sequences, f"name{seed}", val_ratio, test_ratio)
    assert [(split == VAL).sum(), (split == TEST).sum()] == wanted
    assert (split == TRAIN).sum() == total - sum(wanted)  # every episode is in exactly one split

    # The same files listed in another order, as a file system may: each episode keeps its split.
    order = np.random.default_rng(seed).permutation(len(sequences.files))
    shuffled = replace(
        sequences,
        files=tuple(sequences.files[i] for i in order),
        file_index=np.argsort(order)[sequences.file_index],
    )
    assert split_episodes(shuffled, f"name{seed}", val_ratio, test_ratio).tolist() == split.tolist()
    by_id = {sequences.episode_id(i): int(split[i]) for i in range(total)}
    backwards = replace(sequences, file_index=sequences.file_index[::-1], episode_index=sequences.episode_index[::-1])
    again = split_episodes(backwards, f"name{seed}", val_ratio, test_ratio)
    assert {backwards.episode_id(i): int(again[i]) for i in range(total)} == by_id


def test_splits_are_these_on_any_machine() -> None:
    assert split_episodes(recording([2] * 12), "pendulum", 0.2, 0.2).tolist() == [0, 0, 2, 0, 0, 0, 1, 2, 0, 0, 0, 1]


def test_splits_depend_on_the_name() -> None:
    names = {tuple(split_episodes(recording([2] * 30), name, 0.2, 0.2).tolist()) for name in "abcd"}
    assert len(names) == 4


@pytest.mark.parametrize("total", [1, 2])
def test_too_few_episodes_for_the_splits(total: int) -> None:
    with pytest.raises(DataError, match=rf"{total} episodes cannot give 1 to val, 1 to test and one to train; record"):
        plan_of(recording([5] * total))


rows_per_episode = st.lists(st.integers(0, 30), min_size=1, max_size=12)


@given(available=rows_per_episode, max_samples=st.integers(1, 400), seed=st.integers(0, 99))
def test_limit_is_exact_and_takes_the_first_rows(available: list[int], max_samples: int, seed: int) -> None:
    rows = np.array(available)
    split = np.random.default_rng(seed).integers(0, 3, len(rows))
    limit = limit_rows(rows, split, max_samples)
    assert limit.sum() == min(max_samples, rows.sum())
    assert (limit <= rows).all()
    assert (limit >= 0).all()
    filled = [index for index in range(3) if rows[split == index].sum()]
    for index in filled:
        mine, taken = rows[split == index], limit[split == index]
        partly = np.flatnonzero(taken < mine)
        assert len(partly) == 0 or taken[partly[0] + 1 :].sum() == 0  # later episodes wait for earlier ones
        if max_samples >= len(filled):
            assert taken.sum() >= 1
        if max_samples < rows.sum():
            assert abs(taken.sum() - mine.sum() * max_samples / rows.sum()) < 1 + len(filled)


def test_limit_is_exact_beyond_the_range_of_floats() -> None:
    rows = np.array([4_000_000_001, 3_000_000_007, 2_999_999_993])
    for max_samples in (1_000_000_007, 9_999_999_999, 3_333_333_333):
        limit = limit_rows(rows, np.arange(3), max_samples)
        assert limit.sum() == max_samples
        exact = [int(count) * max_samples // int(rows.sum()) for count in rows]
        assert all(0 <= taken - share <= 1 for taken, share in zip(limit.tolist(), exact, strict=True))


@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=25),
    per_file=st.integers(1, 5),
    window=st.builds(Window, gap=st.integers(1, 3), horizon=st.integers(1, 3), history=st.integers(0, 2)),
    max_samples=st.none() | st.integers(1, 150),
    segment_bytes=st.integers(1, 4000),
    ratios=st.sampled_from([(0.0, 0.0), (0.2, 0.0), (0.2, 0.2)]),
)
def test_segments_cover_the_wanted_rows_once_in_order(
    lengths: list[int],
    per_file: int,
    window: Window,
    max_samples: int | None,
    segment_bytes: int,
    ratios: tuple[float, float],
) -> None:
    sequences = recording(lengths, per_file)
    options = {"val_ratio": ratios[0], "test_ratio": ratios[1]}
    try:
        plan = plan_of(sequences, window, max_samples=max_samples, segment_bytes=segment_bytes, **options)
    except DataError:
        assume(False)
    assert plan.num_rows + sum(plan.drops.values()) == sum(lengths)
    assert sum(plan.split_rows(index) for index in range(3)) == plan.num_rows
    covered = [
        (segment.first_episode + i, segment.sequences.episode_id(i), int(segment.split[i]), int(segment.row_limit[i]))
        for segment in plan.segments
        for i in range(segment.sequences.num_episodes)
    ]
    assert [episode for episode in covered if episode[3]] == [
        (i, sequences.episode_id(i), int(plan.split[i]), int(plan.row_limit[i])) for i in np.flatnonzero(plan.row_limit)
    ]
    assert [segment.index for segment in plan.segments] == list(range(len(plan.segments)))
    for segment in plan.segments:
        assert segment.row_limit.any()
        size = 8 * (segment.sequences.num_states.sum() * 3 + segment.sequences.num_actions.sum() * 2)
        assert size <= segment_bytes or segment.sequences.num_episodes == 1
    hashed = [segment.sequences.files[i].name for segment in plan.segments for i in segment.hash_files]
    used = {sequences.files[sequences.file_index[i]].name for i in np.flatnonzero(plan.row_limit)}
    assert len(set(hashed)) == len(hashed)
    assert used <= set(hashed)


def test_no_transitions_left() -> None:
    with pytest.raises(DataError, match=r"no transitions left: gap 9, horizon 1 .*longest of 5 has 4 states"):
        plan_of(recording([3, 2, 3, 3, 1]), Window(gap=9))


def test_episodes_without_rows_do_not_count_in_the_split() -> None:
    lengths = [2, 9] * 6  # with this gap every other episode gives no row
    plan = plan_of(recording(lengths), Window(gap=5))
    used = plan.split[plan.row_limit > 0]
    assert [(used == index).sum() for index in (TRAIN, VAL, TEST)] == [4, 1, 1]


def test_pieces_of_an_episode_stay_in_one_split() -> None:
    whole = recording([3] * 40, per_file=40)
    pieces = replace(whole, episode_index=np.arange(40) // 4)
    split = split_episodes(pieces, "d", 0.3, 0.3)
    assert all(len(set(split[i : i + 4])) == 1 for i in range(0, 40, 4))
    assert [(split[::4] == index).sum() for index in (TRAIN, VAL, TEST)] == [4, 3, 3]


def test_recorded_splits_are_taken_and_the_rest_is_counted() -> None:
    given = np.array([TRAIN, VAL, -1, TRAIN, TEST, -1])
    sequences = replace(recording([3, 4, 5, 6, 7, 8]), given_split=given)
    plan = plan_of(sequences, recorded_splits=True)
    assert [plan.split_rows(index) for index in (TRAIN, VAL, TEST)] == [3 + 6, 4, 7]
    assert plan.drops["no_recorded_split"] == 5 + 8
    with pytest.raises(DataError, match=r"names its train episodes; it names none; use splits: hashed"):
        plan_of(recording([3] * 6), recorded_splits=True)
    with pytest.raises(DataError, match=r"it names val"):
        plan_of(replace(sequences, given_split=np.full(6, VAL)), recorded_splits=True)


def test_no_transitions_left_for_one_split() -> None:
    sequences = recording([2] * 12)
    with pytest.raises(DataError, match=r"no transitions left for the (val|test) split: .*raise --max_samples"):
        plan_of(sequences, max_samples=2)
    assert plan_of(sequences, max_samples=3).num_rows == 3
    assert plan_of(sequences, max_samples=1, val_ratio=0, test_ratio=0).num_rows == 1
