"""Each private attribute of a library is where `distill.internals` expects it."""

import ast
import signal
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import lightning as L
import pytest
import torch
import transformers
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import BertConfig, GenerationConfig, GPT2Config, GPT2LMHeadModel

import distill
from distill import internals
from distill.training.progress import silence_lightning
from tests.worlds import trainer, world

PACKAGE = Path(distill.__file__).parent
STANDALONE = {"isolated", "remote_code", "programs"}  # folders of scripts that run without distill


def private(name):
    return name.startswith("_") and not name.startswith("__")


def trees():
    for file in PACKAGE.rglob("*.py"):
        if file.name != "internals.py" and not STANDALONE & set(file.parts):
            yield file, ast.parse(file.read_text())


def test_no_other_module_uses_private_attributes():
    nodes = [(file, node) for file, tree in trees() for node in ast.walk(tree)]
    attributes = [(file, node) for file, node in nodes if isinstance(node, ast.Attribute)]
    known = {node.attr for _, node in attributes if isinstance(node.ctx, ast.Store)}
    known |= {node.name for _, node in nodes if isinstance(node, ast.FunctionDef)}
    known |= {"_replace", "_asdict", "_fields", "_exit"}  # public: of named tuples and of os
    foreign = [
        f"{file.relative_to(PACKAGE)}:{node.lineno} {node.attr}"
        for file, node in attributes
        if private(node.attr) and node.attr not in known
    ]
    foreign += [
        f"{file.relative_to(PACKAGE)}:{node.lineno} {node.module}"
        for file, node in nodes
        if isinstance(node, ast.ImportFrom) and any(map(private, (node.module or "").split(".")))
    ]
    assert foreign == []


def test_exit_functions_run():
    code = (
        "import atexit, os; from distill.internals import run_exit_functions\n"
        "atexit.register(print, 'ended', flush=True); run_exit_functions(); os._exit(0)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout == "ended\n"


@pytest.mark.skipif(
    not Path("/proc/cpuinfo").exists(), reason="Linux on x86 lists its instructions"
)
def test_bf16_is_what_the_cpu_lists():
    assert internals.cpu_supports_bf16() == ("avx512_bf16" in Path("/proc/cpuinfo").read_text())


def test_a_parameter_is_read_without_computing_it():
    layer = nn.Linear(2, 2, bias=False)
    stored = layer.weight
    nn.utils.parametrizations.weight_norm(layer)
    assert internals.stored_parameter(layer, "weight") is None
    assert internals.stored_parameter(layer, "bias") is None
    assert internals.stored_parameter(nn.Linear(2, 2), "weight") is not stored


def test_the_attention_of_a_loaded_model_is_known():
    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    model = transformers.AutoModel.from_config(config, attn_implementation="eager")
    assert internals.attention_implementation(model.config) == "eager"


def test_an_auto_class_names_what_it_builds():
    name = "AutoModelForSequenceClassification"
    built = internals.model_class(name, BertConfig())
    assert built is transformers.BertForSequenceClassification
    assert internals.model_class(name, transformers.CLIPConfig()) is None


# ---- under the Trainer


@pytest.fixture(autouse=True)
def _silent():
    with silence_lightning():
        yield


class Linear(L.LightningModule):
    """One weight, three batches per epoch."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1, bias=False)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.ones(3, 1))

    val_dataloader = train_dataloader

    def training_step(self, batch, index):
        return self.layer(batch).sum()

    def validation_step(self, batch, index): ...

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1.0)


class Each(L.Callback):
    """Calls a function of the trainer when each batch starts, and keeps the results."""

    def __init__(self, function):
        self.function, self.seen = function, []

    def on_train_batch_start(self, trainer, *_):
        self.seen.append(self.function(trainer))


def test_the_trainer_leaves_signals_alone():
    for disabled in (False, True):
        each = Each(lambda _: signal.getsignal(signal.SIGTERM))
        fit = trainer(1, each)
        if disabled:
            internals.disable_signal_handlers(fit)
        fit.fit(Linear())
        assert (each.seen == [signal.getsignal(signal.SIGTERM)]) == disabled


def test_validation_runs_follow_the_batches_that_are_named():
    class Validations(L.Callback):
        def __init__(self):
            self.steps = []

        def on_train_batch_end(self, trainer, *_):
            internals.validate_after_batch(trainer, trainer.global_step in (2, 5))

        def on_validation_end(self, trainer, *_):
            self.steps.append(trainer.global_step)

    validations = Validations()
    trainer(6, validations, check_val_every_n_epoch=None, val_check_interval=1).fit(Linear())
    assert validations.steps == [2, 5]


def test_a_trainer_of_epochs_ends_after_the_steps_that_are_set():
    fit = trainer(-1, max_epochs=4)
    internals.limit_steps(fit, 5)
    fit.fit(Linear())
    assert fit.global_step == fit.max_steps == 5


def test_batches_are_counted_over_training_and_over_the_epoch():
    each = Each(lambda fit: (internals.batches_started(fit), internals.batches_of_epoch(fit)))
    trainer(5, each).fit(Linear())
    assert each.seen == [(0, 0), (1, 1), (2, 2), (3, 0), (4, 1)]


def test_training_resumes_at_the_batch_at_whose_start_it_was_saved(tmp_path):
    made, file = world(), tmp_path / "third.ckpt"

    class Student(Linear):
        def training_step(self, batch, index):
            return self.layer(torch.ones(1, 1)).sum()

    class Saves(L.Callback):
        def on_train_batch_start(self, trainer, *_):
            if trainer.global_step == 2:
                trainer.save_checkpoint(file)

        def on_save_checkpoint(self, trainer, module, checkpoint):
            internals.rewind_one_batch(checkpoint["loops"]["fit_loop"])

    def loops(fit):
        state = deepcopy(fit.fit_loop.state_dict())
        keys = ("epoch_loop.state_dict", "epoch_loop.batch_progress", "state_dict")
        return [internals.batches_started(fit), *(state[key] for key in keys)]

    steps = {"check_val_every_n_epoch": None, "val_check_interval": 1}
    first, second = Each(loops), Each(loops)
    trainer(4, first, Saves(), **steps).fit(Student(), made.loader(seed=0))
    trainer(4, second, **steps).fit(Student(), made.loader(seed=0), ckpt_path=file)
    assert second.seen == first.seen[2:]


def test_replaced_parameters_are_in_ddp_s_buckets():
    class Replaces(L.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            module.layer = nn.Linear(1, 1, bias=False)
            internals.rewrap_ddp(trainer.strategy, module)
            (parameter,) = trainer.strategy.model.parameters()
            assert isinstance(trainer.strategy.model, DistributedDataParallel)
            assert parameter is module.layer.weight
            assert trainer.strategy.model.find_unused_parameters
            assert not any(getattr(trainer.strategy.model, name) for name in constant)

    constant = internals.constant_buffers()
    strategy = L.pytorch.strategies.DDPStrategy(find_unused_parameters=True, **constant)
    try:
        trainer(2, Replaces(), strategy=strategy).fit(Linear())
    finally:
        torch.distributed.destroy_process_group()


def test_ddp_leaves_tensors_out():
    class Module(Linear):
        def configure_model(self):
            self.frozen = nn.Linear(1, 1, bias=False).requires_grad_(False)
            internals.leave_out_of_ddp(self, ["frozen.weight"])

    class Watch(L.Callback):
        def on_train_start(self, trainer, module):
            ddp = trainer.strategy.model
            assert ddp.parameters_to_ignore == {"frozen.weight"}

    strategy = L.pytorch.strategies.DDPStrategy(**internals.constant_buffers())
    try:
        trainer(1, Watch(), strategy=strategy).fit(Module())
    finally:
        torch.distributed.destroy_process_group()


def test_a_wrapper_consists_of_other_tensors():
    from torchao.optim.subclass_8bit import OptimState8bit

    wrapper = OptimState8bit.zeros((512,))
    assert internals.is_wrapper(wrapper)
    assert not internals.is_wrapper(torch.zeros(1))
    names, _ = wrapper.__tensor_flatten__()
    assert all(isinstance(getattr(wrapper, name), torch.Tensor) for name in names)


def test_a_static_cache_is_as_long_as_its_texts_once_the_length_is_forgotten():
    config = GPT2Config(
        vocab_size=20, n_embd=8, n_layer=1, n_head=1, bos_token_id=None, eos_token_id=None
    )
    model = GPT2LMHeadModel(config).eval()

    def cache_length(tokens):
        settings = GenerationConfig(
            max_new_tokens=2, cache_implementation="static", return_dict_in_generate=True,
            disable_compile=True, pad_token_id=0,
        )  # fmt: skip
        output = model.generate(torch.ones(1, tokens, dtype=torch.long), generation_config=settings)
        cache = output.get("cache") or output.get("past_key_values")  # its name up to 5.23
        return cache.layers[0].max_cache_len

    short, long = cache_length(4), cache_length(9)
    assert short < long == cache_length(4)
    internals.forget_cache_length(model)
    assert cache_length(4) == short
