"""Runs the program of a runtime's export in the exported folder, and returns its outputs."""

import time
from typing import Any

from .runtime_models import as_texts, load_program


def run(request: dict[str, Any]) -> dict[str, Any]:
    """Outputs of all `batches`, seconds of each text of the first one, continuations of `prompts`.

    Only programs of language models generate, up to `max_new_tokens` per prompt.
    """
    program = load_program(request["folder"], request["program"])
    predict, generate = program["predict"], program.get("generate")
    batches = [as_texts(batch) for batch in request["batches"]]
    outputs = [_output(row_C, request["logits"]) for batch in batches for row_C in predict(batch)]
    seconds = []
    for text in batches[0]:
        start = time.perf_counter()
        predict([text])
        seconds.append(time.perf_counter() - start)
    generated = []
    if generate is not None:
        generated = [generate(text, request["max_new_tokens"]) for text in request["prompts"]]
    return {"outputs": outputs, "seconds": seconds, "generated": generated}


def _output(logits_C: Any, all_logits: bool) -> dict[str, Any]:
    """All logits, or the most likely class, its logit and the logits' logsumexp."""
    import numpy

    if all_logits:
        return {"logits": logits_C.tolist()}
    top = logits_C.max()
    return {
        "next": int(logits_C.argmax()),
        "top": float(top),
        "logsumexp": float(top + numpy.log(numpy.exp(logits_C - top).sum())),
    }
