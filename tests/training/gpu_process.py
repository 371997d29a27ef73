"""One of several processes that train on pretended GPUs, gloo in NCCL's place: settings and losses as JSON."""

import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist

from matchai import TrainConfig, run
from matchai.settings.config import PRESETS
from matchai.system.console import Display
from matchai.training import loop
from tests.pretended_gpu import Waits, pretended_gpu


def main() -> None:
    """Trains by the settings of the first word; prints losses, and what steps would have waited for."""
    settings: dict[str, Any] = json.loads(sys.argv[1])
    paths = {name: Path(settings.pop(name)) for name in ("data", "cache", "output")}
    config = TrainConfig().updated(**{**PRESETS["study"], **settings, **paths})
    init, train_step, waited = dist.init_process_group, loop.train_step, Waits()
    with pretended_gpu(count=2) as waits:

        def step(*args: Any, **kwargs: Any) -> Any:
            before = Waits(waits)
            outcome = train_step(*args, **kwargs)
            waited.update(Waits(waits) - before)
            return outcome

        with (
            mock.patch.object(dist, "init_process_group", lambda backend=None, **more: init("gloo", **more)),
            mock.patch.object(loop, "train_step", step),
        ):
            history = run(config, display=Display(is_main_process=False)).history
    print(json.dumps({"losses": [[row["train_loss"], row["val_loss"]] for row in history], "waits": waited}))


if __name__ == "__main__":
    main()
