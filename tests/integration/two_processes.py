"""Trains every technique of the table on two processes that share each batch, and writes what each rank ends with.

python -m tests.integration.two_processes FOLDER
"""

import hashlib
import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from distill import data
from distill.processes import launch, ranks
from distill.recipe import config
from distill.training import loop  # noqa: E402
from tests.integration.test_compression import PER_EPOCH, prepared, small, trainer  # noqa: E402
from tests.techniques import TECHNIQUES  # noqa: E402


def ended(made, row, folder, resume=None):
    """A checksum of the weights, of the masks and of the optimizer's moments."""
    module, callbacks = prepared(made, row)
    strategy = ranks.lightning_strategy(config.Trainer(accelerator="cpu"))
    driver = trainer(
        made,
        callbacks,
        folder,
        **{name: value for name, value in strategy.items() if name != "accelerator"},
    )
    mine = made.examples["train"].select(
        range(361)
    )  # of the last batch of each epoch, the second rank has nothing
    batches = data.make_loader(
        mine, made.task, made.pad_id, 120, seed=0, rank=ranks.rank(), world=ranks.world_size()
    )
    with loop.silence_lightning():
        driver.fit(module, batches, ckpt_path=resume)
    moments = {
        f"{index}": value
        for index, state in enumerate(module.optimizers().state.values())
        for value in state.values()
    }
    masks = {
        f"{index} {name}": mask
        for index, each in enumerate(driver.callbacks)
        if each in callbacks
        for name, mask in each.rank_synced_state().items()
    }
    return [checksum(part) for part in (module.state_dict(), masks, moments)]


def checksum(tensors):
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode() + tensor.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


def main():
    folder = Path(sys.argv[1])
    launch.exit_with_parent()
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    settings = config.Trainer(accelerator="cpu", devices=2)
    if count := launch.processes_to_start(settings):
        sys.exit(launch.launch("tests.integration.two_processes", folder, count))
    ranks.join_process_group(settings)
    with ranks.rank_zero_first():
        made = small()
    ends = {row: ended(made, row, folder / row) for row in TECHNIQUES}
    ends |= {
        f"{row}, resumed": ended(
            made, row, folder / "resumed" / row, folder / row / f"step={PER_EPOCH}.ckpt"
        )
        for row in TECHNIQUES
    }
    (folder / f"rank{ranks.rank()}.json").write_text(json.dumps(ends))
    ranks.leave_process_group()


if __name__ == "__main__":
    main()
