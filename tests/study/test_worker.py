"""Studies end to end, over runs that only pretend to train; `tests/test_tune.py` has real ones."""

import contextlib
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import optuna
import pytest
import yaml
from optuna.trial import TrialState

from matchai.runs.trainer import RunResult
from matchai.settings.config import TrainConfig
from matchai.study.space import load_space
from matchai.system.processes import any_process, is_main_process
from matchai.training.loop import DivergedError
from tests.conftest import PASSWORD
from tests.pretending import diverge, end, flags, pretend, rows, start, start_group, study, table

TRIALS = 14  # ten of them drawn by chance, then two by each model
FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)


@pytest.fixture(scope="module")
def reference(phantom: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted study of 14 trials by one worker."""
    folder = tmp_path_factory.mktemp("reference")
    assert study(flags(folder, phantom, cache, "--trials", str(TRIALS))) == 0
    return folder


@pytest.fixture
def argv(phantom: Path, cache: Path, tmp_path: Path) -> list[str]:
    return flags(tmp_path, phantom, cache, "--trials", str(TRIALS))


def test_a_study_has_exactly_its_trials_and_the_first_is_the_recipe(reference: Path) -> None:
    found = rows(reference)
    assert [row.number for row in found] == list(range(TRIALS))
    assert all(row.state in FINISHED for row in found)
    recipe = TrainConfig().flat()
    assert found[0].user_attrs["is_recipe"]
    assert found[0].params["focal_gamma"] == recipe["focal_gamma"]
    assert found[0].user_attrs["dice_weight"] == recipe["dice_weight"]
    assert found[0].state == TrialState.COMPLETE
    assert sum(bool(row.user_attrs.get("is_recipe")) for row in found) == 1


def test_no_two_trials_are_alike(reference: Path) -> None:
    assert len({json.dumps(row.params, sort_keys=True) for row in rows(reference)}) == TRIALS


def test_shares_are_kept_as_attributes_and_sum_to_one(reference: Path) -> None:
    for row in rows(reference):
        found = [row.user_attrs[name] for name in ("dice_weight", "ce_weight", "focal_weight")]
        assert abs(sum(found) - 1) <= 1e-12
        assert min(found) >= 0


def test_a_trial_tells_the_best_epoch_and_every_epoch_on_the_way(reference: Path) -> None:
    for row in rows(reference):
        if row.state == TrialState.COMPLETE:
            assert sorted(row.intermediate_values) == [1, 2, 3, 4, 5, 6]
            assert row.value == max(row.intermediate_values.values())
            assert row.value == row.intermediate_values[row.user_attrs["best_epoch"]]


def test_a_trial_says_where_it_ran_and_with_what(reference: Path) -> None:
    for row in rows(reference):
        assert {"run", "host", "versions", "git_revision", "seed", "epochs"} <= row.user_attrs.keys()
        assert Path(row.user_attrs["run"]).is_dir()
        assert row.user_attrs["versions"]["optuna"] == optuna.__version__


def test_a_finished_study_keeps_no_states_and_the_weights_of_the_best_few(reference: Path) -> None:
    assert not list(reference.glob("study/trials/*/last"))
    kept = {int(path.parent.name) for path in reference.glob("study/trials/*/best.safetensors")}
    complete = [row for row in rows(reference)[1:] if row.state == TrialState.COMPLETE]
    best = sorted(complete, key=lambda row: -(row.value or 0))[:3]
    assert kept == {0, *(row.number for row in best)}


def test_a_finished_study_is_left_as_it_is(reference: Path, phantom: Path, cache: Path, capsys: Any) -> None:
    before = (reference / "store.db").read_bytes(), table(reference)
    files = {path: path.stat().st_mtime_ns for path in reference.rglob("*.yaml")}
    assert study(flags(reference, phantom, cache, "--trials", str(TRIALS))) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert (reference / "store.db").read_bytes() == before[0]
    assert table(reference) == before[1]
    assert {path: path.stat().st_mtime_ns for path in reference.rglob("*.yaml")} == files


def test_more_trials_are_added_to_a_finished_study(argv: list[str], tmp_path: Path, reference: Path) -> None:
    assert study([*argv, "--trials", "8"]) == 0
    assert len(rows(tmp_path)) == 8
    assert study([*argv, "--trials", str(TRIALS)]) == 0
    assert table(tmp_path) == table(reference)


def test_fewer_trials_than_there_are_start_none(argv: list[str], tmp_path: Path) -> None:
    assert study([*argv, "--trials", "5"]) == 0
    assert study([*argv, "--trials", "3"]) == 0
    assert len(rows(tmp_path)) == 5


def kill_at_random(argv: list[str], kills: int, seed: int, workers: int = 1) -> None:
    """Starts the command again and again, so many at a time, and kills them at random moments."""
    chance = random.Random(seed)
    for _ in range(kills):
        running = [start(argv, 0.02) for _ in range(workers)]
        time.sleep(chance.uniform(0.3, 1.5))
        for process in running[: chance.randint(1, workers)]:
            process.kill()
        time.sleep(chance.uniform(0, 0.5) if workers > 1 else 0)
        for process in running:
            process.kill()
            process.join()


def assert_whole(folder: Path, number: int) -> None:
    found = rows(folder)
    assert [row.number for row in found] == list(range(number))
    assert {row.state for row in found} <= set(FINISHED)
    assert len({json.dumps(row.params, sort_keys=True) for row in found}) == number
    assert sum(bool(row.user_attrs.get("is_recipe")) for row in found) == 1
    with sqlite3.connect(folder / "store.db") as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


def assert_no_epoch_ran_twice(folder: Path, kills: int) -> None:
    """An epoch is trained again only where a kill came between its training and its state, once a kill."""
    logs = [path.read_text().split() for path in folder.glob("study/trials/*/epochs.log")]
    again = sum(len(epochs) - len(set(epochs)) for epochs in logs)
    assert again <= kills


@pytest.mark.timeout(150)
@pytest.mark.parametrize("kills", [3, pytest.param(25, marks=pytest.mark.slow)])
def test_a_killed_study_of_one_worker_ends_as_an_uninterrupted_one(
    argv: list[str], kills: int, tmp_path: Path, reference: Path
) -> None:
    kill_at_random(argv, kills, seed=kills)
    assert end(start(argv, 0.0)) == 0
    assert table(tmp_path) == table(reference)
    assert_no_epoch_ran_twice(tmp_path, kills)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kills", [3, pytest.param(25, marks=pytest.mark.slow)])
def test_killed_workers_lose_no_trial_and_make_none_twice(argv: list[str], kills: int, tmp_path: Path) -> None:
    kill_at_random(argv, kills, seed=kills, workers=4)
    last = [start(argv) for _ in range(4)]
    assert [end(process) for process in last] == [0] * 4
    assert_whole(tmp_path, TRIALS)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("storms", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_eight_starts_at_once_make_one_study(storms: int, phantom: Path, cache: Path, tmp_path: Path) -> None:
    for storm in range(storms):
        folder = tmp_path / str(storm)
        running = [start(flags(folder, phantom, cache, "--trials", "10"), 0.0) for _ in range(8)]
        assert [end(process) for process in running] == [0] * 8
        assert_whole(folder, 10)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_study_goes_on(number: signal.Signals, argv: list[str], tmp_path: Path, reference: Path) -> None:
    process = start(argv, 0.05)
    until = time.monotonic() + 30
    while not list(tmp_path.glob("study/trials/0001/last/state.json")) and time.monotonic() < until:
        time.sleep(0.02)

    os.kill(process.pid, number)
    assert end(process) == (130 if number == signal.SIGINT else 0)
    assert [row.state for row in rows(tmp_path)][-1] == TrialState.RUNNING
    assert end(start(argv, 0.0)) == 0
    assert table(tmp_path) == table(reference)


def test_a_kill_between_state_and_report_loses_nothing(argv: list[str], tmp_path: Path, reference: Path) -> None:
    class KilledError(BaseException):
        pass

    calls = 0

    def killed(config: TrainConfig, on_epoch: Callable[[dict[str, Any]], None], **more: Any) -> RunResult:
        def unheard(row: dict[str, Any]) -> None:
            nonlocal calls
            calls += 1
            if calls in (9, 40):
                raise KilledError
            on_epoch(row)

        return pretend(config, unheard, **more)

    for _ in range(2):
        with pytest.raises(KilledError):
            study(argv, killed)
    assert study(argv, killed) == 0
    assert table(tmp_path) == table(reference)


def late_riser(config: TrainConfig) -> list[float]:
    """The first seven trials are best in the last epoch alone, at which the later ones are left behind."""
    assert config.run.output is not None
    is_early = int(config.run.output.name) < 7
    return [*[0.5 if is_early else 0.6] * (config.optimisation.epochs - 1), 0.9 if is_early else 0.6]


def test_a_kill_after_the_last_report_of_a_trial_changes_no_verdict(
    phantom: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class KilledError(BaseException):
        pass

    seen: list[str] = []

    def killed(config: TrainConfig, *args: Any, **more: Any) -> RunResult:
        result = pretend(config, *args, **more)
        assert config.run.output is not None
        if result.is_finished and config.run.output.name not in seen:
            seen.append(config.run.output.name)
            raise KilledError
        return result

    monkeypatch.setattr("tests.pretending.curve", late_riser)
    argv = flags(tmp_path, phantom, cache, "--trials", "9", "--pruner", "median")
    while True:
        with contextlib.suppress(KilledError):
            assert study(argv, killed) == 0
            break
    assert len(seen) == 9
    assert [row.state for row in rows(tmp_path)] == [TrialState.COMPLETE] * 9


def hold(file: Path, seconds: float) -> Any:
    """HostLocks the write lock of a store for a while, from another process."""
    code = (
        f"import sqlite3, time; c = sqlite3.connect({str(file)!r}, isolation_level=None, timeout=60); "
        f"c.execute('BEGIN EXCLUSIVE'); print('held', flush=True); time.sleep({seconds}); c.execute('ROLLBACK')"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    return process


@pytest.mark.timeout(300)
@pytest.mark.parametrize("seconds", [6, pytest.param(30, marks=pytest.mark.slow)])  # Optuna gives up after 5
def test_a_store_that_is_held_at_a_report_and_at_an_end_loses_nothing(
    seconds: float, argv: list[str], tmp_path: Path, reference: Path
) -> None:
    holders: list[Any] = []

    def held(config: TrainConfig, on_epoch: Callable[[dict[str, Any]], None], **more: Any) -> RunResult:
        def hear(row: dict[str, Any]) -> None:
            if not holders and row["epoch"] == 3:
                holders.append(hold(tmp_path / "store.db", seconds))
            on_epoch(row)

        result = pretend(config, hear, **more)
        if len(holders) == 1:
            holders.append(hold(tmp_path / "store.db", seconds))
        return result

    assert study(argv, held) == 0
    assert [holder.wait() for holder in holders] == [0, 0]
    assert table(tmp_path) == table(reference)


def test_a_trial_that_diverges_counts_with_the_worst_dice_and_its_reason(argv: list[str], tmp_path: Path) -> None:
    assert study(argv, diverge) == 0
    bad = [row for row in rows(tmp_path) if row.params["max_lr"] > 1e-3]
    assert bad
    assert all(row.state == TrialState.COMPLETE and row.value == 0.0 for row in bad)
    assert all("diverged" in row.user_attrs["reason"] for row in bad)
    assert len(rows(tmp_path)) == TRIALS


def fail_in(number: int, error: Exception, times: int) -> Callable[..., RunResult]:
    """A run that fails so many times in a trial."""
    left = [times]

    def run(config: TrainConfig, *args: Any, **more: Any) -> RunResult:
        assert config.run.output is not None
        if config.run.output.name == f"{number:04d}" and left[0]:
            left[0] -= 1
            raise error
        return pretend(config, *args, **more)

    return run


def test_a_trial_that_is_out_of_memory_counts_with_its_reason(argv: list[str], tmp_path: Path) -> None:
    assert study(argv, fail_in(2, RuntimeError("CUDA out of memory"), 9)) == 0
    row = rows(tmp_path)[2]
    assert (row.state, row.value) == (TrialState.COMPLETE, 0.0)
    assert "out of memory" in row.user_attrs["reason"]


def test_a_trial_goes_on_after_two_errors_of_the_machine(argv: list[str], tmp_path: Path, reference: Path) -> None:
    assert study(argv, fail_in(2, OSError(28, "No space left on device"), 2)) == 0
    assert table(tmp_path) == table(reference)


def test_a_trial_fails_after_three_errors_and_is_replaced(argv: list[str], tmp_path: Path) -> None:
    assert study(argv, fail_in(2, OSError(28, "No space left on device"), 9)) == 0
    found = rows(tmp_path)
    assert found[2].state == TrialState.FAIL
    assert "No space left" in found[2].user_attrs["errors"][-1][1]
    assert sum(row.state in FINISHED for row in found) == TRIALS


def test_too_many_errors_in_a_row_stop_the_study(argv: list[str], tmp_path: Path, capsys: Any) -> None:
    def broken(*_: Any, **__: Any) -> RunResult:
        raise OSError(28, "No space left on device")

    assert study(argv, broken) == 1
    said = capsys.readouterr().err
    assert "errors in a row" in said
    assert "No space left" in said
    assert len(said.strip().splitlines()) == 1
    assert study(argv) == 0
    assert sum(row.state in FINISHED for row in rows(tmp_path)) == TRIALS


def test_the_recipe_is_tried_again_if_the_machine_failed_it(argv: list[str], tmp_path: Path) -> None:
    assert study([*argv, "--trials", "4"], fail_in(0, OSError("gone"), 3)) == 0
    assert [row.state for row in rows(tmp_path) if row.user_attrs.get("is_recipe")] == [
        TrialState.FAIL,
        TrialState.COMPLETE,
    ]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--weight-decay", "0.01"], "the recipe's weight_decay was 0.0001 and is 0.01"),
        (["--epochs", "7"], "the recipe's epochs was 6 and is 7"),
        (["--max-lr", "0.001"], "the space's max_lr was"),
        (["--objective", "val_loss"], "objective was mean_dice and is val_loss"),
        (["--seed", "1"], "the recipe's seed was 0 and is 1"),
        (["--val-fraction", "0.5"], "val_fraction was 0.2"),
    ],
)
def test_another_study_of_the_name_is_refused_with_the_differences(
    change: list[str], words: str, reference: Path, phantom: Path, cache: Path, capsys: Any
) -> None:
    before = table(reference)
    assert study([*flags(reference, phantom, cache, "--trials", "30"), *change]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert "--study-name" in said
    assert table(reference) == before


def test_another_data_set_is_refused(reference: Path, data: Path, cache: Path, capsys: Any) -> None:
    assert study(flags(reference, data, cache, "--trials", "30")) == 2
    assert "the content of images_medseg.npy is another" in capsys.readouterr().err


def test_the_folder_of_another_study_is_refused(reference: Path, argv: list[str], capsys: Any) -> None:
    assert study([*argv, "--output", str(reference / "study")]) == 2
    assert "another folder with --output" in capsys.readouterr().err


def test_a_study_that_matchai_did_not_make_is_refused(argv: list[str], tmp_path: Path, capsys: Any) -> None:
    optuna.create_study(study_name="study", storage=f"sqlite:///{tmp_path / 'store.db'}", direction="maximize")
    assert study(argv) == 2
    assert "matchai did not make" in capsys.readouterr().err


def test_a_minimised_objective_takes_the_least_of_its_epochs(argv: list[str], tmp_path: Path) -> None:
    assert study([*argv, "--objective", "val_loss", "--trials", "3", "--no-prune"], diverge) == 0
    for row in rows(tmp_path):
        if "reason" in row.user_attrs:
            assert row.value == float("inf")
        else:
            assert row.value == pytest.approx(1 / 6)


def test_an_objective_that_is_never_defined_is_a_reason(argv: list[str], tmp_path: Path) -> None:
    assert study([*argv, "--objective", "lesion_dice", "--trials", "2"]) == 0
    assert {row.value for row in rows(tmp_path)} == {0.0}
    assert "undefined" in rows(tmp_path)[0].user_attrs["reason"]


def test_another_space_is_searched(argv: list[str], tmp_path: Path) -> None:
    space = tmp_path / "space.yaml"
    space.write_text(yaml.safe_dump({"weight_decay": {"low": 1e-6, "high": 1e-2, "log": True}}))
    assert study([*argv, "--space", str(space), "--trials", "4"]) == 0
    assert {tuple(row.params) for row in rows(tmp_path)} == {("weight_decay",)}
    assert load_space(space, TrainConfig()).distributions == rows(tmp_path)[0].distributions


def test_values_that_the_data_refuses_are_told_before_the_first_trial(
    argv: list[str], tmp_path: Path, capsys: Any
) -> None:
    space = tmp_path / "space.yaml"
    space.write_text(yaml.safe_dump({"batch_size": {"choices": [6, 23]}}))
    # 24 training slices in batches of 23 leave one alone, which batch norm at 32 pixels cannot take
    assert study([*argv, "--space", str(space), "--image-size", "32"]) == 2
    assert "batch_size 23 would be refused" in capsys.readouterr().err
    assert not (tmp_path / "store.db").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--encoder", "resnet1888"], "resnet1888"),
        (["--encoder-weights", "nowhere.safetensors"], "nowhere.safetensors"),
        (["--batch-size", "23", "--image-size", "32"], "batch of one slice"),
        (["--mixed-precision", "fp16"], "fp16"),
    ],
)
def test_a_recipe_that_cannot_be_trained_is_told_before_the_first_trial(
    change: list[str], words: str, argv: list[str], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert study([*argv, *change]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "store.db").exists()


def test_a_screening_is_a_study_of_its_own_whose_best_are_trained_at_full_length(
    argv: list[str], tmp_path: Path
) -> None:
    assert study([*argv, "--screen-epochs", "2", "--confirm", "2"]) == 0
    screen, full = rows(tmp_path, "study-screen"), rows(tmp_path)
    assert len(screen) == TRIALS
    assert {len(row.intermediate_values) for row in screen} == {2}
    assert {len(row.intermediate_values) for row in full} == {6}
    assert full[0].user_attrs["is_recipe"]
    ranking = sorted(screen[1:], key=lambda row: (-(row.value or 0), row.number))
    assert [row.params for row in full[1:]] == [row.params for row in ranking[:3]]
    assert study([*argv, "--screen-epochs", "2", "--confirm", "2"]) == 0
    assert len(rows(tmp_path)) == 4


def test_confirming_runs_are_no_rows_and_all_on_the_same_fresh_seeds(argv: list[str], tmp_path: Path) -> None:
    assert study([*argv, "--confirm", "2"]) == 0
    assert len(rows(tmp_path)) == TRIALS
    runs = sorted(path.name for path in (tmp_path / "study" / "confirm").iterdir() if path.is_dir())
    numbers = {name.split("-")[1] for name in runs}
    assert "0000" in numbers
    assert runs == sorted(f"trial-{number}-seed-{seed}" for number in numbers for seed in (1, 2, 3))
    assert len(runs) == 9


def test_only_confirmation_writes_best_yaml(argv: list[str], tmp_path: Path, capsys: Any) -> None:
    assert study([*argv, "--trials", "12"]) == 0
    assert "not confirmed" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "study").glob("*.yaml")} == {"best-unconfirmed.yaml"}
    assert study([*argv, "--trials", "12", "--confirm", "2"]) == 0
    assert (tmp_path / "study" / "best.yaml").is_file()


def test_a_confirmation_that_was_killed_goes_on(argv: list[str], tmp_path: Path) -> None:
    class KilledError(BaseException):
        pass

    seen: list[str] = []

    def killed(config: TrainConfig, *args: Any, **more: Any) -> RunResult:
        assert config.run.output is not None
        name = config.run.output.name
        if name.startswith("trial-") and name not in seen:
            seen.append(name)
            if len(seen) in (2, 5):
                raise KilledError
        return pretend(config, *args, **more)

    for _ in range(2):
        with pytest.raises(KilledError):
            study([*argv, "--confirm", "2"], killed)
    assert study([*argv, "--confirm", "2"], killed) == 0
    attributes = optuna.load_study(study_name="study", storage=f"sqlite:///{tmp_path / 'store.db'}").user_attrs
    assert sum(name.startswith("confirm ") for name in attributes) == 9


def out_of_memory_on_one(config: TrainConfig, *args: Any, **more: Any) -> RunResult:
    """A run whose second process runs out of memory in trial 1, while the first waits for it."""
    assert config.run.output is not None
    if config.run.output.name == "0001":
        if not is_main_process():
            raise RuntimeError("CUDA out of memory")
        any_process(False)
    return pretend(config, *args, **more)


def broken_on_main(config: TrainConfig, *args: Any, **more: Any) -> RunResult:
    assert config.run.output is not None
    if config.run.output.name == "0001":
        if is_main_process():
            raise OSError(28, "No space left on device")
        any_process(False)
    return pretend(config, *args, **more)


@pytest.mark.timeout(100)
def test_two_processes_make_the_table_of_one(argv: list[str], tmp_path: Path, reference: Path) -> None:
    assert [end(process) for process in start_group(argv, 2, tmp_path / "told")] == [0, 0]
    assert table(tmp_path) == table(reference)


@pytest.mark.timeout(100)
@pytest.mark.parametrize(
    ("run", "state", "words"),
    [
        (out_of_memory_on_one, TrialState.COMPLETE, "out of memory"),
        (broken_on_main, TrialState.RUNNING, "No space left on device"),
    ],
)
def test_an_error_on_one_process_is_the_same_error_on_all_within_half_a_minute(
    run: Callable[..., RunResult],
    state: TrialState,
    words: str,
    argv: list[str],
    tmp_path: Path,
    reference: Path,
) -> None:
    assert [end(process, 30) for process in start_group(argv, 2, tmp_path / "told", run)] == [1, 1]
    said = [(tmp_path / "told" / str(rank)).read_text() for rank in (0, 1)]
    assert all(words in one for one in said)
    assert rows(tmp_path)[1].state == state
    assert end(start(argv)) == 0
    assert len(rows(tmp_path)) == TRIALS
    if state == TrialState.RUNNING:
        assert table(tmp_path) == table(reference)


@pytest.mark.timeout(100)
def test_a_signal_to_one_process_stops_all(argv: list[str], tmp_path: Path, reference: Path) -> None:
    group = start_group([*argv, "--epochs", "400"], 2, tmp_path / "told")
    until = time.monotonic() + 30
    while not list(tmp_path.glob("study/trials/0000/last/state.json")) and time.monotonic() < until:
        time.sleep(0.02)
    os.kill(group[1].pid, signal.SIGTERM)
    assert [end(process, 30) for process in group] == [0, 0]
    assert [row.state for row in rows(tmp_path)] == [TrialState.RUNNING]


@pytest.mark.timeout(100)
def test_a_store_that_fails_on_the_main_process_ends_all(argv: list[str], tmp_path: Path) -> None:
    (tmp_path / "store.db").write_bytes(b"no database at all, but a text" * 100)
    assert [end(process, 30) for process in start_group(argv, 2, tmp_path / "told")] == [2, 2]
    assert "error: " in (tmp_path / "told" / "0").read_text()


@pytest.mark.timeout(100)
def test_a_study_on_a_server_is_that_of_a_file(
    argv: list[str], database: str, reference: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert study([*argv, "--storage", database]) == 0
    assert table(database) == table(reference)
    assert quote(PASSWORD) not in "".join(capsys.readouterr())


@pytest.mark.timeout(200)
def test_killed_workers_on_a_server_lose_no_trial(argv: list[str], database: str, tmp_path: Path) -> None:
    on_server = [*argv, "--storage", database]
    kill_at_random(on_server, 2, seed=1, workers=3)
    assert [end(process) for process in [start(on_server) for _ in range(3)]] == [0] * 3
    found = rows(database)
    assert [row.number for row in found] == list(range(TRIALS))
    assert {row.state for row in found} <= set(FINISHED)
    assert_no_epoch_ran_twice(tmp_path, 6)


def on_host(name: str, argv: list[str], database: str, tmp_path: Path, seconds: float) -> Any:
    """Starts a worker on another host: with locks and runs of its own, as far as it can tell."""
    (tmp_path / name).mkdir(exist_ok=True)
    argv = [*argv, "--storage", database, "--output", str(tmp_path / name / "study")]
    return start(argv, seconds, TMPDIR=str(tmp_path / name), LEASE="3")


def wait_for_rows(database: str, number: int, epochs: int = 0) -> None:
    until = time.monotonic() + 40
    while time.monotonic() < until:
        with contextlib.suppress(KeyError):  # no study yet
            found = rows(database)
            if len(found) >= number and len(found[number - 1].intermediate_values) >= epochs:
                return
        time.sleep(0.05)
    raise TimeoutError


@pytest.mark.timeout(150)
def test_a_trial_of_a_lost_host_is_adopted_when_its_lease_is_over(
    argv: list[str], database: str, tmp_path: Path
) -> None:
    lost = on_host("a", argv, database, tmp_path, 0.2)
    wait_for_rows(database, 2, epochs=2)
    lost.kill()
    lost.join()
    assert end(on_host("b", argv, database, tmp_path, 0.0)) == 0
    found = rows(database)
    assert [row.number for row in found] == list(range(TRIALS))
    assert {row.state for row in found} <= set(FINISHED)


@pytest.mark.timeout(150)
def test_a_living_trial_on_another_host_is_left_to_it_and_a_stopped_one_is_not(
    argv: list[str], database: str, tmp_path: Path
) -> None:
    argv = [*argv, "--trials", "3"]
    slow = on_host("a", argv, database, tmp_path, 0.9)  # six epochs take longer than the lease
    wait_for_rows(database, 1, epochs=1)
    fast = on_host("b", argv, database, tmp_path, 0.0)
    assert end(fast) == 0
    assert end(slow) == 0
    assert not (tmp_path / "b" / "study" / "trials" / "0000").exists()
    argv = [*argv, "--trials", "5"]
    stopped = on_host("a", argv, database, tmp_path, 0.3)
    wait_for_rows(database, 4, epochs=1)
    os.kill(stopped.pid, signal.SIGSTOP)
    assert end(on_host("b", argv, database, tmp_path, 0.0)) == 0
    os.kill(stopped.pid, signal.SIGCONT)
    assert end(stopped) == 0
    found = rows(database)
    assert [row.number for row in found] == list(range(5))
    assert {row.state for row in found} <= set(FINISHED)
    assert found[3].user_attrs["run"]
    assert (tmp_path / "b" / "study" / "trials" / "0003").exists()


def late_error(config: TrainConfig, on_epoch: Callable[[dict[str, Any]], None], **more: Any) -> RunResult:
    """A run that fails after all its epochs, each time it is started."""
    pretend(config, on_epoch, **more)
    raise OSError(28, "No space left on device")


def test_an_error_that_always_comes_after_the_last_epoch_stops_the_study(argv: list[str], tmp_path: Path) -> None:
    assert study(argv, late_error) == 1
    assert [row.state for row in rows(tmp_path)] == [TrialState.FAIL] * 2
    assert study(argv) == 0
    assert sum(row.state in FINISHED for row in rows(tmp_path)) == TRIALS


def test_an_error_in_every_confirming_run_stops_the_study(argv: list[str], tmp_path: Path) -> None:
    def run(config: TrainConfig, *args: Any, **more: Any) -> RunResult:
        assert config.run.output is not None
        return (late_error if config.run.output.name.startswith("trial-") else pretend)(config, *args, **more)

    assert study([*argv, "--trials", "3", "--confirm", "1"], run) == 1
    assert study([*argv, "--trials", "3", "--confirm", "1"]) == 0
    assert (tmp_path / "study" / "best.yaml").is_file()


def test_trial_after_trial_out_of_memory_stops_the_study(argv: list[str], tmp_path: Path, capsys: Any) -> None:
    def full(*_: Any, **__: Any) -> RunResult:
        raise RuntimeError("CUDA out of memory")

    assert study(argv, full) == 1
    assert "out of memory" in capsys.readouterr().err
    assert [row.state for row in rows(tmp_path)] == [TrialState.COMPLETE, TrialState.COMPLETE, TrialState.RUNNING]


def test_a_reason_that_no_longer_holds_is_taken_back(argv: list[str], tmp_path: Path, reference: Path) -> None:
    calls: list[int] = []

    def killed(config: TrainConfig, *args: Any, **more: Any) -> RunResult:
        assert config.run.output is not None
        if config.run.output.name == "0001" and not calls:
            calls.append(1)
            optuna_study = optuna.load_study(study_name="study", storage=f"sqlite:///{tmp_path / 'store.db'}")
            trial = optuna.trial.Trial(optuna_study, optuna_study.get_trials()[1]._trial_id)
            trial.set_user_attr("reason", "out of memory")
            raise KeyboardInterrupt
        return pretend(config, *args, **more)

    assert study(argv, killed) == 130
    assert study(argv, killed) == 0
    assert table(tmp_path) == table(reference)


def test_a_trial_whose_folder_another_process_still_holds_is_left_to_it(
    argv: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("matchai.study.leases.AVOID", 0.5)
    (tmp_path / "study" / "trials").mkdir(parents=True)
    folder = tmp_path / "study" / "trials" / "0001"
    code = (
        "import sys, time; from pathlib import Path; from matchai.training.checkpoint import lock_folder\n"
        "folder = Path(sys.argv[1]); folder.mkdir()\n"
        "with lock_folder(folder): print('held', flush=True); time.sleep(4)"
    )
    holders: list[Any] = []

    def run(config: TrainConfig, *args: Any, **more: Any) -> RunResult:
        if not holders:
            command = [sys.executable, "-c", code, str(folder)]
            holders.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
            holders[0].stdout.readline()
        return pretend(config, *args, **more)

    assert study([*argv, "--trials", "3"], run) == 0
    assert holders[0].wait() == 0
    assert [row.state for row in rows(tmp_path)] == [TrialState.COMPLETE] * 3
    assert "errors" not in rows(tmp_path)[1].user_attrs


def test_a_recipe_that_fails_on_a_fresh_seed_is_not_the_answer(argv: list[str], tmp_path: Path, capsys: Any) -> None:
    def run(config: TrainConfig, *args: Any, **more: Any) -> RunResult:
        assert config.run.output is not None
        if config.run.output.name == "trial-0000-seed-2":
            raise DivergedError("not finite")
        return pretend(config, *args, **more)

    assert study([*argv, "--confirm", "1"], run) == 0
    assert "the recipe failed on one of them" in capsys.readouterr().out
    best = yaml.safe_load((tmp_path / "study" / "best.yaml").read_text())
    assert best["recorded"]["trial"] != 0
    assert not list((tmp_path / "study" / "confirm").glob("*/last"))


def test_a_report_leaves_the_answer_and_the_store_as_they_are(
    argv: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert study([*argv, "--confirm", "1"]) == 0
    best = (tmp_path / "study" / "best.yaml").read_bytes()
    before = table(tmp_path)
    place = ["--storage", str(tmp_path / "store.db"), "--output", str(tmp_path / "study")]
    assert study(["--report", "--confirm", "1", "--seed", "7", *place]) == 0
    assert (tmp_path / "study" / "best.yaml").read_bytes() == best
    assert table(tmp_path) == before
    monkeypatch.chdir(tmp_path)
    assert study(["--report", "--storage", "nowhere/none.db"]) == 2
    assert not (tmp_path / "nowhere").exists()


def killed_on_one(config: TrainConfig, *args: Any, **more: Any) -> RunResult:
    assert config.run.output is not None
    if config.run.output.name == "0001":
        if not is_main_process():
            os.kill(os.getpid(), signal.SIGKILL)
        any_process(False)
    return pretend(config, *args, **more)


@pytest.mark.timeout(100)
def test_a_killed_process_of_two_is_no_error_of_the_trial(argv: list[str], tmp_path: Path, reference: Path) -> None:
    assert [end(process, 30) for process in start_group(argv, 2, tmp_path / "told", killed_on_one)] == [1, -9]
    assert "lost another" in (tmp_path / "told" / "0").read_text()
    assert "errors" not in rows(tmp_path)[1].user_attrs
    assert study(argv) == 0
    assert table(tmp_path) == table(reference)


@pytest.mark.timeout(60)
def test_a_signal_is_heard_while_the_store_is_waited_for(argv: list[str], tmp_path: Path) -> None:
    process = start(argv, 0.05)
    until = time.monotonic() + 30
    while not (tmp_path / "study" / "trials" / "0001").exists() and time.monotonic() < until:
        time.sleep(0.02)
    holder = hold(tmp_path / "store.db", 50)
    time.sleep(1)
    os.kill(process.pid, signal.SIGTERM)
    assert end(process, 20) == 0
    holder.kill()
    holder.wait()
