"""Settings from the command line and YAML files, and back."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from matchai.settings.config import LEAVES, PLACE, PRESETS, TrainConfig
from matchai.settings.parsing import dump, load, load_recorded, parse, preset_config
from matchai.system.errors import InputError


def parsed(*argv: str) -> dict[str, Any]:
    return parse(list(argv), "", "matchai", TrainConfig).flat()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "settings.yaml"


def test_a_preset_wins_over_the_default() -> None:
    assert parsed("--preset", "quick")["image_size"] == PRESETS["quick"]["image_size"]


def test_a_file_wins_over_the_preset(file: Path) -> None:
    file.write_text("image_size: 96\n")
    found = parsed("--preset", "quick", "--config", str(file))
    assert found["image_size"] == 96
    assert found["epochs"] == PRESETS["quick"]["epochs"]


def test_a_flag_wins_over_the_file(file: Path) -> None:
    file.write_text("image_size: 96\nepochs: 5\n")
    found = parsed("--config", str(file), "--image-size", "160")
    assert (found["image_size"], found["epochs"]) == (160, 5)


def test_the_place_of_a_flag_does_not_matter(file: Path) -> None:
    file.write_text("image_size: 96\npreset: study\n")
    for argv in (["--config", str(file), "--epochs", "3"], ["--epochs", "3", f"--config={file}"]):
        found = parsed(*argv)
        assert (found["image_size"], found["epochs"], found["preset"]) == (96, 3, "study")


def test_the_last_of_a_repeated_flag_wins() -> None:
    assert parsed("--epochs", "3", "--epochs", "4")["epochs"] == 4


def test_the_last_of_a_repeated_preset_wins() -> None:
    found = parsed("--preset", "recipe", "--preset", "study")
    assert (found["preset"], found["image_size"]) == ("study", PRESETS["study"]["image_size"])


def test_the_preset_of_a_flag_wins_over_that_of_the_file(file: Path) -> None:
    file.write_text("preset: study\n")
    found = parsed("--config", str(file), "--preset", "quick")
    assert (found["preset"], found["image_size"]) == ("quick", PRESETS["quick"]["image_size"])


def test_without_data_the_preset_is_quick() -> None:
    assert parsed()["preset"] == "quick"


@pytest.mark.parametrize("argv", [["--data", "x"], ["--data=x"]])
def test_with_data_the_preset_is_the_recipe(argv: list[str]) -> None:
    found = parsed(*argv)
    assert (found["preset"], found["image_size"]) == ("recipe", TrainConfig().input.image_size)


def test_with_data_in_the_file_the_preset_is_the_recipe(file: Path) -> None:
    file.write_text("data: x\n")
    assert parsed("--config", str(file))["preset"] == "recipe"


def test_a_flag_is_the_settings_name_with_dashes() -> None:
    found = parsed("--max-lr", "1e-3", "--hu-window", "-1000", "400", "--lesion-classes", "a", "b", "--restart")
    assert (found["max_lr"], found["hu_window"], found["lesion_classes"], found["restart"]) == (
        0.001,
        (-1000.0, 400.0),
        ("a", "b"),
        True,
    )


@pytest.mark.parametrize("argv", [["--stray", "3"], ["--epochs", "many"], ["--preset", "best"], ["stray"]], ids=str)
def test_a_wrong_flag_exits_with_status_2(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(argv, "", "matchai", TrainConfig)
    assert caught.value.code == 2


@pytest.mark.parametrize("text", ["max_lr: 3e-4", "max_lr: '3e-4'", "max_lr: 0.0003"])
def test_a_bare_exponent_in_yaml_is_a_number(file: Path, text: str) -> None:
    file.write_text(text)
    assert parsed("--config", str(file))["max_lr"] == 0.0003


def test_an_unknown_yaml_name_is_told_with_the_nearest_and_its_file(file: Path) -> None:
    file.write_text("batch_sise: 4\n")
    with pytest.raises(InputError, match=r"settings\.yaml.*batch_sise.*did you mean batch_size"):
        load(file)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("epochs: 3\nepochs: 4\n", "epochs is given twice"),
        ("epochs: 3\n\tmax_lr: 1\n", "line 2"),
        ("epochs: [1\n", "YAML|line"),
        ("epochs: many\n", "epochs is 'many'"),
        ("max_lr: true\n", "max_lr is True"),
        ("- epochs\n", "list"),
        ("epochs\n", "str"),
        ("1: 2\n", "Unknown setting 1"),
        ("? [a]\n: 2\n", "YAML|line"),
        ("epochs: !!python/object/apply:os.getcwd []\n", "line 1"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_with_its_name(file: Path, text: str, told: str) -> None:
    file.write_text(text)
    with pytest.raises(InputError, match=told) as caught:
        load(file)
    assert str(file) in str(caught.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        parsed("--config", str(tmp_path / "absent.yaml"))


def test_a_folder_as_settings_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        load(tmp_path)


def test_a_binary_settings_file_is_refused(file: Path) -> None:
    file.write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(InputError, match="not a text file"):
        load(file)


def test_an_empty_file_is_no_settings(file: Path) -> None:
    file.write_text("# nothing\n")
    assert load(file) == {}


def value_of(name: str) -> st.SearchStrategy[Any]:
    """Any value that the setting's type and range allow."""
    leaf = LEAVES[name][1]
    kind: Any = leaf.type
    texts = st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"]), max_size=12)
    numbers = st.floats(allow_nan=False)
    paths = st.from_regex(r"[a-zA-Z0-9 _.:#-]{1,12}", fullmatch=True).map(Path)
    if get_origin(kind) is Literal:
        return st.sampled_from(get_args(kind))
    strategies: dict[Any, st.SearchStrategy[Any]] = {
        Path | None: st.none() | paths,
        int | None: st.none() | st.integers(0, 1024),
        tuple[float, float]: st.tuples(numbers, numbers),
        tuple[str, ...]: st.lists(texts, max_size=4).map(tuple),
        bool: st.booleans(),
        str: texts,
        float: numbers,
    }
    return strategies[kind] if kind in strategies else st.integers(leaf.metadata["low"], leaf.metadata["high"])


@settings(deadline=None, max_examples=25)
@given(chosen=st.fixed_dictionaries({}, optional={name: value_of(name) for name in LEAVES if name not in PLACE}))
def test_dumped_settings_are_loaded_as_they_were(chosen: dict[str, Any]) -> None:
    config = TrainConfig().updated_from(chosen)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(dump(config, {"torch": "2.6"}), encoding="utf-8")
        assert preset_config(load(path)) == config
        assert load_recorded(path) == {"torch": "2.6"}


def test_where_a_run_goes_is_not_dumped(file: Path) -> None:
    file.write_text(dump(TrainConfig().updated(output="x", config="y", restart=True), {}))
    assert not set(PLACE) & set(load(file))


def test_help_all_tells_every_setting_and_imports_neither_torch_nor_numpy() -> None:
    code = (
        "import sys, atexit, runpy\n"
        "heavy = {'torch', 'numpy', 'cv2', 'smp', 'accelerate'}\n"
        "atexit.register(lambda: print('IMPORTED', sorted(heavy & set(sys.modules)), file=sys.stderr))\n"
        "sys.argv[1:] = ['--help-all']\n"
        "runpy.run_module('matchai.train', run_name='__main__')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "200"}
    )
    assert done.returncode == 0
    assert "IMPORTED []" in done.stderr
    missing = [name for name in LEAVES if f"--{name.replace('_', '-')}" not in done.stdout]
    assert missing == []


@pytest.mark.skipif(sys.platform == "win32", reason="processor time of a child is read by os.times")
def test_help_takes_under_one_and_a_half_seconds_of_the_processor() -> None:
    before = os.times()
    subprocess.run([sys.executable, "-m", "matchai.train", "--help"], capture_output=True, check=True)
    after = os.times()
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    assert spent < 1.5


def test_merge_keys_of_yaml_are_merged_and_their_source_is_no_setting(file: Path) -> None:
    file.write_text("common: &common\n  epochs: 7\n  batch_size: 5\n<<: *common\nbatch_size: 6\n")
    assert (parsed("--config", str(file))["epochs"], parsed("--config", str(file))["batch_size"]) == (7, 6)


def test_several_sources_may_be_merged(file: Path) -> None:
    file.write_text("a: &a {epochs: 7}\nb: &b {batch_size: 5}\n<<: [*a, *b]\n")
    assert (parsed("--config", str(file))["epochs"], parsed("--config", str(file))["batch_size"]) == (7, 5)


def test_settings_may_stand_in_their_groups(file: Path) -> None:
    file.write_text("optimisation:\n  epochs: 7\ninput: {phantom_slices: 64}\nbatch_size: 5\n")
    found = parsed("--config", str(file))
    assert (found["epochs"], found["phantom_slices"], found["batch_size"]) == (7, 64, 5)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("optimisation: {batch_size: 3}", "batch_size stands in optimisation, but belongs in sampling"),
        ("optimisation: {epochs: 3}\nepochs: 4", "epochs is given twice"),
        ("optimisation: {lr: 3}", "Unknown setting 'lr': did you mean max_lr"),
        ("optimisation: 3", "optimisation is a group of settings"),
    ],
)
def test_a_wrong_group_is_told(file: Path, text: str, told: str) -> None:
    file.write_text(text)
    with pytest.raises(InputError, match=told):
        load(file)


@pytest.mark.parametrize(
    ("flag", "meant"), [("--learning-rate=3e-4", "max-lr"), ("--bs", "batch-size"), ("--num_epochs", "epochs")]
)
def test_a_flag_of_other_programs_is_told_ours(flag: str, meant: str) -> None:
    with pytest.raises(InputError, match=f"did you mean --{meant}"):
        parse([flag, "4"], "", "matchai", TrainConfig)


@pytest.mark.parametrize(
    "text",
    [
        "d: &d {epochs: 3}\ne: &e\n  <<: *d\n  seed: 4\n<<: *e\n",
        "d: &d {epochs: 3}\noptimisation:\n  <<: *d\nseed: 4\n",
        "optimisation: {epochs: 3}\nsampling:\nseed: 4\n",
    ],
)
def test_merges_reach_through_mappings_and_empty_groups_say_nothing(file: Path, text: str) -> None:
    file.write_text(text)
    found = parsed("--config", str(file))
    assert (found["epochs"], found["seed"]) == (3, 4)
