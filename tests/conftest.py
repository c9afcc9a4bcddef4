"""Every test: no network, one thread, a store of its own."""

import os
import tempfile

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "WANDB_MODE": "disabled",
    "OMP_NUM_THREADS": "1",
    "MKL_CBWR": "AUTO,STRICT",  # as the commands set it
    "TOKENIZERS_PARALLELISM": "false",
    "TORCHAO_FORCE_SKIP_LOADING_SO_FILES": "1",
    "HF_MODULES_CACHE": tempfile.mkdtemp(),  # code that travels with exports
    "DISTILL_TRUST": "tests",  # recipes name classes of tests, also from other folders
}

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def _module_store(tmp_path_factory):
    """Use a temporary store instead of the user's; the tests of a module share it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DISTILL_CACHE", str(tmp_path_factory.mktemp("store")))
        yield
