"""What holds for the reader of every format: exact rows and boundaries, and an error that helps for each bad input."""

from __future__ import annotations

import pickle
import pkgutil
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from invdyn.errors import ConfigError, DataError
from invdyn.sequences.registry import READERS, open_sequences
from tests.sequences import writers
from tests.sequences.reading import cut, read_all
from tests.sequences.writers import ACTION_DIM, STATE_DIM, Episode, Writer, make_episodes

pytest.importorskip("zarr")


@dataclass(frozen=True)
class Case:
    """A way to write a format.

    Attributes:
        format_name: the reader's name.
        write: writes episodes into an empty folder and returns what to open.
        extra_state: whether an episode of T actions has T + 1 states in the files, and so T transitions, not T - 1.
        state_key: the key of the state, as a user would name it.
        file: the file to damage, relative to the folder.
    """

    format_name: str
    write: Writer
    extra_state: bool
    state_key: str
    file: str


CASES = {
    "native": Case("native", writers.write_native, True, "state", "shard-00000.hdf5"),
    "robomimic": Case("robomimic", writers.write_robomimic, False, "state", "low_dim.hdf5"),
    "robomimic_next": Case("robomimic", writers.write_robomimic_next, True, "state", "low_dim.hdf5"),
    "d4rl": Case("d4rl", writers.write_d4rl, False, "observations", "d4rl.hdf5"),
    "d4rl_next": Case("d4rl", writers.write_d4rl_next, True, "observations", "d4rl.hdf5"),
    "ogbench": Case("ogbench", writers.write_ogbench, True, "observations", "play-v0.npz"),
    "ogbench_stored": Case("ogbench", writers.write_ogbench_stored, True, "observations", "play-v0.npz"),
    "minari": Case("minari", writers.write_minari, True, "observations", "data/main_data.hdf5"),
    "lerobot_v20": Case(
        "lerobot", writers.write_lerobot_v20, False, "observation.state", "data/chunk-000/episode_000000.parquet"
    ),
    "lerobot_v21": Case(
        "lerobot", writers.write_lerobot_v2, False, "observation.state", "data/chunk-000/episode_000000.parquet"
    ),
    "lerobot_v30": Case(
        "lerobot", writers.write_lerobot_v3, False, "observation.state", "data/chunk-000/file-000.parquet"
    ),
    "zarr": Case("diffusion_policy", writers.write_zarr, False, "state", "buffer.zarr/data/state/.zarray"),
    "zarr_zip": Case("diffusion_policy", writers.write_zarr_zip, False, "state", "buffer.zarr.zip"),
    "csv": Case("csv", writers.write_csv, True, "x", "state_0.csv"),
}

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def expected_rows(case: Case, episodes: list[Episode]) -> tuple[list[Any], list[Any], list[Any]]:
    """Return state, action and next state of every transition, one by one, written for clarity."""
    states, actions, next_states = [], [], []
    for episode in episodes:
        num_states = len(episode.actions) + case.extra_state
        for step in range(min(len(episode.actions), num_states - 1)):
            states.append(episode.states[step])
            actions.append(episode.actions[step])
            next_states.append(episode.states[step + 1])
    return states, actions, next_states


@every_case
@settings(max_examples=20)
@given(lengths=st.lists(st.integers(2, 12), min_size=1, max_size=8), seed=st.integers(0, 3))
def test_gives_exactly_the_recorded_transitions(case: Case, lengths: list[int], seed: int) -> None:
    episodes = make_episodes(lengths, seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        reader = open_sequences(str(case.write(Path(folder), episodes)))
        assert reader.format_name == case.format_name
        plan = reader.inspect()
        rows = cut(plan, read_all(reader, plan))
    states, actions, next_states = expected_rows(case, episodes)
    np.testing.assert_allclose(rows.state, states, rtol=1e-6)
    np.testing.assert_allclose(rows.action, actions, rtol=1e-6)
    np.testing.assert_allclose(rows.next_state, next_states, rtol=1e-6)
    assert (plan.state_dim, plan.action_dim) == (STATE_DIM, ACTION_DIM)
    assert ((plan.num_states - plan.num_actions == 0) | (plan.num_states - plan.num_actions == 1)).all()


@every_case
@settings(max_examples=10)
@given(data=st.data())
def test_a_slice_of_the_plan_reads_the_same_rows(case: Case, data: st.DataObject) -> None:
    episodes = make_episodes([4, 2, 7, 3, 5, 6, 2])
    with tempfile.TemporaryDirectory() as folder:
        reader = open_sequences(str(case.write(Path(folder), episodes)))
        plan = reader.inspect()
        whole = read_all(reader, plan)
        first = data.draw(st.integers(0, plan.num_episodes - 1))
        stop = data.draw(st.integers(first + 1, plan.num_episodes))
        part = plan.slice(first, stop)
        # Workers hold a copy of the reader that never inspected anything.
        fresh = pickle.loads(pickle.dumps(open_sequences(reader.path, format_name=case.format_name)))  # type: ignore[attr-defined]
        arrays = read_all(fresh, part)
    states = slice(*np.cumsum([0, *plan.num_states])[[first, stop]])
    actions = slice(*np.cumsum([0, *plan.num_actions])[[first, stop]])
    np.testing.assert_array_equal(arrays.state, whole.state[states])
    np.testing.assert_array_equal(arrays.action, whole.action[actions])


@every_case
def test_one_row_episodes_are_no_transitions_and_stay_apart(case: Case, tmp_path: Path) -> None:
    if case.extra_state:
        pytest.skip("an episode of one action has a transition in this format")
    episodes = make_episodes([1, 3, 1, 1, 4])
    reader = open_sequences(str(case.write(tmp_path, episodes)))
    plan = reader.inspect()
    rows = cut(plan, read_all(reader, plan))
    np.testing.assert_allclose(rows.next_state, expected_rows(case, episodes)[2], rtol=1e-6)


@every_case
def test_plan_travels_and_names_files(case: Case, tmp_path: Path) -> None:
    reader = open_sequences(str(case.write(tmp_path, make_episodes([3, 4]))))
    plan = pickle.loads(pickle.dumps(reader)).inspect()
    for file in plan.files:
        assert Path(file.path).is_absolute()
        assert not Path(file.name).is_absolute()
        assert file.size > 0
        assert file.version > 0
        assert all(Path(path).is_file() for path in reader.source_paths(file))
    assert len({plan.episode_id(episode) for episode in range(plan.num_episodes)}) == 2


@every_case
def test_same_recording_elsewhere_has_the_same_episode_ids(case: Case, tmp_path: Path) -> None:
    path = case.write(tmp_path / "here", make_episodes([3, 4]))
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    other = tmp_path / "there" / path.relative_to(tmp_path / "here")
    plans = [open_sequences(str(root)).inspect() for root in (path, other)]
    assert plans[0].episode_id(1) == plans[1].episode_id(1)


@pytest.mark.parametrize(
    ("name", "costly"),
    [
        ("robomimic", "invdyn.sequences.robomimic.numbered_groups"),
        ("minari", "invdyn.sequences.minari.numbered_groups"),
        ("ogbench", "zipfile.ZipFile.open"),
        ("ogbench_stored", "zipfile.ZipFile.open"),
        ("lerobot_v30", "pyarrow.parquet.ParquetFile.read_row_groups"),
    ],
)
def test_gaps_between_the_episodes_cost_nothing(
    name: str, costly: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every other episode, read one by one: what the file costs as a whole is done once, and gives the same rows."""
    case, episodes = CASES[name], make_episodes([4] * 20)
    many = {"per_file": 20, "rows_per_group": 80} if name == "lerobot_v30" else {}
    reader = open_sequences(str(case.write(tmp_path, episodes, **many)))  # type: ignore[call-arg]
    plan = reader.inspect()
    module, _, attribute = costly.rpartition(".")
    owner = pkgutil.resolve_name(module)
    calls, original = [0], getattr(owner, attribute)

    def count(*arguments: Any, **more: Any) -> Any:
        calls[0] += 1
        return original(*arguments, **more)

    monkeypatch.setattr(owner, attribute, count)
    counts = []
    for numbers in (range(0, 4, 2), range(0, 20, 2), [12, 2, 2]):
        fresh = pickle.loads(pickle.dumps(reader))
        calls[0] = 0
        for number in numbers:
            arrays = fresh.read(plan.slice(number, number + 1))
            np.testing.assert_array_equal(arrays.action, episodes[number].actions)
        counts.append(calls[0])
    assert 0 < counts[0] == counts[1] <= counts[2]


# Bad inputs: one test per rule, for every reader.


@every_case
def test_missing_file(case: Case, tmp_path: Path) -> None:
    path = str(tmp_path / "nothing")
    with pytest.raises(DataError, match=rf"not found: {re.escape(path)}"):
        open_sequences(path, format_name=case.format_name).inspect()


@every_case
def test_not_this_format(case: Case, tmp_path: Path) -> None:
    path = case.write(tmp_path, make_episodes([3]))
    target = tmp_path / case.file
    if target.suffix in (".hdf5",):
        with h5py.File(target, "w") as file:
            file["something"] = np.zeros((3, 2))
        found = r"something \(3, 2\)"
    elif target.suffix == ".npz":
        np.savez(target, something=np.zeros((3, 2)))
        found = r"something \(3, 2\)"
    elif case.format_name == "lerobot":
        (tmp_path / "meta" / "info.json").unlink()
        found = "info.json"
    else:
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
        (tmp_path / "notes.txt").write_text("nothing")
        path, found = tmp_path, re.escape(str(tmp_path))
    with pytest.raises(DataError, match=found):
        open_sequences(str(path), format_name=case.format_name).inspect()


@every_case
def test_missing_state_key_lists_what_is_there(case: Case, tmp_path: Path) -> None:
    path = case.write(tmp_path, make_episodes([3, 4]))
    known = case.state_key if case.format_name != "lerobot" else r"observation\.state"
    with pytest.raises(DataError, match=rf"'(data/)?nonsense'.*{known}.*") as error:
        open_sequences(str(path), state_keys=["nonsense"]).inspect()
    assert re.search(r"\(\d+, 3\)|list<|\[3\]|x, y, angle", str(error.value)), "shapes are listed"
    assert "shape_meta" in str(error.value)


@every_case
def test_missing_action_key(case: Case, tmp_path: Path) -> None:
    path = case.write(tmp_path, make_episodes([3, 4]))
    with pytest.raises(DataError, match=r"'(data/)?nonsense'.*(missing|must be an array)"):
        open_sequences(str(path), action_key="nonsense").inspect()


@every_case
def test_zero_episodes(case: Case, tmp_path: Path) -> None:
    if case.format_name == "lerobot" and "v3" not in case.file and "file-" not in case.file:
        pytest.skip("a v2 recording without episodes has no files")
    path = case.write(tmp_path, [])
    with pytest.raises(DataError, match=r"at least one episode|no file of that format|must have an action file"):
        open_sequences(str(path), format_name=case.format_name).inspect()


@every_case
def test_zero_transitions(case: Case, tmp_path: Path) -> None:
    length = 0 if case.extra_state else 1
    path = case.write(tmp_path, make_episodes([length, length]))
    with pytest.raises(DataError, match=r"at least (one (transition|episode)|2 states and 1 action)"):
        open_sequences(str(path), format_name=case.format_name).inspect()


@every_case
@pytest.mark.parametrize("what", ["truncated", "corrupt", "empty"])
def test_damaged_file_is_named(case: Case, what: str, tmp_path: Path) -> None:
    path = case.write(tmp_path, make_episodes([30, 40]))
    target = tmp_path / case.file
    content = target.read_bytes()
    if case.format_name == "csv" and what == "truncated":
        pytest.skip("a shorter CSV file is a valid one; test_lengths_disagree covers it")
    damaged = {"truncated": content[: len(content) // 2], "corrupt": b"\x00\x93" * (len(content) // 2), "empty": b""}
    target.write_bytes(damaged[what])
    with pytest.raises(DataError, match=re.escape(str(tmp_path))) as error:
        reader = open_sequences(str(path), format_name=case.format_name)
        read_all(reader, reader.inspect())
    assert re.search("truncated|corrupt|empty", str(error.value))
    assert "\n" not in str(error.value)


@every_case
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("column", ["states", "actions"])
def test_nan_and_infinity_are_located(case: Case, value: float, column: str, tmp_path: Path) -> None:
    episodes = make_episodes([5, 6, 7])
    getattr(episodes[1], column)[2, 1] = value
    reader = open_sequences(str(case.write(tmp_path, episodes)))
    plan = reader.inspect()
    with pytest.raises(DataError, match=rf"must be finite: .*{column[:-1]} holds -?{value} in column 1 at episode"):
        read_all(reader, plan)


HDF5_ARRAYS = {
    "robomimic": ("data/demo_1/obs/state", "data/demo_1/actions"),
    "robomimic_next": ("data/demo_1/obs/state", "data/demo_1/actions"),
    "d4rl": ("observations", "actions"),
    "d4rl_next": ("observations", "actions"),
    "minari": ("episode_1/observations", "episode_1/actions"),
}


def replace_array(target: Path, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    with h5py.File(target, "a") as file:
        values = change(file[name][()])
        del file[name]
        file[name] = values


@pytest.mark.parametrize("name", HDF5_ARRAYS)
@pytest.mark.parametrize("index", [0, 1])
def test_lengths_disagree_in_hdf5(name: str, index: int, tmp_path: Path) -> None:
    path = CASES[name].write(tmp_path, make_episodes([5, 6]))
    replace_array(tmp_path / CASES[name].file, HDF5_ARRAYS[name][index], lambda values: values[:-2])
    with pytest.raises(DataError, match=r"lengths disagree: .*(demo_1|episode_1|d4rl.hdf5)"):
        open_sequences(str(path)).inspect()


@pytest.mark.parametrize("name", HDF5_ARRAYS)
@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("dtype", ["S4", "complex64"])
def test_non_numeric_in_hdf5(name: str, index: int, dtype: str, tmp_path: Path) -> None:
    path = CASES[name].write(tmp_path, make_episodes([5, 6]))
    replace_array(tmp_path / CASES[name].file, HDF5_ARRAYS[name][index], lambda values: values.astype(dtype))
    with pytest.raises(DataError, match=r"must be numeric: .*(demo_1|episode_1|d4rl.hdf5)"):
        open_sequences(str(path)).inspect()


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.format_name not in ("csv", "lerobot")])
def test_rows_without_numbers(name: str, tmp_path: Path) -> None:
    episodes = make_episodes([5, 6])
    path = CASES[name].write(tmp_path, [Episode(episode.states[:, :0], episode.actions) for episode in episodes])
    with pytest.raises(DataError, match=r"must have (a row per step, of )?at least 1 number"):
        open_sequences(str(path), format_name=CASES[name].format_name).inspect()


@pytest.mark.parametrize("key", ["observations", "actions"])
def test_lengths_and_types_in_npz(key: str, tmp_path: Path) -> None:
    path = writers.write_ogbench(tmp_path, make_episodes([5, 6]))
    arrays = dict(np.load(path))
    np.savez(path, **{**arrays, key: arrays[key][:-2]})
    with pytest.raises(DataError, match=rf"lengths disagree: .*play-v0.npz.*{key} 11"):
        open_sequences(str(path)).inspect()
    for kind in ("S4", "O"):
        np.savez(path, **{**arrays, key: arrays[key].astype(kind)})
        with pytest.raises(DataError, match=rf"{key} must be numeric: .*play-v0.npz"):
            open_sequences(str(path)).inspect()


@pytest.mark.parametrize("key", ["state", "action"])
def test_lengths_and_types_in_zarr(key: str, tmp_path: Path) -> None:
    import zarr

    path = writers.write_zarr(tmp_path, make_episodes([5, 6]))
    data = zarr.open_group(str(path), mode="a", zarr_format=2)["data"]
    data.create_array(key, data=np.zeros((9, 2), np.float32), overwrite=True)
    with pytest.raises(DataError, match=rf"lengths disagree: .*buffer.zarr.*{key} 9"):
        open_sequences(str(path)).inspect()
    data.create_array(key, data=np.full((11, 2), "x", dtype="U4"), overwrite=True)
    with pytest.raises(DataError, match=rf"{key} must be numeric: .*buffer.zarr"):
        open_sequences(str(path)).inspect()


@pytest.mark.parametrize("key", ["observation.state", "action"])
def test_lengths_and_types_in_parquet(key: str, tmp_path: Path) -> None:
    import pyarrow as pa

    path = writers.write_lerobot_v2(tmp_path, make_episodes([5, 6]), fixed=False)
    file = path / "data/chunk-000/episode_000001.parquet"
    table = pq.read_table(file)
    index = table.schema.get_field_index(key)
    # The same number of values in all, so that the footer alone cannot tell.
    ragged = [[1.0, 2.0], [1.0, 2.0, 3.0, 4.0], *([[0.0] * 3] * 4)]
    pq.write_table(table.set_column(index, key, pa.array(ragged)), file)
    reader = open_sequences(str(path))
    with pytest.raises(DataError, match=rf"(lengths disagree: .*episode_000001.*{key}|same dimensions)"):
        read_all(reader, reader.inspect())
    pq.write_table(table.set_column(index, key, pa.array(["left"] * 6)), file)
    with pytest.raises(DataError, match=rf"{key} must be numeric: .*episode_000001.parquet: it is string"):
        open_sequences(str(path)).inspect()


@pytest.mark.parametrize("name", ["state", "action"])
def test_lengths_and_types_in_csv(name: str, tmp_path: Path) -> None:
    path = writers.write_csv(tmp_path, make_episodes([5, 6]))
    file = path / f"{name}_1.csv"
    lines = file.read_text().splitlines()
    file.write_text("\n".join(lines[:-3]))
    with pytest.raises(DataError, match=r"lengths disagree: .*state_1.csv has .*action_1.csv"):
        open_sequences(str(path)).inspect()
    file.write_text("\n".join([*lines[:-1], ",".join(["left"] * lines[0].count(",")) + ",right"]))
    reader = open_sequences(str(path))
    with pytest.raises(DataError, match=rf"must be numeric: .*{name}_1.csv"):
        read_all(reader, reader.inspect())


# One bad file among many.


def write_many(case: Case, folder: Path) -> tuple[Path, Path]:
    """Write three files and damage the second; return what to open, and the damaged file."""
    if case.format_name in ("lerobot", "csv"):
        many = {"per_file": 1} if case.write is writers.write_lerobot_v3 else {}
        path = case.write(folder, make_episodes([5, 6, 7]), **many)  # type: ignore[call-arg]
        pattern = "state_1.csv" if case.format_name == "csv" else "*1.parquet"
        bad = next(p for p in sorted(folder.rglob(pattern)) if "meta" not in p.parts)
    else:
        for number in range(3):
            made = case.write(folder / "made" / str(number), make_episodes([5, 6]))
            suffix = ".zarr.zip" if made.name.endswith(".zarr.zip") else made.suffix
            shutil.move(made, folder / f"part-{number}{suffix}")
        shutil.rmtree(folder / "made")
        path, bad = folder, folder / f"part-1{suffix}"
        bad = bad / "data/state/.zarray" if bad.is_dir() else bad
    bad.write_bytes(b"")
    return path, bad


@every_case
def test_one_bad_file_among_many(case: Case, tmp_path: Path) -> None:
    if case.format_name == "minari":
        pytest.skip("a Minari dataset is one file")
    path, bad = write_many(case, tmp_path)
    where = re.escape(str(next((p for p in (bad, *bad.parents) if p.name.startswith("part-")), bad)))
    with pytest.raises(DataError, match=where):
        open_sequences(str(path), format_name=case.format_name).inspect()
    reader = open_sequences(str(path), format_name=case.format_name, options={"on_error": "skip"})
    plan = reader.inspect()
    assert len(plan.files) == 2
    assert [bool(re.match(where, name)) for name in plan.skipped] == [True]
    assert len(read_all(reader, plan).state) == plan.num_states.sum()


@every_case
def test_skipping_every_file_is_an_error(case: Case, tmp_path: Path) -> None:
    path = case.write(tmp_path, make_episodes([5]))
    (tmp_path / case.file).write_bytes(b"")
    with pytest.raises(DataError, match="no file is usable"):
        open_sequences(str(path), format_name=case.format_name, options={"on_error": "skip"}).inspect()


@every_case
def test_file_that_shrank_after_planning(case: Case, tmp_path: Path) -> None:
    path = case.write(tmp_path, make_episodes([5, 9]))
    reader = open_sequences(str(path))
    plan = reader.inspect()
    shutil.rmtree(tmp_path)
    case.write(tmp_path, make_episodes([5, 4]))
    with pytest.raises(DataError, match="changed while it was read"):
        read_all(reader, plan)


# The registry.


def test_every_format_has_a_case_and_a_page(repository: Path) -> None:
    assert {case.format_name for case in CASES.values()} == set(READERS)
    assert {path.stem for path in (repository / "docs/formats").glob("*.md")} >= set(READERS)


def test_unknown_format() -> None:
    with pytest.raises(ConfigError, match="unknown format 'rlds'; known formats: csv, d4rl"):
        open_sequences("x", format_name="rlds")


def test_unknown_option_names_the_nearest(tmp_path: Path) -> None:
    path = writers.write_robomimic(tmp_path, make_episodes([3]))
    with pytest.raises(ConfigError, match=r"no 'demo_grup' for robomimic; did you mean 'demo_group'\?"):
        open_sequences(str(path), options={"demo_grup": "/"})


def test_unrecognised_hdf5_lists_its_arrays(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "x.hdf5", "w") as file:
        file["frames/pose"] = np.zeros((3, 7))
    with pytest.raises(DataError, match=r"no reader recognises .*frames/pose \(3, 7\).*set format"):
        open_sequences(str(tmp_path))


@pytest.mark.parametrize(
    ("format_name", "options", "message"),
    [
        ("csv", {"on_error": "ignore"}, "on_error must be 'fail' or 'skip', got 'ignore'"),
        ("diffusion_policy", {"missing_chunks": "Fail"}, "missing_chunks must be 'fail' or 'fill', got 'Fail'"),
        ("native", {"on_error": ["skip"]}, r"format_options.on_error must be text: got \['skip'\]"),
        ("native", {"on_error": None}, "format_options.on_error must be text: got None"),
        ("d4rl", {"episode_ends": False}, "format_options.episode_ends must be text or a list of texts: got False"),
        ("d4rl", {"episode_ends": 5}, "format_options.episode_ends must be text or a list of texts: got 5"),
        ("d4rl", {"episode_ends": [5]}, r"format_options.episode_ends must be text or a list of texts: got \[5\]"),
        ("robomimic", {"demo_group": 3}, "format_options.demo_group must be text: got 3; write '3' in quotes"),
        ("robomimic", {"mask": 20}, "format_options.mask must be text: got 20; write '20' in quotes"),
        ("csv", {"state_word": 1}, "format_options.state_word must be text: got 1; write '1' in quotes"),
        ("csv", {"header": "no"}, "format_options.header must be true or false: got 'no'"),
    ],
)
def test_bad_options(format_name: str, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        open_sequences(str(tmp_path), format_name=format_name, options=options)


@pytest.mark.parametrize(
    ("ends", "num_episodes"), [(None, 2), ("timeouts", 2), (["timeouts", "terminals"], 2), ([], 1)]
)
def test_options_of_several_types(ends: object, num_episodes: int, tmp_path: Path) -> None:
    path = writers.write_d4rl(tmp_path, make_episodes([3, 4]))
    assert open_sequences(str(path), options={"episode_ends": ends}).inspect().num_episodes == num_episodes
