"""Measures the study: `python benchmarks/tune.py --regret`, `--replay CURVES`, or `--throughput`.

`--regret` searches surrogates of known truth with matchai's search samplers, at random, and with Optuna's defaults of
4.x and 5.0; prints a Markdown table and writes every regret as JSON. `--replay` gives recorded validation curves to the
pruners in many orders, and counts the epochs used and the best configurations lost. One core; the full `--regret` takes
about a quarter of an hour, nearly all of it in the Gaussian processes. `--throughput` runs equal trials on the phantom
by matchai's workers and by Optuna's plain ways, one after the other in turns, and counts them by the hour.
"""

import argparse
import functools
import importlib.metadata
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.trial import TrialState, create_trial

from matchai.study.samplers import PRUNERS, SEARCH_SAMPLERS, make_pruner, propose
from matchai.system.files import write_whole
from matchai.system.machine import num_cores

SPACE: dict[str, BaseDistribution] = {
    "loss_mix_1": FloatDistribution(0, 1),
    "loss_mix_2": FloatDistribution(0, 1),
    "focal_gamma": FloatDistribution(0, 5),
    "sampler_weight": FloatDistribution(1, 10, log=True),
    "max_lr": FloatDistribution(5e-5, 5e-3, log=True),
}
RECIPE = {"loss_mix_1": 0.25, "loss_mix_2": 0.5, "focal_gamma": 2.5, "sampler_weight": 3.0, "max_lr": 5e-4}
LOOKS = (10, 25, 50)  # trials after which the best one is judged
BEST = 0.86  # Dice at a surrogate's optimum
DIVERGED = 0.25  # Dice of a run that blew up: everything is background
_STREAM = 0xBE7C

Record = dict[str, Any]
Settings = dict[str, Any]


@dataclass(frozen=True)
class Kind:
    """How surrogates of a kind differ from each other and from those of other kinds.

    Attributes:
        width: Of the hill around the optimum, in units of the plain kind's.
        noise: Standard deviation of a value around the truth.
        coupling: Strength of the interactions, in units of the plain kind's.
        is_at_edges: Whether focal gamma and sampler weight are best at an end of their range, and the mix at a corner.
    """

    width: float = 1.0
    noise: float = 0.008
    coupling: float = 1.0
    is_at_edges: bool = False


KINDS = {
    "plain": Kind(),
    "coupled": Kind(coupling=2.0),
    "narrow": Kind(width=0.6),
    "noisy": Kind(noise=0.02),
    "at edges": Kind(is_at_edges=True),
}


class Surrogate:
    """A stand-in for training: the Dice of settings, with a known truth and with noise; another one for every seed.

    A hill over the mix of the losses (in Hellinger's distance), focal gamma, and the logarithms of sampler weight and
    learning rate, with its top anywhere. Gamma matters in proportion to the focal share; the best learning rate shifts
    with the Dice share, and falls off faster above than below. Past a cliff in the learning rate, whose place shifts
    with the Dice share too, training diverges. One value in ten is low by more than the noise.

    Args:
        kind: One of `KINDS`.
        seed: Of the instance.
    """

    def __init__(self, kind: str, seed: int) -> None:
        self.kind, self.seed = KINDS[kind], seed
        draw = np.random.default_rng([_STREAM, seed])
        at_edges = self.kind.is_at_edges
        self.mix = draw.dirichlet([0.5, 0.5, 0.5] if at_edges else [2, 3, 2])
        self.gamma = draw.choice([0.0, 1.0]) if at_edges else draw.uniform(0.1, 0.9)
        self.weight = draw.choice([0.0, 1.0]) if at_edges else draw.uniform(0, 1)
        self.rate = draw.uniform(0.15, 0.75)
        self.steepness = draw.uniform(0.5, 1.5, 4) * [0.35, 0.32, 0.08, 0.5] / self.kind.width**2
        self.shift = self.kind.coupling * draw.uniform(-0.4, 0.4)
        self.focus = draw.uniform(0.5, 1.5)
        self.cliff = min(0.97, self.rate + draw.uniform(0.12, 0.4))
        self.tilt = self.kind.coupling * draw.uniform(-0.3, 0.3)

    def truth(self, settings: Settings) -> float:
        """The Dice that these settings come to on average over many seeds, but for the low outliers."""
        dice = 1 - math.sqrt(settings["loss_mix_1"])
        cross_entropy = (1 - dice) * settings["loss_mix_2"]
        mix = np.array([dice, cross_entropy, max(0.0, 1 - dice - cross_entropy)])
        gamma = settings["focal_gamma"] / 5
        weight = math.log(settings["sampler_weight"]) / math.log(10)
        rate = math.log(settings["max_lr"] / 5e-5) / math.log(100)
        away = dice - self.mix[0]
        if rate > self.cliff + self.tilt * away:
            return DIVERGED
        off = rate - self.rate - self.shift * away
        share = min(3.0, self.focus * mix[2] / max(self.mix[2], 0.1))
        parts = [
            float(((np.sqrt(mix) - np.sqrt(self.mix)) ** 2).sum()),
            share ** min(1.0, self.kind.coupling) * (gamma - self.gamma) ** 2,
            (weight - self.weight) ** 2,
            off**2 * (1.5 if off > 0 else 1.0),
        ]
        # bends, so that the worst settings lose 0.5 and not more
        return BEST - 0.5 * (1 - math.exp(-float(np.dot(self.steepness, parts)) / 0.5))

    def value(self, settings: Settings, number: int) -> float:
        """What trial `number` reports for these settings; its noise is the same for every search."""
        draw = np.random.default_rng([_STREAM, self.seed, number])
        noise = draw.normal(0, self.kind.noise) - (draw.random() < 0.1) * draw.exponential(2.5 * self.kind.noise)
        return max(0.0, self.truth(settings) + noise)


OPTUNA: dict[str, Callable[[int], BaseSampler]] = {
    "random": lambda seed: RandomSampler(seed=seed),
    "Optuna 4.x default": lambda seed: TPESampler(seed=seed, multivariate=False, constant_liar=False),
    "Optuna 5.0 default": lambda seed: TPESampler(seed=seed),
}
OURS = {f"matchai, {name}": name for name in SEARCH_SAMPLERS if name != "random"}


def regrets(searcher: str, kind: str, seed: int) -> tuple[list[float], float]:
    """Dice lost by taking the best trial of a study for the best settings, after each of `LOOKS`; seconds of search."""
    surrogate = Surrogate(kind, seed)
    sampler = None if searcher in OURS else OPTUNA[searcher](seed)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    lost, seconds = [], 0.0
    for number in range(max(LOOKS)):
        start = time.perf_counter()
        if searcher in OURS:
            settings = propose(OURS[searcher], seed, study, number, SPACE) if number else RECIPE
            seconds += time.perf_counter() - start
            value = surrogate.value(settings, number)
            study.add_trial(create_trial(params=settings, distributions=SPACE, value=value))
        else:
            if number == 0:
                study.enqueue_trial(RECIPE)
            trial = study.ask(SPACE)
            seconds += time.perf_counter() - start
            study.tell(trial, surrogate.value(trial.params, number))
        if number + 1 in LOOKS:
            lost.append(BEST - surrogate.truth(study.best_trial.params))
    return lost, seconds


def measure_regret(options: argparse.Namespace) -> list[Record]:
    """The regrets of every search on every instance of every kind of surrogate."""
    records = []
    for kind in options.kinds:
        for searcher in (*OURS, *OPTUNA):
            for seed in range(options.instances):
                lost, seconds = regrets(searcher, kind, seed)
                rounded = {"regret": [round(one, 6) for one in lost], "seconds": round(seconds, 3)}
                records.append({"kind": kind, "search": searcher, "seed": seed, **rounded})
    return records


def regret_report(about: Record, records: list[Record], options: argparse.Namespace) -> str:
    """The table in Markdown, with what one must know to read it."""
    lines = [
        f"Dice lost × 1000 by declaring the best of so many trials, mean ± standard error of {options.instances} "
        "surrogates. Trial 0 is the recipe in all.",
        "",
        "| surrogates | search | "
        + " | ".join(f"{look} trials" for look in LOOKS)
        + " | of random's | of 4.x's | ms a trial |",
        "|---|---|" + "---|" * (len(LOOKS) + 3),
    ]
    for kind in options.kinds:
        last = {name: mean_of(records, kind, name)[0][-1] for name in (*OURS, *OPTUNA)}
        for name in (*OURS, *OPTUNA):
            means, errors, seconds = mean_of(records, kind, name)
            cells = [f"{1000 * mean:.1f} ± {1000 * error:.1f}" for mean, error in zip(means, errors, strict=True)]
            shares = [f"{100 * last[name] / last[other]:.0f} %" for other in ("random", "Optuna 4.x default")]
            lines.append(f"| {kind} | {name} | {' | '.join([*cells, *shares])} | {1000 * seconds / max(LOOKS):.1f} |")
    lines += [
        "",
        f"- The first of matchai's is its default. Shares are of the regrets after {max(LOOKS)} trials.",
        said(about),
    ]
    return "\n".join(lines)


def mean_of(records: list[Record], kind: str, search: str) -> tuple[NDArray[Any], NDArray[Any], float]:
    """Means and standard errors after each of `LOOKS`, and mean seconds of a study's search."""
    own = [record for record in records if (record["kind"], record["search"]) == (kind, search)]
    lost = np.array([record["regret"] for record in own])
    errors = lost.std(axis=0, ddof=min(1, len(own) - 1)) / math.sqrt(len(own))
    return lost.mean(axis=0), errors, float(np.mean([record["seconds"] for record in own]))


def read_curves(path: Path) -> NDArray[np.float64]:
    """Recorded curves, (configurations, seeds, epochs): a JSON object a line, of `config`, `seed` and `mean_dice`."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    curves = {(row["config"], row["seed"]): row["mean_dice"] for row in rows}
    seeds = sorted({seed for _, seed in curves})
    return np.array([[curves[config, seed] for seed in seeds] for config in sorted({config for config, _ in curves})])


def replay(curves: NDArray[np.float64], order: Sequence[int], pruner: optuna.pruners.BasePruner) -> list[int]:
    """Epochs that each configuration was trained for, by configuration, had a study with this pruner met these curves.

    Args:
        curves: (configurations, epochs), one seed's; configuration 0 is the recipe.
        order: Of the configurations.
        pruner: Asked after every epoch.
    """
    num_epochs = curves.shape[1]
    study = optuna.create_study(direction="maximize")
    trained = [0] * len(curves)
    for config in order:
        attributes = {"is_recipe": True} if config == 0 else {}
        reported: dict[int, float] = {}
        row = create_trial(state=TrialState.RUNNING, user_attrs=attributes)
        row.number = len(study.get_trials(deepcopy=False))
        is_pruned = False
        while len(reported) < num_epochs and not is_pruned:
            reported[len(reported) + 1] = float(curves[config, len(reported)])
            row.intermediate_values = reported
            is_pruned = pruner.prune(study, row)
        trained[config] = len(reported)
        state = TrialState.PRUNED if is_pruned else TrialState.COMPLETE
        value = max(reported.values())
        study.add_trial(create_trial(state=state, value=value, intermediate_values=reported, user_attrs=attributes))
    return trained


def measure_replay(options: argparse.Namespace) -> list[Record]:
    """What each pruner saves and loses on every seed's curves in every order."""
    curves = read_curves(options.replay)
    num_configs, num_seeds, num_epochs = curves.shape
    best = np.argsort(-curves.max(axis=2).mean(axis=1), kind="stable")[:3]
    records = []
    for name in PRUNERS:
        pruner = make_pruner(name, num_epochs)
        for number in range(options.orders):
            order = [int(config) for config in np.random.default_rng([_STREAM, number]).permutation(num_configs)]
            for seed in range(num_seeds):
                trained = np.array(replay(curves[:, seed], order, pruner))
                lost = int((trained[best] < num_epochs).sum())
                share = float(trained.sum() / (num_configs * num_epochs))
                pruned = trained[trained < num_epochs]
                earliest = int(pruned.min()) if len(pruned) else None
                records.append(
                    {"pruner": name, "share": share, "lost": lost, "pruned": len(pruned), "earliest": earliest}
                )
    return records


def replay_report(about: Record, records: list[Record], options: argparse.Namespace) -> str:
    """The table in Markdown, with what one must know to read it."""
    lines = [
        f"Recorded curves replayed in {options.orders} random orders, each seed by itself.",
        "",
        "| pruner | epochs used (smallest–largest) | trials pruned | earliest epoch | true top 3 pruned |",
        "|---|---|---|---|---|",
    ]
    for name in PRUNERS:
        own = [record for record in records if record["pruner"] == name]
        shares = [100 * record["share"] for record in own]
        earliest = min((record["earliest"] for record in own if record["earliest"]), default="–")
        lines.append(
            f"| {name} | {np.mean(shares):.1f} % ({min(shares):.1f}–{max(shares):.1f}) "
            f"| {np.mean([record['pruned'] for record in own]):.1f} | {earliest} "
            f"| {sum(record['lost'] for record in own)} of {3 * len(own)} |"
        )
    lines += ["", "- The true top 3 are those of the best mean over the seeds of the best epoch.", said(about)]
    return "\n".join(lines)


LOOP = """
import sys, optuna
from matchai import run
from matchai.settings.parsing import preset_config
folder, trials = sys.argv[1], int(sys.argv[2])

def objective(trial):
    max_lr = trial.suggest_float("max_lr", 5e-5, 1e-2, log=True)
    config = preset_config({"max_lr": max_lr}, preset="study")
    return run(config.updated(output=f"{folder}/{trial.number}", cache=f"{folder}/cache")).best_mean_dice

study = optuna.create_study(storage=f"sqlite:///{folder}/store.db", direction="maximize", sampler=
    optuna.samplers.RandomSampler(seed=0))
study.optimize(objective, n_trials=trials)
"""
TRAIN = """
import json, subprocess, sys, optuna
folder, trials = sys.argv[1], int(sys.argv[2])

def objective(trial):
    max_lr = trial.suggest_float("max_lr", 5e-5, 1e-2, log=True)
    output = f"{folder}/{trial.number}"
    command = [sys.executable, "-m", "matchai.train", "--preset", "study", "--max-lr", str(max_lr)]
    subprocess.run([*command, "--output", output, "--cache", f"{folder}/cache"], check=True)
    return max(json.loads(line)["mean_dice"] for line in open(f"{output}/history.jsonl"))

study = optuna.create_study(storage=f"sqlite:///{folder}/store.db", direction="maximize", sampler=
    optuna.samplers.RandomSampler(seed=0))
study.optimize(objective, n_trials=trials)
"""


def measure_throughput(options: argparse.Namespace) -> list[Record]:
    """Wall and CPU seconds of so many trials by every way, start and end of the processes included."""
    space = "max_lr: {low: 5.0e-5, high: 1.0e-2, log: true}\n"

    def by_matchai(folder: Path, workers: int) -> list[str]:
        return [
            *("-m", "matchai.tune", "--preset", "study", "--trials", str(options.trials), "--workers", str(workers)),
            *("--confirm", "0", "--no-prune", "--search-sampler", "random", "--space", str(folder / "space.yaml")),
            *("--storage", str(folder / "store.db"), "--output", str(folder / "study")),
        ]

    def by_script(folder: Path, script: str) -> list[str]:
        return ["-c", script, str(folder), str(options.trials)]

    ways: dict[str, Callable[[Path], list[str]]] = {
        f"matchai, --workers {number}": functools.partial(by_matchai, workers=number) for number in options.workers
    }
    ways["Optuna, one process in a loop"] = functools.partial(by_script, script=LOOP)
    ways["Optuna, a process a trial"] = functools.partial(by_script, script=TRAIN)
    records = []
    for _ in range(options.rounds):
        for way, command in ways.items():
            with tempfile.TemporaryDirectory() as name:
                folder = Path(name)
                (folder / "space.yaml").write_text(space)
                before, began = os.times(), time.perf_counter()
                subprocess.run(
                    [sys.executable, *command(folder)], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
                )
                after, seconds = os.times(), time.perf_counter() - began
                cpu = after.children_user + after.children_system - before.children_user - before.children_system
            records.append({"way": way, "trials": options.trials, "seconds": seconds, "cpu_seconds": cpu})
    return records


def throughput_report(about: Record, records: list[Record], options: argparse.Namespace) -> str:
    """The table in Markdown, with what one must know to read it."""
    lines = [
        f"{options.trials} trials of preset study on the phantom, none pruned, medians of {options.rounds} rounds.",
        "",
        "| way | trials an hour | wall seconds (smallest–largest) | CPU seconds | wall against one worker |",
        "|---|---|---|---|---|",
    ]
    first = None
    for way in dict.fromkeys(record["way"] for record in records):
        own = [record for record in records if record["way"] == way]
        wall = sorted(record["seconds"] for record in own)
        middle, cpu = float(np.median(wall)), float(np.median([record["cpu_seconds"] for record in own]))
        first = first or middle
        lines.append(
            f"| {way} | {3600 * options.trials / middle:.0f} | {middle:.0f} ({wall[0]:.0f}–{wall[-1]:.0f}) | {cpu:.0f} "
            f"| {middle / first:.2f} |"
        )
    lines += ["", "- Start and end of all processes, the phantom and the report are in it.", said(about)]
    return "\n".join(lines)


def said(about: Record) -> str:
    machine = about["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    return f"- {machine['cpu']}, {machine['cores']} cores; {versions}; {about['date']}; `{about['command']}`."


def cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.machine()


def about_this() -> Record:
    """What a figure is to be read with: machine, versions, command and date."""
    versions = {name: importlib.metadata.version(name) for name in ("optuna", "torch", "numpy", "scipy")}
    return {
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": {"cpu": cpu_model(), "cores": num_cores()},
        "versions": {"python": platform.python_version(), **versions},
    }


def write(path: Path, about: Record, records: list[Record]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(f"  {json.dumps(record)}" for record in records)
    head = json.dumps(about, indent=1, ensure_ascii=False).removesuffix("\n}")
    write_whole(path, f'{head},\n "measurements": [\n{lines}\n ]\n}}\n'.encode())


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measures the study: its search, its pruner.")
    parser.add_argument("--regret", action="store_true", help="search surrogates of known truth")
    parser.add_argument("--instances", type=int, default=40, help="surrogates of each kind")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="kinds of surrogates")
    parser.add_argument("--replay", type=Path, metavar="CURVES", help="give recorded curves to the pruners")
    parser.add_argument("--orders", type=int, default=12, help="orders of the recorded configurations")
    parser.add_argument("--throughput", action="store_true", help="run equal trials by several ways")
    parser.add_argument("--trials", type=int, default=8, help="of each way")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="numbers of workers")
    parser.add_argument("--rounds", type=int, default=3, help="of all ways")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="folder of the JSON")
    options = parser.parse_args(arguments)
    if not options.regret and options.replay is None and not options.throughput:
        parser.error("nothing to measure: give --regret, --replay with a file of curves, or --throughput.")
    if min(options.instances, options.orders, options.trials, options.rounds, *options.workers) < 1:
        parser.error("numbers must be at least 1.")
    return options


def main() -> None:
    options = parse(sys.argv[1:])
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    about = about_this()
    if options.regret:
        records = measure_regret(options)
        write(options.output / "tune_regret.json", about, records)
        print(regret_report(about, records, options))
    if options.replay is not None:
        records = measure_replay(options)
        write(options.output / "tune_replay.json", about, records)
        print(replay_report(about, records, options))
    if options.throughput:
        records = measure_throughput(options)
        write(options.output / "tune_throughput.json", about, records)
        print(throughput_report(about, records, options))


if __name__ == "__main__":
    main()
