"""Trains every technique of the table on two processes, each with examples of its own, and writes what each rank ends with.

python tests/integration/two_processes.py FOLDER
"""

import hashlib
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from distill import data, fit
from tests.integration.test_compression import prepared, small, trainer
from tests.techniques import TECHNIQUES


def ended(made, row, folder, rank):
    """A checksum of the weights, of the masks and of the optimizer's moments."""
    module, callbacks = prepared(made, row)
    mine = made.examples["train"].select(range(rank, len(made.examples["train"]), 2))
    driver = trainer(made, callbacks, folder, devices=2, strategy="ddp")
    with fit.quiet():
        driver.fit(module, data.loader(mine, made.task, made.pad_id, 120, seed=0))
    moments = {f"{index}": value for index, state in enumerate(module.optimizers().state.values()) for value in state.values()}
    masks = {
        f"{index} {name}": mask for index, each in enumerate(driver.callbacks) if each in callbacks for name, mask in each.decided().items()
    }
    return [checksum(part) for part in (module.state_dict(), masks, moments)]


def checksum(tensors):
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode() + tensor.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


def main():
    folder, rank = Path(sys.argv[1]), int(os.environ.get("LOCAL_RANK", 0))
    made = small()
    ends = {row: ended(made, row, folder / row, rank) for row in TECHNIQUES}
    (folder / f"rank{rank}.json").write_text(json.dumps(ends))


if __name__ == "__main__":
    main()
