from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from invdyn.errors import ConfigError, DataError
from invdyn.statistics import transition_features
from invdyn.transitions import blocks
from invdyn.transitions.dataset_config import DatasetConfig
from invdyn.transitions.extract import SCHEDULING_TIMEOUT, Listener, create_dataset, read_transitions
from invdyn.transitions.plan import SPLITS, limit_rows
from invdyn.transitions.segment import hash_files
from invdyn.transitions.store import COLUMNS, TransitionStore
from invdyn.transitions.windows import Window
from tests.sequences.recordings import make_episodes, write_recording, write_shard
from tests.transitions.datasets import LENGTHS, config_of, contents, record
from tests.transitions.reference import reference_rows


def create(config: DatasetConfig, **options: Any) -> TransitionStore:
    return create_dataset(config, local=True, **options)


def interrupt_after(config: DatasetConfig, segments: int, **options: Any) -> Path:
    """Leave the dataset as a run does that is stopped after some segments."""
    calls: Iterator[int] = iter(range(segments + 1))  # the first call tells what was done before

    def stop(rows: int) -> None:
        if next(calls) == segments:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        create(config, listener=Listener(on_rows=stop), **options)
    return Path(config.transitions_path)


@settings(max_examples=40)
@given(
    lengths=st.lists(st.integers(2, 9), min_size=3, max_size=12),
    window=st.builds(Window, gap=st.integers(1, 3), horizon=st.integers(1, 3), history=st.integers(0, 2)),
    max_samples=st.none() | st.integers(3, 60),
    part_bytes=st.integers(1, 1500),
    block_bytes=st.integers(1, 1500),
    states_after=st.integers(0, 1),
    ratio=st.sampled_from([0.0, 0.2]),
)
def test_dataset_equals_the_reference(
    tmp_path_factory: pytest.TempPathFactory,
    lengths: list[int],
    window: Window,
    max_samples: int | None,
    part_bytes: int,
    block_bytes: int,
    states_after: int,
    ratio: float,
) -> None:
    folder = tmp_path_factory.mktemp("property")
    episodes = make_episodes(lengths, states_after=states_after)
    record(folder, episodes)
    config = config_of(
        folder,
        **vars(window),
        part_size_mb=part_bytes / 2**20,
        val_ratio=ratio,
        test_ratio=ratio,
        output_path=str(folder),
    )
    expected = list(reference_rows(dict(enumerate(episodes)), window))
    used = {row[3] for row in expected}
    if not expected or (ratio and len(used) < 3):
        with pytest.raises(DataError, match=r"^each split needs" if expected else r"^no transitions left"):
            create(config, max_samples=max_samples)
        assert [path.name for path in folder.iterdir()] == ["sequence"]
        return
    with patch.object(blocks, "BLOCK_BYTES", block_bytes):
        store = create(config, max_samples=max_samples)

    manifest = store.manifest
    assert manifest["num_rows"] == min(max_samples or len(expected), len(expected))
    assert manifest["num_rows"] + sum(manifest["drops"].values()) == sum(lengths)
    sequences_split = [store.load(split)["episode"] for split in SPLITS]
    assert sum(map(len, sequences_split)) == manifest["num_rows"]
    seen: set[int] = set()
    for name, episode in zip(SPLITS, sequences_split, strict=True):
        assert seen.isdisjoint(episode)
        seen |= set(episode.tolist())
        assert manifest["splits"][name]["rows"] == store.num_rows(name) == len(episode)
        assert manifest["splits"][name]["episodes"] == len(set(episode.tolist()))
        assert (len(episode) > 0) == (name == "train" or ratio > 0)
        assert_rows_equal_the_reference(store, name, dict(enumerate(episodes)), window, ratio)
    assert_statistics_equal_numpy(store)


def assert_rows_equal_the_reference(
    store: TransitionStore, split: str, episodes: dict[int, Any], window: Window, ratio: float
) -> None:
    """Rows of a split are the first ones of its episodes, in order."""
    found = store.load(split)
    plan_split = split_of(len(episodes), ratio, {row[3] for row in reference_rows(episodes, window)})
    mine = {number: episode for number, episode in episodes.items() if SPLITS[plan_split[number]] == split}
    expected = list(reference_rows(mine, window))[: store.num_rows(split)]
    assert len(expected) == store.num_rows(split)
    for column, values in zip(COLUMNS, zip(*expected, strict=True), strict=False):
        np.testing.assert_array_equal(found[column], np.array(values, dtype=found[column].dtype))


def split_of(total: int, ratio: float, used: Iterable[int] | None = None) -> list[int]:
    """The split of each episode: by the hash of the dataset's name, the file's and the number in it, lowest first.

    Only the episodes in `used` count: those that give a row.
    """
    names = [f"d/shard-{episode // 4:05d}.hdf5:{episode % 4}" for episode in range(total)]
    counted = range(total) if used is None else used
    ranked = sorted(counted, key=lambda i: hashlib.blake2b(names[i].encode(), digest_size=8).digest())
    share = max(1, round(ratio * len(ranked))) if ratio else 0
    return [1 if i in ranked[:share] else 2 if i in ranked[share : 2 * share] else 0 for i in range(total)]


def assert_statistics_equal_numpy(store: TransitionStore) -> None:
    rows = store.load("train")
    features = transition_features(rows["state"], rows["next_state"])
    table = np.concatenate([features, rows["action"].reshape(len(features), -1)], axis=1).astype(np.longdouble)
    moments = store.moments
    assert moments.count == len(table)
    centred = table - table.mean(axis=0)
    comoment = centred.T @ centred
    scale = np.sqrt(np.diag(comoment)) + 1e-300
    np.testing.assert_allclose(moments.mean, table.mean(axis=0).astype(float), rtol=0, atol=1e-12 * np.abs(table).max())
    np.testing.assert_allclose(
        (moments.comoment / np.outer(scale, scale)).astype(float),
        (comoment / np.outer(scale, scale)).astype(float),
        rtol=0,
        atol=1e-12,
    )
    np.testing.assert_allclose(moments.std, table.std(axis=0).astype(float), rtol=1e-12)
    np.testing.assert_array_equal(moments.minimum, table.min(axis=0))
    np.testing.assert_array_equal(moments.maximum, table.max(axis=0))


@pytest.mark.parametrize("max_samples", [3, 4, 10, 50, 96, 97, 98, 10_000])
def test_max_samples_is_exact(tmp_path: Path, max_samples: int) -> None:
    assert sum(LENGTHS) == 97
    record(tmp_path)
    store = create(config_of(tmp_path), max_samples=max_samples)
    assert sum(store.num_rows(split) for split in SPLITS) == min(max_samples, 97)
    assert store.manifest["drops"]["max_samples"] == max(97 - max_samples, 0)
    whole = create(config_of(tmp_path, output_path=str(tmp_path / "whole")))
    for split in SPLITS:  # fewer rows are the first of the same
        rows, all_rows = store.load(split), whole.load(split)
        for column in COLUMNS:
            np.testing.assert_array_equal(rows[column], all_rows[column][: len(rows[column])])


@pytest.mark.parametrize("part_bytes", [1, 300, 5000, 10**9])
def test_part_size_changes_no_row_and_no_statistic(tmp_path: Path, part_bytes: int) -> None:
    record(tmp_path)
    one = create(config_of(tmp_path, part_size_mb=1.0, output_path=str(tmp_path / "one")))
    store = create(config_of(tmp_path, part_size_mb=part_bytes / 2**20))
    for split in SPLITS:
        for column in COLUMNS:
            np.testing.assert_array_equal(store.load(split)[column], one.load(split)[column])
    np.testing.assert_allclose(store.moments.comoment, one.moments.comoment, rtol=1e-9)


def test_manifest_describes_the_sources(tmp_path: Path) -> None:
    folder = record(tmp_path)
    store = create(config_of(tmp_path))
    shards = sorted(folder.iterdir())
    assert store.manifest["sources"] == [
        {"name": shard.name, "size": shard.stat().st_size, "xxh3_128": hash_files([str(shard)])} for shard in shards
    ]
    assert store.manifest["row"]["state_dim"] == 3
    assert str(tmp_path) not in json.dumps(store.manifest)  # the same dataset in another folder is the same


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int32])
def test_input_types(tmp_path: Path, dtype: type) -> None:
    episodes = make_episodes(LENGTHS, dtype=dtype)
    record(tmp_path, episodes)
    rows = create(config_of(tmp_path)).load("train")
    assert {rows[column].dtype for column in COLUMNS[:3]} == {np.dtype(np.float32)}
    episode, step = rows["episode"][-1], rows["step"][-1]
    assert rows["state"][-1].tolist() == episodes[episode][0][step].astype(np.float32).tolist()


def test_differences_of_float64_states_survive(tmp_path: Path) -> None:
    """The stored rows are float32; nothing of the precision of the two states is lost before that."""
    states = 1e6 + np.arange(22.0).reshape(11, 2) / 64
    record(tmp_path, [(states, np.zeros((10, 1)))] * 3)
    rows = create(config_of(tmp_path)).load("train")
    np.testing.assert_array_equal(rows["next_state"], states[1:].astype(np.float32))


def test_splits_can_be_left_out(tmp_path: Path) -> None:
    record(tmp_path)
    store = create(config_of(tmp_path, val_ratio=0, test_ratio=0, horizon=2, history=1))
    assert [store.num_rows(split) for split in SPLITS[1:]] == [0, 0]
    empty = store.load("val")
    assert {column: empty[column].shape for column in COLUMNS} == {
        "state": (0, 6),
        "action": (0, 2, 2),
        "next_state": (0, 3),
        "episode": (0,),
        "step": (0,),
    }


def test_single_file_and_flat_arrays(tmp_path: Path) -> None:
    episodes = make_episodes([4, 3, 5])
    arrays = {"data/state": np.arange(15.0), "data/action": np.arange(12.0)}
    shard = write_shard(tmp_path / "sequence" / "one.hdf5", episodes, arrays=arrays)
    store = create(config_of(tmp_path, buffer_path=str(shard)))
    assert store.path == str(tmp_path / "inverse_dynamics" / "one.hdf5")
    assert (store.state_dim, store.action_dim) == (1, 1)
    rows = np.concatenate([store.load(split)["state"] for split in SPLITS])
    assert sorted(rows[:, 0]) == [0, 1, 2, 3, 5, 6, 7, 9, 10, 11, 12, 13]


def test_a_long_episode_among_short_ones(tmp_path: Path) -> None:
    record(tmp_path, make_episodes([1, 200, 1, 1, 1, 90, 1]))
    store = create(config_of(tmp_path, gap=2, val_ratio=0, test_ratio=0))
    assert store.manifest["num_rows"] == 199 + 89
    assert store.manifest["drops"]["no_next_state"] == 7


def shape_meta(*keys: str, **shapes: list[int]) -> dict[str, Any]:
    return {"obs": {key: {"shape": shapes[key]} if key in shapes else {} for key in keys}}


def record_two_keys(tmp_path: Path) -> None:
    for shard in range(3):
        arrays = {"data/a": np.arange(18.0).reshape(9, 2) + 100 * shard, "data/b": -np.arange(9.0)}
        write_shard(tmp_path / f"sequence/r/{shard}.hdf5", make_episodes([2, 5]), arrays=arrays, without=["data/state"])


def test_state_keys_keep_their_order(tmp_path: Path) -> None:
    record_two_keys(tmp_path)
    for keys in (("a", "b"), ("b", "a")):
        store = create(config_of(tmp_path, shape_meta=shape_meta(*keys), output_path=str(tmp_path / "".join(keys))))
        rows = np.concatenate([store.load(split)["state"] for split in SPLITS])
        scalar = rows[:, keys.index("b") * 2]
        assert (scalar <= 0).all()
        assert store.manifest["row"]["state_keys"] == list(keys)


def test_another_order_of_keys_is_another_plan(tmp_path: Path) -> None:
    record_two_keys(tmp_path)
    interrupt_after(config_of(tmp_path, shape_meta=shape_meta("a", "b")), 1)
    with pytest.raises(DataError, match="unfinished dataset with another plan"):
        create(config_of(tmp_path, shape_meta=shape_meta("b", "a")))


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        (shape_meta("state", state=[4]), "state is stated as 4 numbers, .*/sequence/r has 3"),
        (shape_meta("state") | {"action": {"shape": [1, 3]}}, "action is stated as 3 numbers, .*/sequence/r has 2"),
        (shape_meta("position"), r"key 'data/position' must be an array: .*data/state \(36, 3\)"),
        (shape_meta("state") | {"action_key": "actions"}, "key 'data/actions' must be an array: .* it is missing"),
    ],
)
def test_shape_meta_must_match(tmp_path: Path, meta: dict[str, Any], message: str) -> None:
    record(tmp_path)
    with pytest.raises(DataError, match=message):
        create(config_of(tmp_path, shape_meta=meta))
    assert not (tmp_path / "inverse_dynamics").exists()


# The output folder: continue, refuse, replace


@pytest.fixture
def whole(tmp_path: Path) -> dict[str, bytes]:
    """The files of an uninterrupted run."""
    record(tmp_path)
    files = contents(create(config_of(tmp_path, output_path=str(tmp_path / "whole"))).path)
    assert len(files) > 8
    return files


@pytest.mark.parametrize("segments", [0, 1, 3])
def test_interrupted_run_continues(tmp_path: Path, whole: dict[str, bytes], segments: int) -> None:
    output = interrupt_after(config_of(tmp_path), segments)
    assert not (output / "manifest.json").exists()
    with pytest.raises(DataError, match=r"dataset is unfinished: .* run experiments/create_dataset.py again"):
        TransitionStore(output)
    kept = {path: path.stat().st_mtime_ns for path in output.glob("*/part-*.h5")}
    assert bool(kept) == (segments > 0)
    done: list[int] = []
    create(config_of(tmp_path), listener=Listener(on_rows=done.append))
    assert bool(done[0]) == (segments > 0)
    assert contents(output) == whole
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def truncate(output: Path) -> None:
    path = sorted(output.glob("train/part-*.h5"))[0]
    path.write_bytes(path.read_bytes()[:900])


def empty(output: Path) -> None:
    sorted(output.glob("train/part-*.h5"))[0].write_bytes(b"")


def remove(output: Path) -> None:
    sorted(output.glob("train/part-*.h5"))[0].unlink()


def damage_record(output: Path) -> None:
    (output / ".progress/segment-00001.json").write_text('{"index": 1, "parts"')


def leave_temporary_files(output: Path) -> None:
    for name in (
        "train/.part-00003.h5.77.00c0ffee.tmp",
        ".manifest.json.77.tmp",
        ".progress/.segment-00003.json.77.tmp",
    ):
        (output / name).write_bytes(b"half")


@pytest.mark.parametrize("damage", [truncate, empty, remove, damage_record, leave_temporary_files])
def test_what_a_crash_damaged_is_made_again(
    tmp_path: Path, whole: dict[str, bytes], damage: Callable[[Path], None]
) -> None:
    damage(output := interrupt_after(config_of(tmp_path), 3))
    create(config_of(tmp_path))
    assert contents(output) == whole


def touch_shard(tmp_path: Path) -> dict[str, Any]:
    write_recording(tmp_path / "sequence/r", make_episodes(LENGTHS, seed=1))
    return {}


@pytest.mark.parametrize(
    "change",
    [
        {"gap": 2},
        {"horizon": 2},
        {"history": 1},
        {"val_ratio": 0.2},
        {"name": "other"},
        {"part_size_mb": 1.0},
        {"max_samples": 50},
        touch_shard,
    ],
)
def test_another_plan_is_refused(tmp_path: Path, whole: dict[str, bytes], change: Any) -> None:
    output = interrupt_after(config_of(tmp_path), 3)
    before = contents(output)
    values = change(tmp_path) if callable(change) else dict(change)
    max_samples = values.pop("max_samples", None)
    other = config_of(tmp_path, **values)
    with pytest.raises(DataError, match=r"holds an unfinished dataset with another plan .* give --overwrite"):
        create(other, max_samples=max_samples)
    assert contents(output) == before
    create(other, max_samples=max_samples, overwrite=True)
    alone = create(config_of(tmp_path, **values, output_path=str(tmp_path / "alone")), max_samples=max_samples)
    assert contents(output) == contents(alone.path)
    assert contents(output) != whole


def test_unfinished_dataset_whose_plan_cannot_be_read(tmp_path: Path, whole: dict[str, bytes]) -> None:
    output = interrupt_after(config_of(tmp_path), 3)
    (output / ".progress/plan.json").write_text("{")
    with pytest.raises(DataError, match="another plan"):
        create(config_of(tmp_path))
    create(config_of(tmp_path), overwrite=True)
    assert contents(output) == whole


def test_interrupted_overwrite_continues(tmp_path: Path, whole: dict[str, bytes]) -> None:
    create(config_of(tmp_path, gap=2))
    output = interrupt_after(config_of(tmp_path), 3, overwrite=True)
    done: list[int] = []
    create(config_of(tmp_path), overwrite=True, listener=Listener(on_rows=done.append))
    assert done[0] > 0
    assert contents(output) == whole


def test_finished_dataset_is_refused_and_untouched(tmp_path: Path) -> None:
    record(tmp_path)
    store = create(config_of(tmp_path))
    before = contents(store.path)
    for config in (config_of(tmp_path), config_of(tmp_path, gap=2)):
        with pytest.raises(DataError, match=r"dataset exists already: .*; give --overwrite to replace it"):
            create(config)
        assert contents(store.path) == before


def test_overwrite_removes_only_our_files(tmp_path: Path, whole: dict[str, bytes]) -> None:
    foreign = {"notes.txt", "part-00000.h5", "train/part-1.h5", "train/counterpart-00001.h5", "train/part-00000.h5.bak"}
    output = Path(create(config_of(tmp_path, part_size_mb=1e-6)).path)  # more parts than the next will have
    for name in foreign:
        (output / name).write_text("mine")
    create(config_of(tmp_path), overwrite=True)
    files = contents(output)
    assert {files.pop(name) for name in foreign} == {b"mine"}
    assert files == whole


def test_overwrite_does_not_reuse_parts_of_a_finished_dataset(tmp_path: Path, whole: dict[str, bytes]) -> None:
    output = interrupt_after(config_of(tmp_path), 5)
    progress = contents(output / ".progress")
    create(config_of(tmp_path))
    (output / ".progress").mkdir()  # as a run leaves it that was killed right after its manifest
    for name, content in progress.items():
        (output / ".progress" / name).write_bytes(content)
    part = sorted(output.glob("train/part-*.h5"))[0]
    with h5py.File(part, "a") as file:  # whole to look at, but of other values
        file["state"][...] = 0
    create(config_of(tmp_path), overwrite=True)
    assert contents(output) == whole


def test_run_killed_right_after_its_manifest_finishes(
    tmp_path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(output: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr("invdyn.transitions.output_folder._clear_progress", stop)
        with pytest.raises(KeyboardInterrupt):
            create(config_of(tmp_path, output_path=str(tmp_path / "out")))
    create(config_of(tmp_path, output_path=str(tmp_path / "out")))
    assert contents(tmp_path / "out") == whole


def test_parts_without_manifest_or_progress_are_refused(tmp_path: Path, whole: dict[str, bytes]) -> None:
    output = Path(create(config_of(tmp_path)).path)
    (output / "manifest.json").unlink()  # as an overwrite leaves it that was killed while it removed
    before = contents(output)
    with pytest.raises(DataError, match=r"holds parts of a dataset without manifest\.json .* give --overwrite"):
        create(config_of(tmp_path, gap=2))
    assert contents(output) == before
    create(config_of(tmp_path), overwrite=True)
    assert contents(output) == whole


def test_nothing_is_written_before_the_plan_is_accepted(tmp_path: Path) -> None:
    record(tmp_path)

    def refuse(plan: object) -> None:
        raise ConfigError("no cluster")

    with pytest.raises(ConfigError, match="no cluster"):
        create(config_of(tmp_path), listener=Listener(on_plan=refuse))
    assert not (tmp_path / "inverse_dynamics").exists()


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("below", ["", "/below"])
def test_output_that_is_a_file(tmp_path: Path, below: str, overwrite: bool) -> None:
    record(tmp_path)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(DataError, match=r"^cannot (write|clear) [^\n]*/file[^\n]*$"):
        create(config_of(tmp_path, output_path=f"{tmp_path}/file{below}"), overwrite=overwrite)
    assert (tmp_path / "file").read_text() == "mine"


def test_parts_on_another_disk_are_noticed(tmp_path: Path) -> None:
    record(tmp_path)
    config = config_of(tmp_path)

    def remove_val(rows: int) -> None:
        for path in Path(config.transitions_path).glob("val/*"):
            path.unlink()

    with pytest.raises(DataError, match=r"part is missing after it was written: .*disk that all nodes share"):
        create(config, listener=Listener(on_rows=remove_val))
    assert not (Path(config.transitions_path) / "manifest.json").exists()


# On Ray


def test_local_and_ray_give_the_same_bytes(tmp_path: Path, whole: dict[str, bytes], ray_session: None) -> None:
    for workers in (1, 3):
        output = tmp_path / f"workers{workers}"
        create_dataset(config_of(tmp_path, output_path=str(output)), num_workers=workers)
        assert contents(output) == whole


def test_ray_data_still_has_the_setting_that_keeps_workers_busy() -> None:
    from ray.data._internal.execution import streaming_executor_state

    assert hasattr(streaming_executor_state, SCHEDULING_TIMEOUT)


def test_interrupted_run_continues_on_ray(tmp_path: Path, whole: dict[str, bytes], ray_session: None) -> None:
    output = interrupt_after(config_of(tmp_path), 3)
    create_dataset(config_of(tmp_path))
    assert contents(output) == whole


def test_bad_values_are_one_line_on_ray(tmp_path: Path, ray_session: None) -> None:
    episodes = make_episodes(LENGTHS)
    episodes[6][1][2, 1] = np.nan
    record(tmp_path, episodes)
    with pytest.raises(
        DataError, match=r"^states and actions must be finite: [^\n]*shard-00001\.hdf5: action holds nan"
    ):
        create_dataset(config_of(tmp_path))
    assert not (tmp_path / "inverse_dynamics/r/manifest.json").exists()


def test_read_transitions(tmp_path: Path, ray_session: None) -> None:
    record(tmp_path)
    store = create(config_of(tmp_path, horizon=2, history=1, test_ratio=0))
    for split in ("train", "val"):
        rows, expected = read_transitions(store.path, split).take_all(), store.load(split)
        assert len(rows) == store.num_rows(split)
        rows.sort(key=lambda row: (row["episode"], row["step"]))
        order = np.lexsort([expected["step"], expected["episode"]])
        for column in COLUMNS:
            found = np.array([row[column] for row in rows])
            assert found.dtype == expected[column].dtype
            np.testing.assert_array_equal(found, expected[column][order])
    assert read_transitions(store.path, "test").count() == 0


def test_read_transitions_of_an_unfinished_dataset(tmp_path: Path) -> None:
    record(tmp_path)
    output = interrupt_after(config_of(tmp_path), 1)
    with pytest.raises(DataError, match="dataset is unfinished"):
        read_transitions(output)
    with pytest.raises(DataError, match="dataset not found"):
        read_transitions(tmp_path / "nowhere")


def test_reference_of_the_limit_is_the_plan(tmp_path: Path) -> None:
    """Each split's rows are its share of `max_samples`."""
    record(tmp_path)
    store = create(config_of(tmp_path), max_samples=40)
    split = np.array(split_of(len(LENGTHS), 0.1))
    limit = limit_rows(np.array(LENGTHS), split, 40)
    assert [store.num_rows(name) for name in SPLITS] == [int(limit[split == i].sum()) for i in range(3)]
