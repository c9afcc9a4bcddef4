"""Completions that a server writes with the student's weights of a recent step.

They are stored in the run folder before they are used: a run that goes on from a checkpoint reads
those of the steps that it repeats, whatever the server would write now.
"""

import hashlib
import json
import logging
import math
import secrets
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill import models, store
from distill.errors import UserError
from distill.models import adapters
from distill.processes import ranks
from distill.recipe import config
from distill.served import SETTING, Client, CompletionServer, connect_writer
from distill.training import checkpoint_files
from distill.training.adapter import write_adapter

log = logging.getLogger(__name__)

FOLDER = "completions"
_FIRST_ATTEMPTS = 2  # requests before a server that must be there counts as unreachable
_REQUESTS = 16  # prompts that are sent at a time
_MAX_GAP = 0.25  # of the logits' largest minus mean, by which the server's choice may be less here
_PROBES = 4  # prompts whose next token is compared

Ids = list[int]


def check_server(loss: config.Loss, adapter: bool) -> None:
    """UserError if the server of `loss.completions_url` is not there, or cannot load the student.

    Args:
        loss: The recipe's section `loss`.
        adapter: Whether the student is trained by an adapter.
    """
    if loss.completions_url is not None:
        client = Client(loss.completions_url, SETTING, attempts=_FIRST_ATTEMPTS)
        connect_writer(client).check_loads(adapter)


@dataclass
class ServedWriter:
    """Completions by a server, which gets the student's weights every few on-policy steps.

    Args:
        server: Writes.
        student: Its weights are sent, and compared with the server's once.
        save: Writes the adapter, or the complete weights, into a folder.
        folder: Holds the completions, and the last two versions of the weights.
        checkpoints: Folder of the checkpoints; completions before the oldest are removed.
        settings: The recipe's section `loss`.
        steps: Optimizer steps of the training; with another number the student differs.
        process: In the names of the adapters, which are those of rank zero on all ranks.
    """

    server: CompletionServer
    student: PreTrainedModel
    save: Callable[[Path], None]
    folder: Path
    checkpoints: Path
    settings: config.Loss
    steps: int
    process: str
    version: int = field(default=-1, init=False)  # of the weights that the server holds

    def __call__(
        self,
        step: int,
        prompts: Sequence[Sequence[Ids]],
        sampling: models.Sampling,
        seeds: Sequence[Sequence[tuple[int, ...]]],
    ) -> list[list[Ids]]:
        """The completions of the prompts of each micro-batch of an on-policy step; a collective."""
        sampling = replace(sampling, classes=sampling.classes or models.num_logits(self.student))
        flat = [prompt for group in prompts for prompt in group]
        drawn = [
            int(np.random.default_rng(seed).integers(2**31)) for group in seeds for seed in group
        ]
        draws = [sampling.tokens, sampling.stops, sampling.temperature]
        request = json.dumps([flat, drawn, *draws, self.steps])
        key = hashlib.sha256(request.encode()).hexdigest()
        name = f"step-{step:08d}-rank-{ranks.rank()}-of-{ranks.world_size()}.json"
        written = _stored(self.folder / name, key)
        if not all(ranks.all_gather(written is not None)):
            self._send_weights(step, flat, sampling)
        if written is None:
            with ThreadPool(_REQUESTS) as pool:
                written = pool.starmap(
                    lambda prompt, seed: self.server.complete(prompt, sampling, seed, self._name),
                    zip(flat, drawn, strict=True),
                )
            content = json.dumps({"key": key, "ids": written}).encode()
            self.folder.mkdir(parents=True, exist_ok=True)
            store.write_file(self.folder / name, content)
        remaining = iter(written)
        return [[next(remaining) for _ in group] for group in prompts]

    def close(self) -> None:
        """Remove the adapter from the server, and all weights but those that a longer run needs."""
        if ranks.is_rank_zero() and self.version >= 0:
            if self._name is not None:
                self.server.unload(self._name)
            self._remove_weights(before=self.version)

    @property
    def _adapter(self) -> bool:
        return adapters.has_adapter(self.student)

    @property
    def _name(self) -> str | None:
        """The name of the adapter at the server; None for complete weights."""
        return f"distill-{self.process}-{self.version}" if self._adapter else None

    def _send_weights(self, step: int, prompts: list[Ids], sampling: models.Sampling) -> None:
        """Load the student into the server, if a new version is due; a collective."""
        earlier = math.floor(step * self.settings.on_policy)  # on-policy steps before this one
        version, since = divmod(earlier, self.settings.completions_every)
        before, first = self._name, self.version < 0
        if version == self.version:
            return
        self.version = version

        def send() -> None:
            folder = self.folder / f"weights-{version}"
            if since == 0 or not folder.is_dir():  # else they are those of an earlier step
                with store.write_entry(folder) as inside:
                    self.save(inside)
            self.server.load(folder, str(self._name or ""), self._adapter)
            if first:
                self._compare(prompts[:_PROBES], sampling)
            elif before is not None:
                self.server.unload(before)
            self._remove_weights(before=version - 1)
            self._remove_completions(step)

        ranks.run_on_rank_zero(send)

    @torch.no_grad()
    def _compare(self, prompts: list[Ids], sampling: models.Sampling) -> None:
        """UserError if the server's likeliest next tokens are unlikely to this student."""
        gaps, ranges = [], []
        likeliest = models.Sampling(1, sampling.stops, 0.0, sampling.classes)
        with models.eval_mode(self.student):
            for prompt in prompts:
                token = self.server.complete(prompt, likeliest, 0, self._name)[0]
                ids_1L = torch.tensor([prompt], device=self.student.device)
                logits_V = self.student(input_ids=ids_1L).logits[0, -1, : sampling.classes].float()
                gaps.append(float(logits_V.max() - logits_V[token]))
                ranges.append(float(logits_V.max() - logits_V.mean()))
        if sum(gaps) > _MAX_GAP * sum(ranges):
            raise UserError(
                f"{SETTING} is {self.server.client.url}, but the model there is not the student, "
                f"whose likeliest next tokens are {np.mean(gaps):.2g} nats likelier than those it "
                "writes: serve the model that student.model names"
            )

    def _remove_weights(self, before: int) -> None:
        """Remove earlier versions of the weights."""
        for folder in self.folder.glob("weights-*"):
            if int(folder.name.removeprefix("weights-")) < before:
                shutil.rmtree(folder, ignore_errors=True)

    def _remove_completions(self, step: int) -> None:
        """Remove the completions of steps before every checkpoint, and those after this step.

        A step whose completions are requested changes the student, and those that are stored for
        later steps were written by another one.
        """
        saved = checkpoint_files.newest_first(self.checkpoints)
        oldest = checkpoint_files.step_of(saved[-1]) if saved else 0
        for file in self.folder.glob("step-*.json"):
            if not oldest <= int(file.name.split("-")[1]) <= step:
                file.unlink(missing_ok=True)


def _stored(file: Path, key: str) -> list[Ids] | None:
    """The completions of the same prompts, if they were stored."""
    try:
        content = json.loads(file.read_text())
        return content["ids"] if content["key"] == key else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_by_server(
    settings: config.Loss,
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    base: str | None,
    folder: Path,
    steps: int,
) -> ServedWriter:
    """The student's completions by the server of `loss.completions_url`; a collective.

    Args:
        settings: the recipe's section `loss`.
        student: is trained here.
        tokenizer: the student's.
        base: `student.model`, to which an adapter belongs.
        folder: the run folder.
        steps: optimizer steps of the training.
    """

    def save(inside: Path) -> None:
        if adapters.has_adapter(student):
            write_adapter(student, base, inside)
        else:
            models.save(student, tokenizer, inside)

    server = connect_writer(Client(str(settings.completions_url), SETTING))
    process = ranks.broadcast(secrets.token_hex(4))
    return ServedWriter(
        server, student, save, folder / FOLDER, folder / "checkpoints", settings, steps, process
    )
