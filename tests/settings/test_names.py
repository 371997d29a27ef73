"""A name that is not ours leads to the setting that is meant, or to none."""

import pytest

from matchai.settings import names
from matchai.settings.command_settings import EvaluateSettings, PredictSettings
from matchai.settings.config import LEAVES
from matchai.settings.names import nearest
from matchai.settings.study_settings import TuneConfig


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        *[("learning_rate", "max_lr"), ("lr", "max_lr"), ("LR", "max_lr"), ("bs", "batch_size")],
        *[("num_epochs", "epochs"), ("epoch", "epochs"), ("batchsize", "batch_size"), ("image_siz", "image_size")],
        *[("wd", "weight_decay"), ("finetune", "init"), ("backbone", "encoder"), ("n_folds", "folds")],
    ],
)
def test_the_setting_that_is_meant_is_found(name: str, meant: str) -> None:
    assert nearest(name, LEAVES) == meant


@pytest.mark.parametrize("name", ["foo", "leaning", "optimizer", "momentum", "x", ""])
def test_none_is_better_than_a_wrong_one(name: str) -> None:
    assert nearest(name, LEAVES) is None


def test_what_others_call_a_setting_leads_to_a_setting() -> None:
    study = {field for group in ("study",) for field in vars(getattr(TuneConfig(), group))}
    known = {*LEAVES, *study, *vars(PredictSettings(())), *vars(EvaluateSettings(()))}
    assert set(names._OTHERS) <= known


def test_no_name_means_two_settings_or_is_one_itself() -> None:
    words = [other for others in names._OTHERS.values() for other in others.split()]
    assert len(words) == len(set(words))
    assert not {*LEAVES} & set(words)
