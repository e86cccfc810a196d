"""Each filter drops exactly what was planted, counts add up, and a slow reference agrees."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from invdyn.config import load_config
from invdyn.errors import ConfigError, DataError
from invdyn.sequences.base import SequencePlan
from invdyn.sequences.native import NativeReader
from invdyn.transitions import blocks
from invdyn.transitions.dataset_config import DatasetConfig
from invdyn.transitions.extract import Listener, create_dataset
from invdyn.transitions.filters import FiltersConfig, select_episodes
from invdyn.transitions.plan import SPLITS
from invdyn.transitions.store import COLUMNS, TransitionStore
from invdyn.transitions.windows import Window
from tests.sequences import writers
from tests.sequences.recordings import Episode
from tests.transitions.datasets import LENGTHS, config_of, contents, record
from tests.transitions.reference import reference_rows

Places = set[tuple[int, int]]


def walk(lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> list[Episode]:
    """Episodes that move by small steps, with actions within -1 .. 1 that never reach them."""
    generator = np.random.default_rng(seed)
    return [
        (
            np.cumsum(generator.uniform(0.5, 1.0, size=(length + 1, 3)), axis=0),
            generator.uniform(-0.9, 0.9, size=(length, 2)),
        )
        for length in lengths
    ]


def create(folder: Path, filters: dict[str, Any], **values: Any) -> TransitionStore:
    options = {name: values.pop(name) for name in ("max_samples", "overwrite") if name in values}
    config = config_of(folder, filters=filters, **values)
    return create_dataset(config, local=True, **options)


def rows_of(store: TransitionStore) -> dict[tuple[int, int], tuple[np.ndarray, ...]]:
    found = {}
    for split in SPLITS:
        columns = store.load(split)
        for state, action, next_state, episode, step in zip(*(columns[c] for c in COLUMNS), strict=True):
            found[int(episode), int(step)] = (state, action, next_state)
    return found


def all_places(lengths: tuple[int, ...] = LENGTHS) -> Places:
    return {(episode, step) for episode, length in enumerate(lengths) for step in range(length)}


def dropped(store: TransitionStore, total: int = sum(LENGTHS)) -> dict[str, int]:
    """What was dropped by reason; with the rows it must add up to all recorded actions."""
    drops: dict[str, int] = store.manifest["drops"]
    assert store.manifest["num_rows"] + sum(drops.values()) == total
    assert store.manifest["num_rows"] == sum(store.num_rows(split) for split in SPLITS)
    return {reason: count for reason, count in drops.items() if count}


def test_stale_rows(tmp_path: Path) -> None:
    episodes = walk()
    planted = {(0, 0), (2, 5), (2, 6), (8, 10)}
    for episode, step in sorted(planted):
        episodes[episode][0][step + 1] = episodes[episode][0][step]
    record(tmp_path, episodes)
    store = create(tmp_path, {"drop_stale": True})
    assert set(rows_of(store)) == all_places() - planted
    assert dropped(store) == {"stale": 4}


def test_jumps(tmp_path: Path) -> None:
    episodes = walk()
    planted = {(0, 4), (5, 9), (10, 0)}
    for episode, step in planted:
        episodes[episode][0][step + 1 :] += 50.0
    record(tmp_path, episodes)
    store = create(tmp_path, {"drop_jumps": 10})
    assert set(rows_of(store)) == all_places() - planted
    assert dropped(store) == {"jump": 3}
    assert store.manifest["filters"]["typical_step"] > 0


@pytest.mark.parametrize("block_rows", [1, 4, 5, 6, 7, 1000])
def test_every_row_that_spans_a_jump_is_dropped(
    tmp_path: Path, block_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 8 * 5 * block_rows)
    episodes = walk((12, 12, 12))
    episodes[1][0][6:] += 50.0  # the step 5 -> 6
    record(tmp_path, episodes)
    store = create(tmp_path, {"drop_jumps": 10}, gap=2, history=1, horizon=3, val_ratio=0, test_ratio=0)
    # A row at t holds the states t - 1 .. t + 3: with the step from 5 to 6 for t = 3 .. 6.
    kept = {step for episode, step in rows_of(store) if episode == 1}
    assert kept == set(range(1, 10)) - {3, 4, 5, 6}
    assert dropped(store, 36)["jump"] == 4


def test_nothing_jumps_where_nothing_moves(tmp_path: Path) -> None:
    record(tmp_path, [(np.ones_like(states), actions) for states, actions in walk()])
    assert dropped(create(tmp_path, {"drop_jumps": 2})) == {}


@pytest.mark.parametrize("bounds", [None, [-1.0, 1.0], [[-1.0, -1.0], [1.0, 1.0]]])
def test_saturated_actions_are_dropped(tmp_path: Path, bounds: Any) -> None:
    episodes = walk()
    planted = {(0, 0, 0, 1.0), (2, 3, 1, -1.0), (2, 3, 0, 1.0), (7, 4, 1, 1.0), (9, 2, 0, -1.0)}
    for episode, step, dim, value in planted:
        episodes[episode][1][step, dim] = value
    record(tmp_path, episodes)
    store = create(tmp_path, {"saturated_actions": "drop", "action_bounds": bounds})
    assert set(rows_of(store)) == all_places() - {(episode, step) for episode, step, _, _ in planted}
    assert dropped(store) == {"saturated_action": 4}
    assert store.manifest["filters"]["action_bounds"] == [[-1.0, -1.0], [1.0, 1.0]]


def test_a_switch_is_not_saturated(tmp_path: Path) -> None:
    episodes = walk()
    for _, actions in episodes:
        actions[:, 1] = np.sign(actions[:, 1])
    episodes[3][1][1, 0] = 1.0
    episodes[4][1][1, 0] = -1.0
    record(tmp_path, episodes)
    store = create(tmp_path, {"saturated_actions": "drop"})
    assert set(rows_of(store)) == all_places() - {(3, 1), (4, 1)}
    assert store.manifest["filters"]["action_bounds"] == [[-1.0, None], [1.0, None]]


def test_actions_are_clipped(tmp_path: Path) -> None:
    episodes = walk()
    record(tmp_path, episodes)
    store = create(tmp_path, {"saturated_actions": "clip", "action_bounds": [[-0.5, -0.25], 0.5]})
    rows = rows_of(store)
    assert set(rows) == all_places()
    assert dropped(store) == {}
    changed = 0
    for (episode, step), (_, action, _) in rows.items():
        recorded = episodes[episode][1][step].astype(np.float32)
        np.testing.assert_array_equal(action, np.clip(recorded, np.float32([-0.5, -0.25]), np.float32(0.5)))
        changed += int((action != recorded).any())
    assert store.manifest["filters"]["clipped_rows"] == changed > 0


@pytest.mark.parametrize("history", [0, 2])
def test_constant_dims_leave_the_rows(tmp_path: Path, history: int) -> None:
    episodes = walk()
    for states, actions in episodes:
        states[:, 1] = 7.25
        actions[:, 0] = -0.5
    record(tmp_path, episodes)
    store = create(tmp_path, {"drop_constant_dims": True}, history=history)
    assert (store.state_dim, store.action_dim) == (2, 1)
    constant = store.constant_dims
    assert constant is not None
    assert constant.state == ((1, 7.25),)
    assert constant.action == ((0, -0.5),)
    for (episode, step), (state, action, next_state) in rows_of(store).items():
        states, actions = (values.astype(np.float32) for values in episodes[episode])
        np.testing.assert_array_equal(state, states[step - history : step + 1][:, [0, 2]].ravel())
        np.testing.assert_array_equal(action, actions[step, 1:])
        np.testing.assert_array_equal(next_state, states[step + 1, [0, 2]])
    assert len(store.moments.mean) == (history + 2) * 2 + 1


def test_a_dim_that_moves_once_stays(tmp_path: Path) -> None:
    episodes = walk()
    for states, _ in episodes:
        states[:, 1] = 7.25
    episodes[-1][0][-1, 1] = 7.5
    record(tmp_path, episodes)
    store = create(tmp_path, {"drop_constant_dims": True})
    assert store.state_dim == 3
    constant = store.constant_dims
    assert constant is not None
    assert constant.state == constant.action == ()


def test_all_dims_constant(tmp_path: Path) -> None:
    record(tmp_path, [(states, np.zeros_like(actions)) for states, actions in walk()])
    with pytest.raises(DataError, match=r"^one action dimension at least must vary: all 2 are constant"):
        create(tmp_path, {"drop_constant_dims": True})


def test_episode_filters_come_before_the_split(tmp_path: Path) -> None:
    record(tmp_path, walk())
    filters = {
        "min_length": 5,
        "episodes": {
            "include": [f"shard-0000{shard}.hdf5:{number}" for shard in (0, 1, 2) for number in range(4)],
            "exclude": ["shard-00001.hdf5:2"],
        },
    }
    store = create(tmp_path, filters, val_ratio=0.25, test_ratio=0.25)
    kept = {e for e, length in enumerate(LENGTHS) if e < 12 and e != 6 and length >= 5}
    assert {episode for episode, _ in rows_of(store)} == kept
    assert set(rows_of(store)) == {place for place in all_places() if place[0] in kept}
    assert dropped(store) == {"not_included": 11, "excluded": 8, "short_episode": 4 + 3 + 2}
    share = round(0.25 * len(kept))
    assert [store.manifest["splits"][s]["episodes"] for s in SPLITS] == [len(kept) - 2 * share, share, share]


def test_an_excluded_episode_is_not_read(tmp_path: Path) -> None:
    episodes = walk()
    episodes[5][0][3, 1] = np.nan
    record(tmp_path, episodes)
    with pytest.raises(DataError, match=r"^states and actions must be finite"):
        create(tmp_path, {"drop_stale": True})
    for more in ({}, {"drop_stale": True, "drop_jumps": 100, "drop_constant_dims": True}):
        store = create(tmp_path, {"episodes": {"exclude": ["shard-00001.hdf5:1"]}, **more}, overwrite=True)
        assert set(rows_of(store)) == {place for place in all_places() if place[0] != 5}
        assert dropped(store) == {"excluded": 10}


@pytest.mark.parametrize(
    "filters",
    [{}, {"drop_stale": True}, {"drop_jumps": 12}, {"drop_constant_dims": True}, {"saturated_actions": "drop"}],
)
@pytest.mark.parametrize("part_size_mb", [1e-6, 64.0])
def test_an_episode_without_rows_is_not_read(tmp_path: Path, filters: dict[str, Any], part_size_mb: float) -> None:
    nothing = [writers.Episode(np.full((rows, 3), np.nan), np.full((rows, 2), np.nan)) for rows in (0, 1, 2)]
    for name, more in (("all", nothing), ("long", [])):
        recorded = [writers.Episode(*episode) for episode in walk()]
        writers.write_robomimic(tmp_path / name / "sequence" / "r", [*recorded, *more])
    values = {"gap": 2, "part_size_mb": part_size_mb, "format_options": {"on_error": "skip"}}
    stores = [create(tmp_path / name, filters, **values) for name in ("all", "long")]
    assert stores[0].manifest["skipped_files"] == {}
    assert stores[0].content_hash == stores[1].content_hash


def inspect(folder: Path) -> SequencePlan:
    return NativeReader(folder / "sequence" / "r").inspect()


def test_success_only(tmp_path: Path) -> None:
    record(tmp_path, walk())
    sequences = inspect(tmp_path)
    success = np.array([1, 0, -1, 1] + [1] * 10)
    found = select_episodes(FiltersConfig(success_only=True), replace(sequences, success=success))
    assert np.flatnonzero(found["not_successful"]).tolist() == [1, 2]
    with pytest.raises(DataError, match=r"^filters: success_only needs a recording that says"):
        create(tmp_path, {"success_only": True})


def test_an_unknown_episode_names_a_near_one(tmp_path: Path) -> None:
    record(tmp_path, walk())
    with pytest.raises(DataError, match=r"'shard-0001.hdf5:1' is none; did you mean 'shard-00001.hdf5:1'\?$"):
        create(tmp_path, {"episodes": {"exclude": ["shard-0001.hdf5:1"]}})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{drop_stael: true}", r"unknown key 'filters.drop_stael'; did you mean 'drop_stale'\?"),
        ("{episodes: {includes: []}}", r"unknown key 'filters.episodes.includes'; did you mean 'include'\?"),
        ("{saturated_actions: clip}", r"saturated_actions: clip needs action_bounds"),
        ("{action_bounds: [-1, 1]}", r"action_bounds needs saturated_actions: drop or clip"),
        ("{saturated_actions: clip, action_bounds: [1, -1]}", r"with low below high"),
        ("{saturated_actions: clip, action_bounds: [[0, 0], [1, 1, 1]]}", r"one number per action dimension"),
        ("{drop_jumps: 0}", r"filters.drop_jumps: "),
        ("{min_length: 0}", r"filters.min_length: "),
    ],
)
def test_configs_that_cannot_be_meant(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "d.yaml"
    path.write_text(f"name: d\nbuffer_path: r\nfilters: {text}\n")
    with pytest.raises(ConfigError, match=message):
        load_config(DatasetConfig, path)


def test_bounds_must_fit_the_action(tmp_path: Path) -> None:
    record(tmp_path, walk())
    with pytest.raises(DataError, match=r"one per action dimension \(2\); got 3 of them$"):
        create(tmp_path, {"saturated_actions": "drop", "action_bounds": [[0, 0, 0], [1, 1, 1]]})


def test_everything_filtered(tmp_path: Path) -> None:
    record(tmp_path, walk())
    with pytest.raises(DataError, match=r"^no episodes left: the filters leave out all 14"):
        create(tmp_path, {"min_length": 50})
    with pytest.raises(DataError, match=r"^no transitions left: the filters leave out all of them"):
        create(tmp_path, {"saturated_actions": "drop", "action_bounds": [2, 3]})
    assert not Path(config_of(tmp_path).transitions_path).exists()


ALL = {
    "drop_stale": True,
    "drop_jumps": 10,
    "saturated_actions": "drop",
    "drop_constant_dims": True,
    "min_length": 3,
    "episodes": {"exclude": ["shard-00000.hdf5:2"]},
}


def faulty() -> list[Episode]:
    """A recording with every fault, often."""
    episodes = walk()
    generator = np.random.default_rng(1)
    for states, actions in episodes:
        states[:, 2] = 3.0
        for step in range(len(actions)):
            fault = generator.integers(8)
            if fault == 0:
                states[step + 1] = states[step]
            elif fault == 1:
                states[step + 1 :, :2] += 80.0
            elif fault == 2:
                actions[step, 0] = 1.0
    return episodes


@pytest.mark.parametrize("max_samples", [3, 10, 41, 10_000])
def test_max_samples_stays_exact(tmp_path: Path, max_samples: int) -> None:
    record(tmp_path, faulty())
    everything = rows_of(create(tmp_path, ALL, output_path=str(tmp_path / "all")))
    store = create(tmp_path, ALL, max_samples=max_samples)
    assert store.manifest["num_rows"] == min(max_samples, len(everything))
    dropped(store)
    for place, row in rows_of(store).items():
        for found, expected in zip(row, everything[place], strict=True):
            np.testing.assert_array_equal(found, expected)


def test_parts_of_any_size_give_the_same_rows(tmp_path: Path) -> None:
    record(tmp_path, faulty())
    stores = [
        create(tmp_path, ALL, part_size_mb=size / 2**20, output_path=str(tmp_path / str(size)), max_samples=30)
        for size in (1, 700, 10**6)
    ]
    for store in stores[1:]:
        assert store.manifest["drops"] == stores[0].manifest["drops"]
        for split in SPLITS:
            for column, values in store.load(split).items():
                np.testing.assert_array_equal(values, stores[0].load(split)[column])


def test_an_interrupted_run_continues(tmp_path: Path) -> None:
    record(tmp_path, faulty())
    whole = create(tmp_path, ALL, output_path=str(tmp_path / "whole"))
    config = config_of(tmp_path, filters=ALL)
    calls = iter(range(3))

    def stop(rows: int) -> None:
        if next(calls) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        create_dataset(config, local=True, listener=Listener(on_rows=stop))
    assert contents(create_dataset(config, local=True).path) == contents(whole.path)


def test_filters_that_are_off_leave_no_trace(tmp_path: Path) -> None:
    record(tmp_path, walk())
    plain = create_dataset(config_of(tmp_path, output_path=str(tmp_path / "plain")), local=True)
    off = create(tmp_path, {"drop_stale": False, "min_length": 1}, output_path=str(tmp_path / "off"))
    assert contents(plain.path) == contents(off.path)
    assert not {"filters", "constant_dims"} & set(plain.manifest)
    assert "filters" not in plain.manifest["config"]


def test_local_and_ray_give_the_same_bytes(tmp_path: Path, ray_session: None) -> None:
    record(tmp_path, faulty())
    local = create(tmp_path, ALL, max_samples=37, output_path=str(tmp_path / "local"))
    config = config_of(tmp_path, filters=ALL)
    on_ray = create_dataset(config, max_samples=37, num_workers=2)
    assert contents(on_ray.path) == contents(local.path)


@settings(max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=8),
    window=st.builds(Window, gap=st.integers(1, 3), horizon=st.integers(1, 3), history=st.integers(0, 2)),
    part_bytes=st.integers(1, 1500),
    states_after=st.integers(0, 1),
    max_samples=st.none() | st.integers(1, 40),
    seed=st.integers(0, 99),
    stale=st.booleans(),
    saturated=st.booleans(),
    min_length=st.integers(1, 4),
)
def test_rows_equal_a_slow_reference(
    tmp_path_factory: pytest.TempPathFactory,
    lengths: list[int],
    window: Window,
    part_bytes: int,
    states_after: int,
    max_samples: int | None,
    seed: int,
    stale: bool,
    saturated: bool,
    min_length: int,
) -> None:
    folder = tmp_path_factory.mktemp("filters")
    generator = np.random.default_rng(seed)
    episodes = [
        (generator.integers(0, 2, size=(n + 1 + states_after, 2)) * 1.0, generator.integers(-2, 3, size=(n + 1, 2)) / 2)
        for n in lengths
    ]
    record(folder, episodes)
    filters: dict[str, Any] = {"drop_stale": stale, "min_length": min_length}
    if saturated:
        filters |= {"saturated_actions": "drop", "action_bounds": [-1, 1]}
    expected = {}
    for state, action, next_state, episode, step in reference_rows(dict(enumerate(episodes)), window):
        is_stale = stale and np.array_equal(state[-2:], next_state)
        is_saturated = saturated and np.abs(action).max() >= 1
        if len(episodes[episode][1]) >= min_length and not is_stale and not is_saturated:
            expected[episode, step] = (state, action, next_state)
    values = {"val_ratio": 0, "test_ratio": 0, "part_size_mb": part_bytes / 2**20, **vars(window)}
    if not expected:
        with pytest.raises(DataError, match=r"^no (transitions|episodes) left"):
            create(folder, filters, **values)
        return
    with patch.object(blocks, "BLOCK_BYTES", part_bytes // 2 + 1):
        store = create(folder, filters, max_samples=max_samples, **values)
    dropped(store, sum(length + 1 for length in lengths))
    found = rows_of(store)
    assert list(found) == list(expected)[:max_samples]
    for place, row in found.items():
        for value, right in zip(row, expected[place], strict=True):
            np.testing.assert_array_equal(value, np.asarray(right, np.float32))
