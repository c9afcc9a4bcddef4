"""What a user of an exported model does, and nothing else: load it with plain transformers and answer raw texts.

    python -I proof.py question.json answer.json

Run in a fresh process in which the library that made the model cannot be imported. The answers go back to the exporter, which
compares them with those of the student that was trained.
"""

import json
import os
import sys
import time
from importlib import metadata
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any

TURN = 10  # texts that a form answers before it is another one's turn


class Blocked(MetaPathFinder):
    """Refuses to import a package, so that a model which needs it does not load."""

    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.split(".")[0] == self.package:
            raise ImportError(f"{name} is blocked: an exported model must load without it")


def load(question: dict[str, Any], dtype: str | None = None) -> tuple[Any, Any]:
    """Tokenizer and model, as stored or in another dtype; every tensor of the model must come from the file."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(question["folder"])
    if len(tokenizer) <= len(
        tokenizer.all_special_ids
    ):  # what transformers makes of a folder without one
        raise SystemExit("it holds no tokenizer")
    auto = getattr(transformers, question["auto_class"])
    options = {"attn_implementation": question["attention"]} if question["attention"] else {}
    options |= {"dtype": dtype} if dtype else {}
    options["trust_remote_code"] = question[
        "coded"
    ]  # the code beside the weights, without which they do not load
    model, found = auto.from_pretrained(question["folder"], output_loading_info=True, **options)
    amiss = {what: sorted(map(str, names)) for what, names in found.items() if names}
    if amiss:
        raise SystemExit(f"the file does not fit the model: {amiss}")
    return tokenizer, model.eval().to(question["device"])


def classify(
    question: dict[str, Any], texts: list[list[str]], tokenizer: Any, model: Any
) -> list[dict[str, Any]]:
    """The logit of each label name, through the pipeline that serves the model; pairs of texts are dictionaries."""
    from transformers import pipeline

    serve = pipeline(question["pipeline"], model=model, tokenizer=tokenizer, device=model.device)
    answers = []
    for cells in texts:
        given = cells[0] if len(cells) == 1 else {"text": cells[0], "text_pair": cells[1]}
        start = time.perf_counter()
        scores = serve(given, top_k=None, function_to_apply="none", truncation=True)
        answers.append(
            {
                "logits": {score["label"]: score["score"] for score in scores},
                "seconds": time.perf_counter() - start,
            }
        )
    return answers


def predict_next(
    question: dict[str, Any], texts: list[list[str]], tokenizer: Any, model: Any
) -> list[dict[str, Any]]:
    """Each text's tokens, the most likely token after each of them, its logit, and the logarithm of the sum of all exponentials."""
    import torch

    answers = []
    for (text,) in texts:
        start = time.perf_counter()
        ids = [
            *question["start"],
            *tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"],
        ][: question["max_length"]]
        with torch.inference_mode():
            logits_LV = model(input_ids=torch.tensor([ids], device=model.device)).logits[0].float()
        top = logits_LV.max(-1)
        answer = {"ids": ids, "next": top.indices.tolist(), "top": top.values.tolist()}
        answers.append(
            answer
            | {
                "logsumexp": logits_LV.logsumexp(-1).tolist(),
                "seconds": time.perf_counter() - start,
            }
        )
    return answers


def told(question: dict[str, Any]) -> dict[str, Any]:
    """What the model answers in each form; they take turns, for their times to be compared."""
    forms = {"stored": load(question)} | {
        dtype: load(question, dtype) for dtype in question["dtypes"]
    }
    answer = {"text-classification": classify, "text-generation": predict_next}[
        question["pipeline"]
    ]
    answers: dict[str, list[dict[str, Any]]] = {form: [] for form in forms}
    for first in range(0, len(question["texts"]), TURN):
        for form, loaded in forms.items():
            answers[form] += answer(question, question["texts"][first : first + TURN], *loaded)
    return {
        "answers": answers,
        "parameters": sum(parameter.numel() for parameter in forms["stored"][1].parameters()),
    }


def main() -> None:
    """Answer the texts of one question."""
    asked, answered = sys.argv[1:]
    question = json.loads(Path(asked).read_text())
    sys.path += [entry for entry in question["packages"] if entry not in sys.path]
    sys.meta_path.insert(0, Blocked(question["blocked"]))
    sys.path.insert(
        0, str(Path(asked).parent / "modules")
    )  # where a model's own code is put: not shared with other processes
    os.environ["HF_MODULES_CACHE"] = sys.path[0]
    import torch
    import transformers

    torch.set_num_threads(question["threads"])
    versions = {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    versions |= {name: metadata.version(name) for name in question["libraries"]}
    Path(answered).write_text(json.dumps(told(question) | {"versions": versions}))


if __name__ == "__main__":
    main()
