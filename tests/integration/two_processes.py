"""Trains every technique on two ranks and writes checksums of what each rank ends with.

python -m tests.integration.two_processes FOLDER
"""

import hashlib
import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from distill import data  # noqa: E402
from distill.processes import environment, exits, group, ranks, strategy  # noqa: E402
from distill.recipe import config  # noqa: E402
from distill.training import loop  # noqa: E402
from tests.integration.test_compression import PER_EPOCH, prepared, small, trainer  # noqa: E402
from tests.techniques import TECHNIQUES  # noqa: E402


def ended(made, row, folder, resume=None):
    """Checksums of the weights, of the masks and of the optimizer's moments."""
    module, callbacks = prepared(made, row)
    options = strategy.lightning_strategy(config.Trainer(accelerator="cpu"))
    driver = trainer(
        made,
        callbacks,
        folder,
        **{name: value for name, value in options.items() if name != "accelerator"},
    )
    # the second rank has no examples in the last batch of an epoch
    examples = made.examples["train"].select(range(361))
    batches = data.make_loader(
        examples,
        made.task,
        made.pad_id,
        data.Batching(120, seed=0, rank=ranks.rank(), world=ranks.world_size()),
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
    exits.exit_with_launcher()
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    settings = config.Trainer(accelerator="cpu", devices=2)
    if count := environment.processes_to_start(settings):
        from distill.processes.launch import launch

        log = folder / "train.log"
        sys.exit(launch("tests.integration.two_processes", sys.argv[1:], count, log))
    group.join_process_group(settings)
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
    group.leave_process_group()


if __name__ == "__main__":
    exits.run_and_exit(main)
