"""Trials that other programs make, end or enqueue in a study's store, over runs that only pretend to train."""

import functools
import math
import sqlite3
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from matchai.runs.trainer import RunResult
from matchai.settings.config import TrainConfig
from matchai.settings.study_settings import TuneConfig
from matchai.study.plan import Stage, make_plan
from matchai.study.rows import MARKS, StudyFacts, select_own
from matchai.study.storage import open_store
from matchai.study.trials import TrialTable
from tests.pretending import end, flags, pretend, rows, start, study

TRIALS = 4
UNIT: BaseDistribution = FloatDistribution(0, 1)
ALL = {"loss_mix_1": 0.3, "loss_mix_2": 0.5, "focal_gamma": 2.0, "sampler_weight": 3.0, "max_lr": 1e-3}
FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)
Table = list[tuple[Any, ...]]


def open_plain(folder: Path, name: str = "study") -> optuna.Study:
    """The study, as a plain Optuna program opens it."""
    return optuna.load_study(study_name=name, storage=f"sqlite:///{folder / 'store.db'}")


def create_plain(folder: Path, **options: Any) -> optuna.Study:
    return optuna.create_study(
        study_name="study", storage=f"sqlite:///{folder / 'store.db'}", **({"direction": "maximize"} | options)
    )


def table(found: Iterable[FrozenTrial]) -> Table:
    return [(row.state, row.values, row.params, row.intermediate_values) for row in found]


def meddle(acts: dict[int, Callable[[], Any]]) -> Callable[..., RunResult]:
    """A run during whose second epoch, in some trials, another program acts once."""
    left = {f"{number:04d}": act for number, act in acts.items()}

    def run(config: TrainConfig, on_epoch: Callable[[dict[str, Any]], None], **more: Any) -> RunResult:
        def hear(row: dict[str, Any]) -> None:
            assert config.run.output is not None
            if row["epoch"] == 2 and config.run.output.name in left:
                left.pop(config.run.output.name)()
            on_epoch(row)

        return pretend(config, hear, **more)

    return run


@pytest.fixture
def argv(phantom: Path, cache: Path, tmp_path: Path) -> list[str]:
    return flags(tmp_path, phantom, cache, "--trials", str(TRIALS), "--search-sampler", "random")


@pytest.fixture(scope="module")
def reference(phantom: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Table:
    """A study that no other program touches."""
    folder = tmp_path_factory.mktemp("alone")
    assert study(flags(folder, phantom, cache, "--trials", str(TRIALS), "--search-sampler", "random")) == 0
    return table(rows(folder))


def add_foreign(folder: Path) -> None:
    """What other programs leave in a study."""
    plain = open_plain(folder)
    first = plain.get_trials()[0]
    plain.ask()
    space, params = first.distributions, first.params
    for found in (
        create_trial(value=9.0, params={"x": 0.5}, distributions={"x": UNIT}),
        create_trial(value=9.0, params={"focal_gamma": 1.0}, distributions={"focal_gamma": space["focal_gamma"]}),
        create_trial(value=9.0, params=params, distributions=space),
        create_trial(value=9.0, params=params, distributions=space, user_attrs=first.user_attrs),
        create_trial(value=9.0, params=params, distributions=space, user_attrs={"is_recipe": True, "run": "here"}),
        create_trial(value=math.inf),
        create_trial(state=TrialState.PRUNED, value=9.0, intermediate_values={1: 9.0}),
        create_trial(state=TrialState.FAIL, user_attrs={"is_recipe": True}),
    ):
        plain.add_trial(found)


def test_foreign_trials_change_nothing_of_a_study(
    argv: list[str], tmp_path: Path, reference: Table, capsys: pytest.CaptureFixture[str]
) -> None:
    assert study([*argv, "--trials", "2"]) == 0
    add_foreign(tmp_path)
    foreign = rows(tmp_path)[2:]
    capsys.readouterr()
    assert study([*argv, "--confirm", "1"]) == 0
    found = rows(tmp_path)
    assert table([*found[:2], *found[11:]]) == reference
    assert found[2:11] == foreign
    said = capsys.readouterr().out
    assert said.count("count as nothing") == 1
    assert "trial 2 is RUNNING; trial 3 is COMPLETE" in said
    assert "9.000" not in said
    assert {path.name.split("-")[1] for path in (tmp_path / "study" / "confirm").iterdir() if path.is_dir()} <= {
        "0000", "0001", "0011", "0012",
    }  # fmt: skip


def test_what_is_drawn_of_a_study_leaves_foreign_trials_out(argv: list[str], tmp_path: Path) -> None:
    assert study([*argv, "--trials", "2"]) == 0
    add_foreign(tmp_path)
    plan = make_plan(TuneConfig())
    store = open_store(str(tmp_path / "store.db"))
    facts = StudyFacts(TrialTable(plan, Stage("study", 6, "trials"), store).study, "mean_dice")
    store.close()
    assert [row.number for row in facts.rows] == [0, 1]
    assert "x" not in facts.settings
    assert facts.best is not None
    assert facts.best.value < 1


def test_a_trial_that_another_program_ends_is_given_up_and_replaced(
    argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = {0: TrialState.COMPLETE, 2: TrialState.FAIL, 3: TrialState.PRUNED}

    def tell(number: int) -> None:
        value = 9.0 if told[number] == TrialState.COMPLETE else None
        open_plain(tmp_path).tell(number, value, state=told[number])

    assert study(argv, meddle({number: functools.partial(tell, number) for number in told})) == 0
    found = rows(tmp_path)
    assert {number: found[number].state for number in told} == told
    assert sum(row.state in FINISHED and "seconds" in row.user_attrs for row in found) == TRIALS
    assert [row.number for row in found if row.user_attrs.get("is_recipe")] == [0, 1]
    said = capsys.readouterr().out
    for number, state in told.items():
        assert said.count(f"Trial {number} of study study was told {state.name} by another program") == 1
    assert "count as nothing" not in said
    assert f"{TRIALS}/{TRIALS} trials" in said
    assert "9.000" not in said


def delete_row(folder: Path, number: int) -> None:
    with sqlite3.connect(folder / "store.db", timeout=30) as connection:
        connection.execute("DELETE FROM trials WHERE number = ?", (number,))


@pytest.mark.parametrize("number", [0, 2])
def test_a_trial_whose_row_is_deleted_is_given_up_and_replaced(
    number: int, argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert study(argv, meddle({2: lambda: delete_row(tmp_path, number)})) == 0
    assert sum(row.state in FINISHED for row in rows(tmp_path)) == TRIALS
    numbers = [row.number for row in rows(tmp_path)]
    assert len(set(numbers)) == len(numbers)
    assert ("Trial 2 of study study was deleted by another program" in capsys.readouterr().out) == (number == 2)


def test_a_study_that_is_deleted_ends_in_one_sentence(
    argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def act() -> None:
        optuna.delete_study(study_name="study", storage=f"sqlite:///{tmp_path / 'store.db'}")

    assert study(argv, meddle({1: act})) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "was deleted" in line


def test_an_enqueued_trial_is_the_next_and_counts(argv: list[str], tmp_path: Path) -> None:
    assert study([*argv, "--trials", "2"]) == 0
    open_plain(tmp_path).enqueue_trial(ALL, user_attrs={"why": "mine", "is_recipe": True, "seconds": "many"})
    assert study([*argv, "--trials", "3"]) == 0
    found = rows(tmp_path)
    assert len(found) == 3
    assert found[2].params == ALL
    assert found[2].distributions == found[0].distributions
    assert found[2].state in FINISHED
    assert found[2].user_attrs["why"] == "mine"
    assert "is_recipe" not in found[2].user_attrs


def test_what_an_enqueued_trial_leaves_open_is_proposed(argv: list[str], tmp_path: Path, reference: Table) -> None:
    assert study([*argv, "--trials", "2"]) == 0
    open_plain(tmp_path).enqueue_trial({"max_lr": 1e-3})
    assert study([*argv, "--trials", "3"]) == 0
    assert rows(tmp_path)[2].params == reference[2][2] | {"max_lr": 1e-3}


def test_an_enqueued_trial_outside_of_the_space_counts_as_nothing(
    argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert study([*argv, "--trials", "1"]) == 0
    plain = open_plain(tmp_path)
    plain.enqueue_trial({"max_lr": 5.0})
    plain.enqueue_trial({**ALL, "dropout": 0.1})
    assert study([*argv, "--trials", "2"]) == 0
    states = [row.state for row in rows(tmp_path)]
    assert states == [TrialState.COMPLETE, TrialState.WAITING, TrialState.WAITING, TrialState.COMPLETE]
    said = capsys.readouterr().out
    assert "trial 1 waits, but max_lr is 5.0, which is not in the space" in said
    assert "trial 2 waits, but there is no parameter 'dropout' in the space" in said


def test_an_enqueued_trial_waits_while_all_trials_are_there(
    argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert study([*argv, "--trials", "1"]) == 0
    open_plain(tmp_path).enqueue_trial(ALL)
    assert study([*argv, "--trials", "1"]) == 0
    assert "what was enqueued waits (trial 1)" in capsys.readouterr().out
    assert rows(tmp_path)[1].state == TrialState.WAITING


@pytest.mark.timeout(60)
def test_each_enqueued_trial_is_taken_by_one_worker(argv: list[str], tmp_path: Path) -> None:
    assert study([*argv, "--trials", "1"]) == 0
    plain = open_plain(tmp_path)
    for rate in (1e-3, 2e-3, 3e-3):
        plain.enqueue_trial({**ALL, "max_lr": rate})
    assert [end(process) for process in [start(argv, 0.02) for _ in range(2)]] == [0] * 2
    found = rows(tmp_path)
    assert [row.params["max_lr"] for row in found[1:]] == [1e-3, 2e-3, 3e-3]
    assert {row.state for row in found} <= set(FINISHED)
    logs = [path.read_text().split() for path in (tmp_path / "study" / "trials").glob("*/epochs.log")]
    assert all(len(log) == len(set(log)) for log in logs)


def test_a_study_with_an_enqueued_trial_alone_is_taken_over(argv: list[str], tmp_path: Path) -> None:
    plain = create_plain(tmp_path)
    plain.enqueue_trial(ALL)
    assert study([*argv, "--trials", "2"]) == 0
    found = rows(tmp_path)
    assert [row.params == ALL for row in found] == [True, False]
    assert found[1].user_attrs["is_recipe"]
    assert {row.state for row in found} <= set(FINISHED)


def test_foreign_kinds_of_the_same_parameters_hinder_no_trial(argv: list[str], tmp_path: Path) -> None:
    plain = create_plain(tmp_path)
    kind: dict[str, BaseDistribution] = {"max_lr": CategoricalDistribution(["high", "low"])}
    plain.add_trial(create_trial(value=9.0, params={"max_lr": "low"}, distributions=kind))
    plain.enqueue_trial(ALL)
    assert study([*argv, "--trials", "2"]) == 0
    assert [row.value == 9.0 for row in rows(tmp_path)] == [True, False, False]


@pytest.mark.parametrize("options", [{"direction": "minimize"}, {"direction": None, "directions": ["maximize"] * 2}])
def test_a_study_that_goes_another_way_is_refused_though_a_trial_is_enqueued(
    options: dict[str, Any], argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    create_plain(tmp_path, **options).enqueue_trial(ALL)
    assert study(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "needs maximize" in line
    assert [row.state for row in rows(tmp_path)] == [TrialState.WAITING]


def test_a_study_of_several_objectives_beside_it_is_left_alone(argv: list[str], tmp_path: Path) -> None:
    other = optuna.create_study(
        study_name="other", storage=f"sqlite:///{tmp_path / 'store.db'}", directions=["maximize", "minimize"]
    )
    other.add_trial(create_trial(values=[1.0, 2.0]))
    assert study([*argv, "--trials", "1"]) == 0
    assert len(rows(tmp_path, "other")) == 1
    assert study([*argv, "--study-name", "other"]) == 2


def test_a_study_that_could_not_be_confirmed_is_refused_before_it_begins(
    argv: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("matchai.study.worker.fresh_seeds", lambda *_: [1])
    assert study([*argv, "--confirm", "1"]) == 2
    assert "has 1 fresh seed on which" in capsys.readouterr().err
    assert optuna.get_all_study_names(f"sqlite:///{tmp_path / 'store.db'}") == []
    assert study([*argv, "--trials", "1"]) == 0
    assert study([*argv, "--trials", "1", "--confirm", "1"]) == 2


def own_trial(**attributes: Any) -> FrozenTrial:
    """A complete trial as version 0.1.0 has made it, but for the attributes given."""
    marks: dict[str, Any] = {**dict.fromkeys(MARKS, 0), "run": "trials/0000", "seconds": 1.0}
    kept = {name: value for name, value in (marks | attributes).items() if value is not None}
    return create_trial(value=0.5, user_attrs=kept)


def test_trials_of_before_the_study_was_named_in_them_count() -> None:
    old, new = own_trial(), own_trial(run="trials/0001", study_id="a")
    assert select_own([old, new], "a") == [old, new]


@pytest.mark.parametrize(
    "attributes", [{"study_id": "b"}, {"seconds": None}, {"host": None}, {"run": "trials/0000"}, {"run": None}]
)
def test_a_trial_of_another_study_a_copy_and_one_that_others_ended_count_as_nothing(attributes: dict[str, Any]) -> None:
    own = own_trial()
    assert select_own([own, own_trial(**{"run": "trials/0001"} | attributes)], "a") == [own]
