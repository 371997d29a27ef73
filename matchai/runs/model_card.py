"""The model card of a run: what its weights are, what they were trained on, how well, and what they are not for."""

import hashlib
import os
import re
from pathlib import Path
from typing import Any

from matchai.metrics import NUM_RESAMPLES
from matchai.runs.facts import METRICS, RunFacts
from matchai.runs.limits import enumerate_names, format_result, limits
from matchai.system import InputError, plural, printable, write_whole
from matchai.training import BEST

CARD = "MODEL_CARD.md"
SIDES = {"L": "the left", "R": "the right", "A": "the front", "P": "the back"}
_SEAL = re.compile(r"<!-- written by matchai, seal ([0-9a-f]{64}) -->\n\Z")


def write_card(facts: RunFacts, path: Path) -> None:
    """Writes the model card, whole, unless someone has written into the one that is there; its folder must exist.

    Raises:
        InputError: If the card that is there was edited.
    """
    if path.exists() and not _is_as_written(path):
        raise InputError(f"{path} was edited by hand, so it is left as it is; move it away to have it written again.")
    text = printable(render_card(facts))
    seal = hashlib.sha256(text.encode()).hexdigest()
    write_whole(path, f"{text}\n<!-- written by matchai, seal {seal} -->\n")


def render_card(facts: RunFacts) -> str:
    """The card's Markdown; of paths it holds the last names alone."""
    parts = [
        f"# Model card: {_escape(facts.name)}",
        "**For research only. Not a medical device, and not for the care of patients.**",
        *("## Model", _model(facts)),
        *("## Intended use", _use(facts)),
        *("## Training data", _data(facts)),
        *("## Results", _results(facts)),
        *("## Limits", _points([*limits(facts)])),
        *("## Ethical considerations", _ethics(facts)),
        *("## How to load it", _loading(facts)),
        *("## Versions and licence", _versions(facts)),
    ]
    return "\n\n".join(parts) + "\n"


def _model(facts: RunFacts) -> str:
    network, settings = facts.config.network, facts.config.input
    low, high = settings.hu_window
    names = [f"{place} {_escape(name)}" for place, name in enumerate(facts.class_names)]
    lines = [
        f"A UNet++ of segmentation-models-pytorch with the encoder {_escape(network.encoder)}, begun from "
        f"{_beginning(facts)}.",
        f"Input: axial CT slices in Hounsfield units, {network.context * 2 + 1} "
        f"{'channel' if network.context == 0 else 'channels (the slice between its neighbours)'}, "
        f"{settings.image_size} × {settings.image_size} pixels, clipped to {low:g} to {high:g} HU.",
        f"Output: a score for each pixel and class: {', '.join(names)}.",
    ]
    if facts.about:
        mean, std = facts.about["mean_hu"], facts.about["std_hu"]
        sides = facts.about.get("orientation", "LP")
        sign = "−" if mean >= 0 else "+"
        words = f"Standardised as the training slices are: (HU {sign} {abs(mean):.4f}) / {std:.4f}."
        rows, columns = (SIDES[letter] for letter in sides[:2])
        lines.insert(2, f"{words} Rows run toward {rows} of the patient, columns toward {columns}.")
    return _points(lines, escape=False)


def _beginning(facts: RunFacts) -> str:
    weights, init = facts.config.network.encoder_weights, facts.config.run.init
    if init is not None:
        return f"the weights of {_escape(init.name)}"
    if weights == "none":
        return "random weights"
    return "ImageNet weights" if weights == "imagenet" else f"the encoder weights {_escape(Path(weights).name)}"


def _use(facts: RunFacts) -> str:
    lesions = enumerate_names(facts.config.input.lesion_classes)
    return (
        f"Research on the segmentation of {_escape(lesions)} in axial CT slices of the lungs that are like those it "
        "was trained on. Not for diagnosis, triage or treatment, and not for other organs, diseases or kinds of image."
    )


def _data(facts: RunFacts) -> str:
    settings, run = facts.config.input, facts.config.run
    num_groups = len(set(facts.groups))
    sides = (
        f"grouped {settings.folds}-fold, fold {settings.fold} validates"
        if settings.folds
        else f"{100 * settings.val_fraction:g} % of the slices validate"
    )
    sources = {
        "given": "the groups were given with the data",
        "volumes": "a group is a volume",
        "found": "the groups were found by likeness",
    }
    lines = [
        f"{facts.source[0].upper()}{facts.source[1:]}: {plural(len(facts.groups), 'slice')} in "
        f"{plural(num_groups, 'group')} ({sources[facts.grouping]}).",
        f"Split: {sides}, whole groups only, seed {run.seed}: {len(facts.train)} training and {len(facts.val)} "
        f"validation slices, the latter in {plural(facts.num_val_groups, 'group')}.",
    ]
    digests: dict[str, str] = facts.recorded.get("data", {})
    if not all(name.endswith(".npy") for name in digests):
        # names of volumes and pictures may tell who the patients are
        listing = "".join(f"{digests[name]}  {name}\n" for name in sorted(digests))
        digest = hashlib.sha256(os.fsencode(listing)).hexdigest()
        digests = {'the lines "digest  name" of all data in config.yaml, sorted by name': digest}
    rows = [[_escape(name), f"`{digest}`"] for name, digest in digests.items()]
    return _points(lines) + ("\n\n" + _table(["file", "SHA-256"], rows) if rows else "")


def _results(facts: RunFacts) -> str:
    if facts.best is None:
        return "No epoch is finished yet."
    epochs = facts.config.optimisation.epochs
    state = "" if facts.is_finished else f" (unfinished, {len(facts.history)} of {epochs} epochs)"
    head = f"Epoch {facts.best['epoch']}{state}: {format_result(facts)}."
    rows = []
    for one in facts.class_scores:
        size = "–" if one.num_pixels is None else f"{one.num_pixels:,}"
        rows.append([_escape(one.name), *map(one.format, METRICS), size])
    intervals = (
        f"Pooled over the pixels of all validation slices. In brackets 95 % intervals by a bootstrap over groups "
        f"({NUM_RESAMPLES:,} resamples), where there are two groups or more."
    )
    return "\n\n".join([_escape(head), _table(["class", *METRICS, "true pixels"], rows), intervals])


def _ethics(facts: RunFacts) -> str:
    if facts.is_synthetic:
        whose = "No person's images were used in this training, so it is not known how the model serves any person"
    else:
        whose = (
            "The images are of persons, used under the data's terms; the model may be wrong more often for those of "
            "whom the data holds few, and nothing is known here of age, sex or origin"
        )
    return f"{whose}. Whoever studies its masks should let a radiologist judge them, and should tell where they fail."


def _loading(facts: RunFacts) -> str:
    network = facts.config.network
    code = [
        "import segmentation_models_pytorch as smp",
        "from safetensors.torch import load_file",
        "",
        f"model = smp.UnetPlusPlus({network.encoder!r}, encoder_weights=None, in_channels={2 * network.context + 1}, "
        f"classes={len(facts.class_names)})",
        f'model.load_state_dict(load_file("{BEST}"))',
        "model.eval()  # takes standardised slices (B, channels, H, W) to logits (B, classes, H, W)",
    ]
    text = (
        "`python -m matchai.predict RUN INPUT --output DIR` does all that is needed around it; what is needed stands "
        f"in the header of `{BEST}`."
    )
    return "```python\n" + "\n".join(code) + "\n```\n\n" + text


def _versions(facts: RunFacts) -> str:
    versions = [f"{_escape(name)} {_escape(value)}" for name, value in facts.recorded.get("versions", {}).items()]
    told = f"Trained with {', '.join(versions)}. " if versions else ""
    return (
        f"{told}matchai is under the MIT licence; of the weights the terms of the data and of the pretrained weights "
        "decide."
    )


def _points(sentences: list[str], *, escape: bool = True) -> str:
    return "\n".join(f"- {_escape(sentence) if escape else sentence}" for sentence in sentences)


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _escape(text: Any) -> str:
    """Text that stays text in Markdown, in one line."""
    return re.sub(r"([\\`*_\[\]<>|#&~])", r"\\\1", " ".join(str(text).split()))


def _is_as_written(path: Path) -> bool:
    text = path.read_text(encoding="utf-8", errors="replace")
    found = _SEAL.search(text)
    return found is not None and hashlib.sha256(text[: found.start() - 1].encode()).hexdigest() == found[1]
