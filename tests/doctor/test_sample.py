from __future__ import annotations

import numpy as np
import pytest

from invdyn.doctor.findings import Place
from invdyn.doctor.sample import choose_episodes, read_sample
from invdyn.errors import DataError
from invdyn.sequences.native import NativeReader
from tests.doctor.recordings import record, sample, write_shards


def test_steps_leave_out_what_has_no_next_state():
    # The second episode has as many states as actions: its last action leads nowhere.
    found = sample([np.arange(4.0)[:, None], np.arange(3.0)[:, None]], [np.zeros((3, 1)), np.zeros((3, 1))])
    assert found.steps.state_row.tolist() == [0, 1, 2, 4, 5]
    assert found.steps.action_row.tolist() == [0, 1, 2, 3, 4]
    assert found.steps.episode.tolist() == [0, 0, 0, 1, 1]
    assert found.steps.step.tolist() == [0, 1, 2, 0, 1]
    assert found.places(np.array([4])) == (Place("recording", 1, 1),)


@pytest.mark.parametrize("max_rows", [1, 50, 120, 399, 400])
def test_chosen_episodes_are_spread_and_few_enough(max_rows):
    num_states = np.full(40, 10)
    split = np.zeros(40, int)
    split[17] = 1
    chosen = choose_episodes(num_states, split, max_rows)
    assert len(chosen) == len(set(chosen.tolist()))
    assert (split[chosen] == 1).any()
    assert num_states[chosen].sum() <= max(max_rows, 20) + 10
    assert len(chosen) == 40 or chosen[0] == 0
    if max_rows == 400:
        assert len(chosen) == 40


def test_no_row_crosses_a_cut():
    states, actions = record(3, 10)
    whole = sample(states, actions)
    cut = whole.cut_at(np.array([4, 9, 10]))  # episode 0 steps 4 and 9 (its last), episode 1 step 0
    assert cut.num_states.tolist() == [5, 5, 1, 1, 10, 11]
    assert cut.number.tolist() == [0, 0, 0, 1, 1, 2]
    kept = np.delete(np.arange(30), [4, 9, 10])
    assert np.array_equal(cut.steps.state_row, whole.steps.state_row[kept])
    assert np.array_equal(cut.steps.action_row, whole.steps.action_row[kept])


def test_one_long_episode_does_not_shut_out_the_others():
    num_states = np.array([10, 10, 10_000, 10, 10, 10])
    chosen = choose_episodes(num_states, np.zeros(6, int), 100)
    assert chosen.tolist()[:2] == [0, 5] or num_states[chosen].sum() <= 10_020


def test_reads_the_same_rows_as_the_files_hold(tmp_path):
    states, actions = record(20, 10)
    reader = NativeReader(write_shards(tmp_path, states, actions, num_shards=3))
    plan = reader.inspect()
    found, failed = read_sample(reader, plan, np.zeros(20, int), max_rows=90)
    assert not failed
    assert 2 <= found.num_episodes < 20
    for position, number in enumerate(found.number):
        start, stop = found.state_start[position], found.state_start[position] + found.num_states[position]
        assert np.array_equal(found.state[start:stop], states[number])
    place = found.place(found.num_episodes - 1, 3)
    assert (place.file, place.step) == ("shard-00002.hdf5", 3)


def test_a_broken_file_is_named_and_the_rest_is_read(tmp_path, monkeypatch):
    states, actions = record(6, 10)
    reader = NativeReader(write_shards(tmp_path, states, actions, num_shards=2))
    plan = reader.inspect()
    read = NativeReader.read

    def fail_on_first(self, part):
        if part.files[0].name == "shard-00000.hdf5":
            raise DataError("cannot read: truncated")
        return read(self, part)

    monkeypatch.setattr(NativeReader, "read", fail_on_first)
    found, failed = read_sample(reader, plan, np.zeros(6, int), 10**6)
    assert failed == {"shard-00000.hdf5": "cannot read: truncated"}
    assert found.number.tolist() == [3, 4, 5]
    monkeypatch.setattr(NativeReader, "read", lambda self, part: (_ for _ in ()).throw(DataError("cannot read")))
    with pytest.raises(DataError, match="cannot read"):
        read_sample(reader, plan, np.zeros(6, int), 10**6)
