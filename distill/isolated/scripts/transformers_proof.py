"""Loads an exported folder with plain transformers and returns its outputs for raw texts.

The exporter compares them with those of the trained student.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any

# Consecutive texts of one dtype; the dtypes take turns so that their times can be compared.
TURN = 10

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
        for name, (tokenizer, model) in loaded.items():
            outputs[name] += predict(request, texts, tokenizer, model)
    parameters = sum(tensor.numel() for tensor in loaded["stored"][1].parameters())
    return {"outputs": outputs, "parameters": parameters}


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
            logits_LV = model(input_ids=torch.tensor([ids], device=model.device)).logits[0].float()
        top = logits_LV.max(-1)
        yield {
            "ids": ids,
            "next": top.indices.tolist(),
            "top": top.values.tolist(),
            "logsumexp": logits_LV.logsumexp(-1).tolist(),
            "seconds": time.perf_counter() - start,
        }


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
