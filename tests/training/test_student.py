from __future__ import annotations

from pathlib import Path

import pytest
import torch

from invdyn.errors import ConfigError
from invdyn.models.flow import FlowInverseDynamics, SamplingSetting
from invdyn.models.recipe import TrainingRecipe
from invdyn.training import student
from invdyn.training.checkpoint import load_checkpoint
from invdyn.training.distributed import train
from invdyn.training.student import STUDENT, TEACHER, draw_pairs, match_ends, network_time, straighten
from invdyn.transitions.store import TransitionStore
from tests.training.runs import FLOW, LINEAR, make_dataset, run_config


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TransitionStore:
    return make_dataset(tmp_path_factory.mktemp("student"))


@pytest.mark.parametrize("options", [{"prediction": "velocity"}, {"prediction": "angular", "base": "mlp"}])
def test_a_student_goes_where_its_teacher_goes_in_fewer_steps(
    store: TransitionStore, tmp_path: Path, options: dict[str, str]
) -> None:
    model = {**FLOW, **options, "base_dims": [16, 16]}
    config = run_config(store, tmp_path / "run", model, num_epochs=30)
    train(config, local=True)
    teacher = load_checkpoint(config.run_dir).model
    assert isinstance(teacher, FlowInverseDynamics)
    random = torch.Generator().manual_seed(0)
    context, target = torch.randn(4000, teacher.context_dim, generator=random), torch.zeros(4000, 1)
    pairs = draw_pairs(teacher, (context, target), random)
    assert len(pairs[0]) == 8000
    student = straighten(teacher, pairs, 1, config.training, 500, random)
    seen, x_0, x_1 = (values[:1000] for values in draw_pairs(teacher, (context, target), random))
    one = SamplingSetting("euler", 1)
    own, others = ((m.carry(seen, x_0[None], one)[0] - x_1).square().mean() for m in (student, teacher))
    assert own < 0.3 * others
    assert torch.equal(teacher.carry(seen, x_0[None], TEACHER)[0], x_1)


def test_few_samples_end_between_two_branches() -> None:
    """Where near noise leads to either branch, least squares goes between them; the least distance to one of them."""
    torch.manual_seed(0)
    random = torch.Generator().manual_seed(0)
    student = FlowInverseDynamics(2, 1, 4, (16, 16), network="mlp", prediction="angular")
    x_0 = torch.randn(8000, 1, generator=random)
    blurred = x_0 + 0.3 * torch.randn(8000, 1, generator=random)
    pairs = torch.zeros(8000, student.context_dim), x_0, torch.where(blurred > 0.3, 1.0, -1.0)
    recipe = TrainingRecipe(batch_size=64, learning_rate=1e-2, ema_decay=0.99)
    straight = straighten(student, pairs, 2, recipe, 300, random)
    longer = straighten(straight, pairs, 2, recipe, 900, random)
    matched = match_ends(straight, pairs, 2, recipe, 900, random)
    setting = SamplingSetting("euler", 2)
    ends = [model.carry(pairs[0], x_0[None], setting)[0] for model in (longer, matched)]
    between = [float((end.abs() < 0.7).double().mean()) for end in ends]
    assert between[1] < 0.7 * between[0]
    assert (ends[1].sign() == (x_0 - 0.3).sign()).double().mean() > 0.95
    assert not any(parameter.requires_grad for parameter in matched.parameters())


def test_a_recipe_trains_one_beside_its_run(store: TransitionStore, tmp_path: Path) -> None:
    model = {**FLOW, "prediction": "angular", "num_inference_steps": None}
    train(run_config(store, tmp_path / "run", model, num_epochs=2, student_steps=3), local=True)
    student = load_checkpoint(tmp_path / "run" / STUDENT)
    said = (tmp_path / "run" / "train.log").read_text().splitlines()[-2:]
    assert said == ["training a student that samples in 3 step(s)", f"student: {tmp_path / 'run' / STUDENT}"]
    assert isinstance(student.model, FlowInverseDynamics)
    assert student.model.validated == {SamplingSetting("euler", 3)}
    assert student.model.sample(torch.zeros(2, 2), torch.zeros(2, 2)).shape == (1, 2, 1)
    assert load_checkpoint(tmp_path / "run").config.model.name == "tiny"
    assert student.config.model.name == "tiny_student"


def test_a_student_reads_no_more_rows_than_it_has_pairs(
    store: TransitionStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = []
    monkeypatch.setattr(student, "MAX_PAIRS", 100)
    draw = student.draw_pairs
    monkeypatch.setattr(student, "draw_pairs", lambda *args: counts.append(len(args[1][0])) or draw(*args))
    train(
        run_config(store, tmp_path / "run", {**FLOW, "prediction": "angular"}, num_epochs=1, student_steps=1),
        local=True,
    )
    assert counts == [100]


def test_times_of_the_network() -> None:
    t = torch.tensor([[0.0], [0.5], [0.75]])
    assert torch.equal(network_time(t, "velocity"), t)
    torch.testing.assert_close(network_time(t, "angular"), torch.tensor([[0.0], [0.5], [0.79517]]))


def test_only_flows_have_students(store: TransitionStore, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"training.student_steps needs a flow, got invdyn.models.LinearInverse"):
        train(run_config(store, tmp_path / "run", LINEAR, student_steps=2), local=True)
