"""Recordings on a storage service are read as those on this machine are, in few requests."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from invdyn import storage
from invdyn.sequences.files import source_file
from invdyn.sequences.registry import open_sequences
from tests.remote import upload
from tests.sequences.reading import read_all
from tests.sequences.test_every_reader import Case, every_case
from tests.sequences.writers import make_episodes


@every_case
def test_same_plan_and_rows_as_on_this_machine(case: Case, tmp_path: Path) -> None:
    path = case.write(tmp_path / "here", make_episodes([4, 2, 7, 3, 5, 6, 2]))
    reader = open_sequences(str(path))
    plan = reader.inspect()
    url = f"memory://{tmp_path.name}/{path.name}"
    there = open_sequences(upload(path, url))
    assert type(there) is type(reader)
    plan_there = there.inspect()
    assert [plan.episode_id(i) for i in range(plan.num_episodes)] == [
        plan_there.episode_id(i) for i in range(plan_there.num_episodes)
    ]
    assert [file.size for file in plan.files] == [file.size for file in plan_there.files]
    assert all(file.path.startswith(url) for file in plan_there.files)
    assert all(file.version for file in plan_there.files)
    here, rows = read_all(reader, plan), read_all(there, plan_there)
    np.testing.assert_array_equal(rows.state, here.state)
    np.testing.assert_array_equal(rows.action, here.action)


def test_every_file_that_is_written_again_gives_another_version(remote: str) -> None:
    """Also one whose own version happens to be less than that of another file of the episode."""
    names = [f"{remote}/r/{name}.csv" for name in ("state", "action")]
    versions = []
    for turn in range(12):
        storage.write_bytes(names[turn % 2], b"%2d" % turn)
        if turn:
            versions.append(source_file(names[0], f"{remote}/r", (names[1],)).version)
    assert len(set(versions)) == len(versions)
