"""What is known about genuine recordings, found again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from invdyn.doctor.examine import diagnose
from invdyn.transitions.dataset_config import DatasetConfig

FIXTURES = Path(__file__).resolve().parents[2].parent / "shared" / "fixtures"

pytestmark = pytest.mark.skipif(not FIXTURES.is_dir(), reason=f"no real recordings in {FIXTURES}")


def examine(path, **values):
    return diagnose(DatasetConfig(name="real", buffer_path=str(FIXTURES / path), **values))


def finding(diagnosis, check):
    found = [f for f in diagnosis.findings if f.check == check]
    assert len(found) == 1, (check, [f.check for f in diagnosis.findings])
    return found[0]


def checks(diagnosis):
    return {f.check for f in diagnosis.findings}


def test_maze2d_has_a_stale_row_after_each_goal():
    import h5py

    stale = finding(examine("d4rl/maze2d-umaze-v1.hdf5"), "stale")
    with h5py.File(FIXTURES / "d4rl/maze2d-umaze-v1.hdf5") as file:
        goals = np.flatnonzero(file["terminals"][()].ravel())
        states = file["observations"][()]
    assert len(goals) == 136
    assert (states[goals] == states[goals + 1]).all()
    assert [place.row for place in stale.places] == goals.tolist()
    assert stale.figures["inside"] + stale.figures["at_ends"] == 136


@pytest.mark.parametrize(
    "path",
    [
        "d4rl/FetchPush-v2.hdf5",
        "d4rl/pushball-expert.hdf5",
        "lerobot_v20",
        "lerobot_v21",
        "diffusion_policy/pusht_160.zarr",
        "minari",
    ],
)
def test_no_other_recording_has_stale_rows(path):
    assert "stale" not in checks(examine(path))


@pytest.mark.parametrize("name", ["FetchPush-v2.hdf5", "pushball-expert.hdf5"])
def test_d4rl_with_next_observations_has_none(name):
    assert not {"stale", "jumps", "leak_current", "leak_next", "lag"} & checks(examine(f"d4rl/{name}"))


def test_g1_reaches_its_command_four_to_five_frames_later():
    diagnosis = examine("lerobot_v21")
    assert diagnosis.lag.steps in (4, 5)
    lag = finding(diagnosis, "lag")
    assert "between +4 and" in lag.evidence
    assert int(lag.fix.split()[1].rstrip(",")) >= 5
    better = finding(diagnosis, "identifiability").figures
    assert min(row["unexplained"] for row in better["grid"]) < 0.5 * better["unexplained"]


def test_gr00t_has_constant_dimensions():
    diagnosis = examine("lerobot_v20")
    constant = {f.figures["kind"]: len(f.figures["dims"]) for f in diagnosis.findings if f.check == "constant"}
    assert constant == {"state": 18, "action": 25}
    assert "contradiction" in checks(diagnosis)


def test_pusht_asks_for_two_past_states():
    diagnosis = examine("diffusion_policy/pusht_160.zarr")
    shares = diagnosis.identifiability.grid
    assert 1e-4 < shares[1, 0] < 1e-3
    assert shares[1, 2] <= 5e-6
    assert finding(diagnosis, "identifiability").fix == "gap: 1, history: 2"
    assert finding(diagnosis, "angle_wraps").figures["dims"] == [4]


def test_minari_pendulum_is_identified_to_rounding():
    diagnosis = examine("minari")
    assert diagnosis.identifiability.configured < 1e-9
    assert checks(diagnosis) <= {"saturated", "identifiability", "split_shift"}
