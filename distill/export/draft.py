"""Writes an export once, under a hidden name, where it is measured and proven, then renames it."""

import logging
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from distill import evaluate, store
from distill.errors import RunFailed, UserError
from distill.recipe import capabilities, config

if TYPE_CHECKING:
    from datasets import Dataset

    from distill.export.proof_record import Proof
    from distill.packing import ExportSpec

log = logging.getLogger("distill")

FINAL = "export"


@dataclass(frozen=True)
class Draft:
    """An export that is written, but not proven.

    Args:
        folder: the hidden folder of the export.
        student: the folder of the student that it must agree with.
        settings: the recipe's section `export`.
        error: why it could not be written; None if it was.
    """

    folder: Path
    student: Path
    settings: config.Export
    error: UserError | RunFailed | None = None

    @property
    def measured(self) -> Path | None:
        """The folder to measure as the student; None to measure the trained student."""
        from distill import packing

        written = self.error is None and packing.is_measured(self.settings)
        return self.folder if written else None


@contextmanager
def write_draft(spec: "ExportSpec", folder: Path) -> Iterator[Draft | None]:
    """Write the export of a run folder's student under a hidden name.

    If it cannot be written, the draft has an error, which :func:`prove_and_publish` raises, so that
    the trained student can still be measured. The draft is removed at the end of the block.

    Args:
        spec: what the export needs.
        folder: the run folder.

    Yields:
        The draft; None if the recipe has no export.
    """
    if spec.settings.format is None:
        yield None
        return
    from distill import packing

    student, error = folder / "student", None
    with _draft_folder(folder / FINAL) as draft, TemporaryDirectory() as temporary:
        try:
            student = packing.final_student(spec, student, Path(temporary))
            packing.write_format(spec, student, draft)
        except (UserError, RunFailed, OSError) as failure:
            error = _as_error(failure, folder)
            packing.warn_unwritten(error)
        yield Draft(draft, student, spec.settings, error)


def _as_error(failure: UserError | OSError, folder: Path) -> UserError:
    if not isinstance(failure, OSError):
        return failure
    return RunFailed(
        f"{folder / FINAL} cannot be written ({failure.strerror or failure}), but the export "
        f"needs a place there: make room, then run distill export run={folder}"
    )


def prove_and_publish(
    draft: Draft,
    run: config.Run,
    spec: "ExportSpec",
    texts: "Dataset",
    folder: Path,
    metrics: evaluate.Metrics | None = None,
) -> Path:
    """Prove a draft, write its model card and rename it to its final name.

    Args:
        draft: result of :func:`write_draft`.
        run: the recipe, for the model card.
        spec: what the export needs.
        texts: the raw test split.
        folder: the run folder.
        metrics: metrics of the run, for the model card.

    Returns:
        The folder of the export; an earlier one is replaced.

    Raises:
        RunFailed: if the export is not loadable, equal and smaller; an earlier one is kept.
        UserError: if the draft could not be written.
    """
    if draft.error is not None:
        raise draft.error
    from distill.export.card import card

    with evaluate.status("proving the export", run.trainer.progress):
        proof = _prove(draft, run, spec, texts, folder)
    proof.write(draft.folder)
    (draft.folder / "README.md").write_text(card(run, spec.task, proof, metrics))
    publish(draft.folder, folder / FINAL)
    _log(folder / FINAL, proof)
    return folder / FINAL


def export(
    run: config.Run,
    spec: "ExportSpec",
    texts: "Dataset",
    folder: Path,
    metrics: evaluate.Metrics | None = None,
) -> Path | None:
    """Write, prove and publish the export of a run folder's student; see :func:`prove_and_publish`.

    Returns:
        The folder of the export; None if the recipe has none.
    """
    with write_draft(spec, folder) as draft:
        if draft is None:
            return None
        return prove_and_publish(draft, run, spec, texts, folder, metrics)


def _prove(
    draft: Draft, run: config.Run, spec: "ExportSpec", texts: "Dataset", folder: Path
) -> "Proof":
    from distill import models
    from distill.evaluate.inputs import evenly_spaced
    from distill.export import verify_folder, verify_program
    from distill.export.proof_inputs import ProofInputs

    teacher = evaluate.find_models(folder, run.local_teacher).get("teacher")
    inputs = ProofInputs(
        spec=spec,
        texts=texts.select(evenly_spaced(len(texts), spec.settings.examples)),
        trained=folder / "student",
        teacher=models.local_files(teacher, "teacher.model") if teacher else None,
        evaluate=run.evaluate,
        device=models.resolve_device(run.trainer),
        seed=run.seed,
    )
    if spec.settings.format in capabilities.RUNTIMES:
        return verify_program.prove(inputs, draft.folder)
    return verify_folder.prove(inputs, draft.folder, draft.student)


def _log(final: Path, proof: "Proof") -> None:
    log.info("export: %s, %.2f MB, proven on %d texts", final, proof.bytes / 1e6, proof.texts)
    if proof.faster is not None:
        log.info(
            "it is fastest here in %s: %.1f ms per text instead of %.1f",
            proof.faster.dtype,
            proof.faster.latency_p50_ms,
            proof.latency_p50_ms,
        )


@contextmanager
def _draft_folder(final: Path) -> Iterator[Path]:
    """A hidden folder beside the final one, which is removed at the end."""
    draft = final.with_name(f".{final.name}-{secrets.token_hex(4)}")
    draft.mkdir()
    try:
        yield draft
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def publish(draft: Path, final: Path) -> None:
    """Flush a draft to disk and rename it; on failure an earlier export is restored."""
    store.fsync_tree(draft)
    earlier = draft.with_name(f"{draft.name}-old")
    if final.exists():
        os.replace(final, earlier)
    try:
        os.replace(draft, final)
    except BaseException:
        if earlier.exists():
            os.replace(earlier, final)
        raise
    store.fsync(final.parent)
    shutil.rmtree(earlier, ignore_errors=True)
