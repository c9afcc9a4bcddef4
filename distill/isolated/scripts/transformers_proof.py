"""Loads an exported folder with plain transformers and returns its outputs for raw texts.

The exporter compares them with those of the trained student.
"""

import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

# Consecutive texts of one dtype; the dtypes take turns so that their times can be compared.
TURN = 10

TURNS_TO_COMPARE = 3  # after which a dtype is left out that is slower
SLOWER = 1.5  # times the median of the stored dtype

# Logits of a text in the model's dtype that are computed at once, in bytes of float32.
CHUNK_BYTES = 1 << 25

Output = dict[str, Any]


def run(request: dict[str, Any]) -> dict[str, Any]:
    """Outputs of the model as stored and in other `dtypes`; `predict` names one of PREDICTORS."""
    import torch

    torch.set_num_threads(request["threads"])
    loaded = {dtype or "stored": load(request, dtype) for dtype in (None, *request["dtypes"])}
    outputs: dict[str, list[Output]] = {name: [] for name in loaded}
    predict = PREDICTORS[request["predict"]]
    for first in range(0, len(request["texts"]), TURN):
        texts = request["texts"][first : first + TURN]
        for name in list(outputs):
            outputs[name] += predict(request, texts, *loaded[name])
        if first + TURN == TURNS_TO_COMPARE * TURN:
            outputs = without_slower(outputs)
    parameters = sum(tensor.numel() for tensor in loaded["stored"][1].parameters())
    return {"outputs": outputs, "parameters": parameters}


def without_slower(outputs: dict[str, list[Output]]) -> dict[str, list[Output]]:
    """The outputs without those of dtypes that take clearly longer than the stored one."""
    seconds = {name: median(one["seconds"] for one in parts) for name, parts in outputs.items()}
    return {
        name: parts
        for name, parts in outputs.items()
        if seconds[name] <= SLOWER * seconds["stored"]
    }


def load(request: dict[str, Any], dtype: str | None) -> tuple[Any, Any]:
    """Tokenizer and model; SystemExit if one is missing, or the weights do not match."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(request["folder"])
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # transformers would create an empty one
        raise SystemExit("it holds no tokenizer")
    options = {"attn_implementation": request["attention"]} if request["attention"] else {}
    options |= {"dtype": dtype} if dtype else {}
    model, loading_info = getattr(transformers, request["auto_class"]).from_pretrained(
        request["folder"],
        output_loading_info=True,
        trust_remote_code=request["trust_remote_code"],
        **options,
    )
    mismatches = {kind: sorted(map(str, keys)) for kind, keys in loading_info.items() if keys}
    if mismatches:
        raise SystemExit(f"the file does not fit the model: {mismatches}")
    return tokenizer, model.eval().to(request["device"])


def classify(
    request: dict[str, Any], texts: list[list[str]], tokenizer: Any, model: Any
) -> Iterator[Output]:
    """The logit of each label name, from the pipeline of transformers that serves the model."""
    from transformers import pipeline

    serve = pipeline(request["pipeline"], model=model, tokenizer=tokenizer, device=model.device)
    for cells in texts:
        inputs = cells[0] if len(cells) == 1 else {"text": cells[0], "text_pair": cells[1]}
        start = time.perf_counter()
        scores = serve(inputs, top_k=None, function_to_apply="none", truncation=True)
        seconds = time.perf_counter() - start
        yield {"logits": {score["label"]: score["score"] for score in scores}, "seconds": seconds}


def predict_next(
    request: dict[str, Any], texts: list[dict[str, Any]], tokenizer: Any, model: Any
) -> Iterator[Output]:
    """Each text's tokens and, after each, the likeliest next one, its logit and the logsumexp.

    The tokens of `text` follow those of `start`, up to `max_length` in all.
    """
    import torch

    for text in texts:
        start = time.perf_counter()
        tokens = tokenizer(text["text"], add_special_tokens=False, verbose=False)["input_ids"]
        ids = [*text["start"], *tokens][: text["max_length"]]
        with torch.inference_mode():
            chunks = logit_chunks(model, torch.tensor([ids], device=model.device))
            parts = [(*logits_nV.max(-1), logits_nV.logsumexp(-1)) for logits_nV in chunks]
        top, best, logsumexp = (torch.cat(column).tolist() for column in zip(*parts, strict=True))
        yield {
            "ids": ids,
            "next": best,
            "top": top,
            "logsumexp": logsumexp,
            "seconds": time.perf_counter() - start,
        }


def logit_chunks(model: Any, ids_1L: Any) -> Iterator[Any]:
    """The logits of a text in float32, all at once or, for a large vocabulary, some rows at a time.

    Rows are computed from the inputs of the head, if the last one shows that the model does not
    change what the head returns.
    """
    import torch

    head = model.get_output_embeddings()
    width = getattr(head, "out_features", 0)
    rows = max(1, CHUNK_BYTES // (4 * max(width, 1)))
    if 0 < rows < ids_1L.shape[1]:
        states: list[Any] = []

        def keep_last(_: Any, inputs: Any) -> Any:
            states.append(inputs[0])
            return (inputs[0][:, -1:],)

        hook = head.register_forward_pre_hook(keep_last)
        last = model(input_ids=ids_1L).logits
        hook.remove()
        if last.any() and torch.equal(head(states[0][:, -1:]), last):
            for states_nD in states[0][0].split(rows):
                yield head(states_nD).float()
            return
    logits_LV = model(input_ids=ids_1L).logits[0]
    for logits_nV in logits_LV.split(rows):
        yield logits_nV.float()


def forward(
    request: dict[str, Any], texts: list[dict[str, Any]], tokenizer: Any, model: Any
) -> Iterator[Output]:
    """The model's logits for encoded `inputs`, (1, ...); the tokens of `cells` must be `ids`."""
    import torch

    for text in texts:
        start = time.perf_counter()
        ids = tokenizer(*text["cells"])["input_ids"] if "cells" in text else None
        inputs = {
            name: torch.tensor(values, device=model.device)
            for name, values in text["inputs"].items()
        }
        with torch.inference_mode():
            logits = model(**inputs).logits.float()
        if ids != text.get("ids"):
            raise SystemExit(
                f"its tokenizer makes {ids} of a text, and the student's {text['ids']}"
            )
        yield {"logits": logits.tolist(), "seconds": time.perf_counter() - start}


PREDICTORS: dict[str, Callable[..., Iterator[Output]]] = {
    "classify": classify,
    "predict_next": predict_next,
    "forward": forward,
}
