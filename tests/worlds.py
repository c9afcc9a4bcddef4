"""What many tests share: a small recipe on generated data, its examples and random models."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers.logger import Logger
from omegaconf import OmegaConf

from distill import data, models, student, training
from distill.prepare import Prepared, prepare_run
from distill.recipe import compose, config

TINY = {
    "name": "tiny",
    "task": {"_target_": "distill.tasks.SingleLabelClassification", "max_length": 24},
    "data": {"source": "distill.corpora.generated", "batch_size": 16},
    "tokenizer": {"vocab_size": 300},
    "teacher": {
        "config": {
            "model_type": "bert",
            "hidden_size": 16,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "intermediate_size": 32,
        },
        "dtype": "float32",
    },
    "student": {"layers": [0, 2]},
    "optimizer": {"lr": 2e-3},
    "trainer": {
        "max_steps": 6,
        "validations": 2,
        "precision": "32-true",
        "accelerator": "cpu",
        "progress": False,
    },
    "tracking": {"wandb": "disabled"},
    "evaluate": {"bootstrap": 20, "requests": 2, "batches": 2},
    "export": {"examples": 20},
}
LANGUAGE = {
    "task": {"_target_": "distill.tasks.CausalLanguageModelling", "max_length": 24},
    "data": {"label": None},
    "teacher": {
        "config": {
            "model_type": "gpt2",
            "n_embd": 16,
            "n_layer": 3,
            "n_head": 2,
            "n_positions": 32,
        },
        "outputs": "online",
        "dtype": "float32",
    },
}

LLAMA: dict[str, Any] = LANGUAGE | {  # with grouped keys
    "teacher": LANGUAGE["teacher"]
    | {
        "config": {
            "model_type": "llama",
            "hidden_size": 16,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 32,
            "max_position_embeddings": 32,
        }
    }
}


def tiny(**changes: Any) -> config.Run:
    """The recipe above with changes; None leaves a section out, a `model_type` replaces one."""
    replaced = {
        key
        for key, value in changes.items()
        if value is None
        or (isinstance(value, dict) and "model_type" in (value.get("config") or {}))
    }
    defaults = {key: value for key, value in TINY.items() if key not in replaced}
    changes = {key: value for key, value in changes.items() if value is not None}
    return compose.validate(OmegaConf.merge(OmegaConf.structured(config.Run), defaults, changes))


@dataclass(frozen=True, kw_only=True)
class World(Prepared):
    """The data of a recipe, with the recipe and random models of its teacher's config."""

    run: config.Run

    @property
    def prepared(self) -> Prepared:
        return Prepared(self.task, self.tokenizer, self.raw, self.examples)

    @property
    def pad_id(self) -> int:
        return self.tokenizer.pad_token_id

    def model(self, what: str = "teacher", seed: int = 0, **changes: Any) -> Any:
        """A random model of the teacher's config, with logits that depend on the text."""
        assert self.run.teacher is not None
        torch.manual_seed(seed)
        made = models.load(
            None, (self.run.teacher.config or {}) | changes, self.task, what, self.tokenizer
        )
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.mul_(2)
        return made

    def loader(self, split: str = "train", **options: Any) -> Any:
        batching = data.Batching(**({"batch_size": 16} | options))
        return data.make_loader(self.examples[split], self.task, self.pad_id, batching)


def world(**changes: Any) -> World:
    run = tiny(**changes)
    made = prepare_run(run)
    return World(**vars(made), run=run)


STILL = {  # no dropout: a resumed run draws other random numbers
    "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "distilbert": {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0},
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}


def callbacks_of(run: config.Run, made: Any) -> list[Any]:
    """The callbacks of a recipe, as `train` builds them for data that are prepared."""
    built = training.build_callbacks(run.callbacks, run.trainer, run.export)
    steps = student.count_steps(made, run.loss, run.trainer, run.data.batch_size)
    return training.bind_callbacks(
        built, made.tokenizer, made.raw["train"], list(run.data.text), steps
    )


def few(**changes: Any) -> World:
    """A world with four optimizer steps an epoch."""
    made = world(**changes)
    made.examples["train"] = made.examples["train"].select(range(64))
    return made


class Rows(Logger):
    """A logger that keeps what a Trainer logs, row by row."""

    name = version = None

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, Any]] = []

    def log_hyperparams(self, *_: Any, **__: Any) -> None: ...

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append({**metrics, "step": step})


def trainer(steps: int, *callbacks: Any, **options: Any) -> L.Trainer:
    """A silent Trainer with these callbacks alone; it saves checkpoints with a ModelCheckpoint."""
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,
    }
    silent = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    stores = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    return L.Trainer(
        max_steps=steps,
        callbacks=list(callbacks),
        enable_checkpointing=stores,
        **silent,
        **(settings | options),
    )


def folder_of(path: Path, made: World, **saved: Any) -> Path:
    """A run folder with these models in it."""
    for name, model in saved.items():
        models.save(model, made.tokenizer, path / name)
    compose.save_recipe(made.run, path / "recipe.yaml")
    return path
