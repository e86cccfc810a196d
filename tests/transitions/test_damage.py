"""Files that turn out to be damaged when they are read: an error that names them, or as if they were not there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from invdyn.doctor.examine import diagnose
from invdyn.errors import DataError
from invdyn.sequences.registry import open_sequences
from invdyn.transitions.dataset_config import DatasetConfig
from invdyn.transitions.extract import Listener, create_dataset
from invdyn.transitions.plan import ExtractionPlan
from invdyn.transitions.windows import Window
from tests.sequences import writers
from tests.sequences.recordings import make_episodes, write_recording, write_shard
from tests.transitions.datasets import LENGTHS, config_of, contents

SKIP = {"format_options": {"on_error": "skip"}}
BAD = ("shard-00001.hdf5", "shard-00003.hdf5")


def put_nan(path: Path) -> None:
    with h5py.File(path, "a") as file:
        file["data/action"][2, 1] = np.nan


def put_infinity(path: Path) -> None:
    with h5py.File(path, "a") as file:
        file["data/state"][-1, 0] = -np.inf


def corrupt_a_chunk(path: Path) -> None:
    """Write the states compressed, and damage their bytes: the file opens, and its lengths are right."""
    with h5py.File(path, "a") as file:
        states = file["data/state"][()]
        del file["data/state"]
        file.create_dataset("data/state", data=states, chunks=(4, 3), compression="gzip", fletcher32=True)
        chunk = file["data/state"].id.get_chunk_info(2)
    content = bytearray(path.read_bytes())
    content[chunk.byte_offset + 8 : chunk.byte_offset + 24] = bytes(16)
    path.write_bytes(content)


def recordings(folder: Path, damage: Callable[[Path], None] = put_nan) -> tuple[DatasetConfig, DatasetConfig]:
    """Return the configs of a recording with damaged shards, and of the same recording without them."""
    for name in ("damaged", "sound"):
        write_recording(folder / name / "sequence/r", make_episodes(LENGTHS * 2))
    for name in BAD:
        damage(folder / "damaged/sequence/r" / name)
        (folder / "sound/sequence/r" / name).unlink()
    return config_of(folder / "damaged", **SKIP), config_of(folder / "sound")


def assert_same_dataset(skipping: Path, sound: Path, num_skipped: int) -> dict[str, str]:
    """Compare two datasets to the byte, and return the files that one of them skipped."""
    found, expected = contents(skipping), contents(sound)
    manifests = [json.loads(files.pop("manifest.json")) for files in (found, expected)]
    skipped: dict[str, str] = manifests[0].pop("skipped_files")
    assert manifests[1].pop("skipped_files") == {}
    assert manifests[0] == manifests[1]
    assert found == expected
    assert len(skipped) == num_skipped
    return skipped


@pytest.mark.parametrize("damage", [put_nan, put_infinity, corrupt_a_chunk])
def test_skipped_files_are_as_if_they_were_not_there(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    config, sound = recordings(tmp_path, damage)
    told: list[set[str]] = []
    listener = Listener(on_skip=lambda files: told.append({Path(path).name for path in files}))
    store = create_dataset(config, local=True, listener=listener)
    skipped = assert_same_dataset(store.path, create_dataset(sound, local=True).path, 2)
    assert {Path(path).name for path in skipped} == set(BAD)
    assert told == [set(BAD)]  # both were found in one pass
    for path, reason in skipped.items():
        assert path in reason
        assert ("must be finite" in reason) == (damage is not corrupt_a_chunk)


def test_files_that_are_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that are skipped have one name wherever they are told of."""
    config, sound = recordings(tmp_path)
    shutil.move(config.sequence_path, tmp_path / "disk")
    Path(config.sequence_path).mkdir()
    for path in (tmp_path / "disk").iterdir():
        (Path(config.sequence_path) / path.name).symlink_to(path)
    store = create_dataset(config, local=True)
    skipped = assert_same_dataset(store.path, create_dataset(sound, local=True).path, 2)
    assert set(skipped) == {f"{config.sequence_path}/{name}" for name in BAD}
    findings = diagnose(config, without=skipped).findings
    assert len([finding for finding in findings if finding.check == "readable"]) == 2
    monkeypatch.chdir(config.sequence_path)
    assert open_sequences(".", options={"on_error": "skip"}).inspect(skipped).skipped == skipped


@settings(max_examples=8)
@given(
    bad=st.sets(st.integers(0, 6), min_size=1, max_size=4),
    max_samples=st.none() | st.integers(10, 60),
    part_bytes=st.sampled_from([1, 700, 3000, 10**6]),
    window=st.builds(Window, gap=st.integers(1, 2), horizon=st.integers(1, 2), history=st.integers(0, 1)),
)
def test_any_files(
    tmp_path_factory: pytest.TempPathFactory, bad: set[int], max_samples: int | None, part_bytes: int, window: Window
) -> None:
    """Whichever files are damaged: the dataset is the one of the recording without those that it names."""
    folder = tmp_path_factory.mktemp("any")
    shards = sorted(write_recording(folder / "damaged/sequence/r", make_episodes(LENGTHS * 2)).iterdir())
    for number in bad:
        put_nan(shards[number])
    shutil.copytree(folder / "damaged", folder / "sound")
    values = {**vars(window), "part_size_mb": part_bytes / 2**20}
    skipping = create_dataset(config_of(folder / "damaged", **SKIP, **values), max_samples=max_samples, local=True)
    named = {Path(path).name for path in skipping.manifest["skipped_files"]}
    assert named <= {shards[number].name for number in bad}
    assert max_samples is not None or len(named) == len(bad)
    for name in named:
        (folder / "sound/sequence/r" / name).unlink()
    sound = create_dataset(config_of(folder / "sound", **values), max_samples=max_samples, local=True)
    assert_same_dataset(skipping.path, sound.path, len(named))


@pytest.mark.parametrize(
    "values",
    [
        {"max_samples": 60},
        {"splits": "hashed", "val_ratio": 0.3, "gap": 2, "history": 1},
        {"filters": {"drop_stale": True, "drop_jumps": 3.0}},
        {"filters": {"drop_constant_dims": True}},
        {"filters": {"drop_jumps": 3.0, "saturated_actions": "drop"}, "max_samples": 20},
        {"part_size_mb": 1e-6},
        {"part_size_mb": 64.0},
    ],
)
def test_any_config(tmp_path: Path, values: dict[str, Any]) -> None:
    configs = recordings(tmp_path)
    given = dict(values)
    max_samples = given.pop("max_samples", None)
    skipping, sound = (
        create_dataset(DatasetConfig.model_validate({**c.model_dump(), **given}), max_samples=max_samples, local=True)
        for c in configs
    )
    assert_same_dataset(skipping.path, sound.path, 2)


def test_finished_segments_are_kept(tmp_path: Path) -> None:
    """What lies before the first damaged file is the same in both plans, and is not extracted again."""
    config, sound = recordings(tmp_path)
    plans: list[ExtractionPlan] = []
    rows: list[int] = []
    # Nothing in the splits changes with the number of episodes.
    config, sound = (c.replace(val_ratio=0.0, test_ratio=0.0) for c in (config, sound))
    shutil.move(tmp_path / "damaged/sequence/r" / BAD[0], tmp_path / "damaged/sequence/r/shard-00090.hdf5")
    store = create_dataset(config, local=True, listener=Listener(on_plan=plans.append, on_rows=rows.append))
    assert len(plans) == 2
    first_of_second_pass = rows[len(plans[0].segments) - 2 + 1]  # a start, and all but the two damaged segments
    assert 0 < first_of_second_pass < plans[1].num_rows
    assert_same_dataset(store.path, create_dataset(sound, local=True).path, 2)


def test_first_damaged_file_is_an_error_by_default(tmp_path: Path) -> None:
    config, _ = recordings(tmp_path)
    with pytest.raises(DataError, match=r"must be finite: .*shard-00001\.hdf5: action holds nan in column 1"):
        create_dataset(config.replace(format_options={}), local=True)
    # Having seen that, one asks to skip it: the same plan, and what is done is kept.
    rows: list[int] = []
    create_dataset(config, local=True, listener=Listener(on_rows=rows.append))
    assert rows[0] > 0


@pytest.mark.parametrize("stop_in_pass", [1, 2])
def test_interrupted_run_continues_without_the_files(tmp_path: Path, stop_in_pass: int) -> None:
    config, sound = recordings(tmp_path)
    config = config.replace(filters={"drop_stale": True, "drop_jumps": 3.0})
    sound = sound.replace(filters={"drop_stale": True, "drop_jumps": 3.0})
    plans: list[ExtractionPlan] = []
    scans: list[int] = []
    calls = iter(range(1000))

    def stop(rows: int) -> None:
        if len(plans) == stop_in_pass - 1 and next(calls) == 3:
            raise KeyboardInterrupt

    # The scan already finds the damage: the first plan that is extracted leaves the files out.
    listener = Listener(on_plan=plans.append, on_rows=stop if stop_in_pass == 2 else lambda rows: None)
    if stop_in_pass == 1:
        listener = Listener(on_scanned=lambda: stop(0))
    with pytest.raises(KeyboardInterrupt):
        create_dataset(config, local=True, listener=listener)
    again: list[dict[str, str]] = []
    store = create_dataset(
        config, local=True, listener=Listener(on_scan=scans.append, on_skip=lambda files: again.append(dict(files)))
    )
    assert bool(scans) == (stop_in_pass == 1)
    assert len(again) == (stop_in_pass == 1)
    assert_same_dataset(store.path, create_dataset(sound, local=True).path, 2)


def test_on_ray(tmp_path: Path, ray_session: None) -> None:
    for number, filters in enumerate(({}, {"drop_jumps": 3.0})):
        config, sound = recordings(tmp_path / str(number))
        store = create_dataset(config.replace(filters=filters), num_workers=3)
        assert_same_dataset(store.path, create_dataset(sound.replace(filters=filters), local=True).path, 2)


def test_all_files_damaged(tmp_path: Path) -> None:
    write_recording(tmp_path / "sequence/r", make_episodes(LENGTHS))
    for path in (tmp_path / "sequence/r").iterdir():
        put_nan(path)
    with pytest.raises(DataError, match=r"no file is usable: all 4 in .*/sequence/r; the first: .*shard-00000.*nan"):
        create_dataset(config_of(tmp_path, **SKIP), local=True)
    assert not (tmp_path / "inverse_dynamics/r/manifest.json").exists()


def test_a_disk_error_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, _ = recordings(tmp_path)

    def fail(*arguments: object) -> None:
        raise DataError("cannot write part: No space left on device")

    monkeypatch.setattr("invdyn.transitions.segment.writing_part", fail)
    with pytest.raises(DataError, match="No space left"):
        create_dataset(config, local=True)


def test_excluded_episodes_of_a_damaged_file(tmp_path: Path) -> None:
    """An episode that is left out is not read; one in a file that goes is not missed."""
    config, sound = recordings(tmp_path)
    only = config.replace(filters={"episodes": {"exclude": ["shard-00001.hdf5:0", "shard-00003.hdf5:0"]}})
    assert create_dataset(only, local=True).manifest["skipped_files"] == {}
    other = config.replace(
        filters={"episodes": {"exclude": ["shard-00001.hdf5:1", "shard-00002.hdf5:0"]}}, output_path=str(tmp_path / "o")
    )
    expected = sound.replace(filters={"episodes": {"exclude": ["shard-00002.hdf5:0"]}})
    store, sound_store = create_dataset(other, local=True), create_dataset(expected, local=True)
    assert len(store.manifest["skipped_files"]) == 2
    assert store.content_hash == sound_store.content_hash


def write_chain(root: Path, lengths: list[int], cuts: list[int], *, bad_rows: Iterable[int] = ()) -> list[Path]:
    """Write a LeRobot recording whose episodes go on from file to file; the action of some rows is NaN."""
    episodes = writers.make_episodes(lengths, extra_state=False)
    writers.write_lerobot_v3(root, episodes, per_file=len(lengths))
    folder = root / "data/chunk-000"
    table = pq.read_table(folder / "file-000.parquet")
    actions = np.concatenate([episode.actions for episode in episodes])
    actions[list(bad_rows), 1] = np.nan
    column = pa.FixedSizeListArray.from_arrays(pa.array(actions.reshape(-1)), 2)
    table = table.set_column(table.schema.get_field_index("action"), "action", column)
    paths = [folder / f"file-{number:03d}.parquet" for number in range(len(cuts) + 1)]
    for path, start, stop in zip(paths, [0, *cuts], [*cuts, len(table)], strict=True):
        pq.write_table(table.slice(start, stop - start), path)
    return paths


@pytest.mark.parametrize("cuts", [[20, 40, 60], [20, 33, 47], [6, 7, 60]])
@pytest.mark.parametrize("bad", [[0], [1], [3], [1, 3]])
@pytest.mark.parametrize("edge", ["first", "last"])
def test_only_the_damaged_file_of_a_chain_is_skipped(
    tmp_path: Path, cuts: list[int], bad: list[int], edge: str
) -> None:
    """Episodes cross the files' borders: the rows of the other files stay."""
    starts, stops = [0, *cuts], [*cuts, 77]
    rows = [starts[number] if edge == "first" else stops[number] - 1 for number in bad]
    stores = []
    for name in ("damaged", "sound"):
        paths = write_chain(tmp_path / name, [7] * 11, cuts, bad_rows=rows)
        if name == "sound":
            for number in bad:
                paths[number].unlink()
        config = config_of(tmp_path, buffer_path=str(tmp_path / name), output_path=str(tmp_path / f"{name}-out"))
        stores.append(create_dataset(config.replace(**SKIP if name == "damaged" else {}), local=True))
        if name == "damaged":
            skipped = stores[0].manifest["skipped_files"]
            assert set(skipped) == {str(paths[number]) for number in bad}
            for path, row in zip(skipped, sorted(rows), strict=True):
                assert f"{path}: action holds nan in column 1 at episode {row // 7}, step {row % 7} " in skipped[path]
            with pytest.raises(DataError, match=rf"must be finite: {paths[bad[0]]}: action"):
                create_dataset(config.replace(output_path=str(tmp_path / "fail")), local=True)
    assert stores[0].content_hash == stores[1].content_hash


def test_an_episode_without_rows_is_no_damage(tmp_path: Path) -> None:
    """Nor is it where another file of the same task is damaged."""
    config, sound = recordings(tmp_path)
    for each in (config, sound):
        short = (np.full((2, 3), np.nan), np.zeros((1, 2)))
        write_shard(Path(each.sequence_path) / "shard-00002.hdf5", [short, *make_episodes((8, 9), seed=1)])
    values = {"gap": 2, "part_size_mb": 64.0}
    stores = [create_dataset(each.replace(**values), local=True) for each in (config, sound)]
    assert_same_dataset(stores[0].path, stores[1].path, 2)


@pytest.mark.parametrize("filters", [{}, {"drop_stale": True}])
def test_nothing_left_without_the_damaged_file(tmp_path: Path, filters: dict[str, Any]) -> None:
    recording = write_recording(tmp_path / "sequence/r", make_episodes(LENGTHS[:8]))
    put_nan(recording / "shard-00001.hdf5")
    sound = [f"shard-00000.hdf5:{number}" for number in range(4)]
    with pytest.raises(DataError, match="no episodes left: the filters leave out all 4"):
        create_dataset(config_of(tmp_path, **SKIP, filters={"episodes": {"exclude": sound}, **filters}), local=True)


def write_many(write: writers.Writer, folder: Path) -> Path:
    """Write four files of one or more episodes, the second of which holds a NaN."""
    episodes = writers.make_episodes([5, 6, 7, 8])
    episodes[1].actions[2, 1] = np.nan
    if write in (writers.write_lerobot_v2, writers.write_csv):
        return write(folder, episodes)
    for number, episode in enumerate(episodes):
        made = write(folder / "made" / str(number), [episode, *writers.make_episodes([4], seed=number + 1)])
        suffix = ".zarr.zip" if made.name.endswith(".zarr.zip") else made.suffix
        shutil.move(made, folder / f"part-{number}{suffix}")
    shutil.rmtree(folder / "made")
    return folder


@pytest.mark.parametrize(
    "write",
    [
        writers.write_robomimic,
        writers.write_robomimic_next,
        writers.write_d4rl,
        writers.write_d4rl_next,
        writers.write_ogbench,
        writers.write_lerobot_v2,
        writers.write_zarr,
        writers.write_zarr_zip,
        writers.write_csv,
    ],
)
def test_every_format(tmp_path: Path, write: writers.Writer) -> None:
    stores = []
    for name in ("damaged", "sound"):
        path = write_many(write, tmp_path / name)
        if name == "sound":
            for file in sorted(path.rglob("*")):
                if file.name.startswith("part-1") or file.name in (
                    "state_1.csv",
                    "action_1.csv",
                    "episode_000001.parquet",
                ):
                    shutil.rmtree(file) if file.is_dir() else file.unlink()
        config = config_of(tmp_path, buffer_path=str(path), output_path=str(tmp_path / f"{name}-out"), val_ratio=0.3)
        options = SKIP if name == "damaged" else {}
        stores.append(create_dataset(config.replace(**options), local=True))
    skipped, warnings = stores[0].manifest["skipped_files"], stores[0].manifest["warnings"]
    assert len(skipped) == 1
    assert "must be finite" in next(iter(skipped.values()))
    assert [text.partition(": ")[2] for text in warnings] == [
        text.partition(": ")[2] for text in stores[1].manifest["warnings"]
    ]
    assert stores[0].content_hash == stores[1].content_hash
    assert stores[0].manifest["statistics"] == stores[1].manifest["statistics"]
    assert stores[0].manifest["drops"] == stores[1].manifest["drops"]
