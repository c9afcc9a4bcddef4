"""Texts in, logits out, from each form of a student beside its teacher: how long it takes, what it takes, and what it says.

    python -I serve.py question.json answer.json

is the measuring process; `question.json` is what `runtimes.py` writes. A runtime's own program answers for it, in its folder.
"""

import json
import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Answer = Callable[[list[Any]], Any]  # texts, or pairs of them -> a row of logits for each, (B, C)
COST = runpy.run_path(str(Path(__file__).with_name("cost.py")))


def load(served: dict[str, Any]) -> Answer:
    """What answers texts: the program of a runtime's folder, or a model of transformers in that form."""
    if served["program"] is None:
        return of_transformers(served)
    os.chdir(served["folder"])
    names: dict[str, Any] = {"__name__": "program"}
    exec(compile(served["program"], "program", "exec"), names)
    return names["answer"]


def of_transformers(served: dict[str, Any]) -> Answer:
    """The model in its folder, read by the tokenizer that the runtimes' programs have; `torch_compile_bf16` says how."""
    import tokenizers
    import torch
    import transformers

    tokenizer = tokenizers.Tokenizer.from_file(served["tokenizer"])
    auto, how = getattr(transformers, served["auto_class"]), served["form"].split("_")
    dtype = torch.bfloat16 if "bf16" in how else torch.float32
    options = {"dtype": dtype, "attn_implementation": "eager", "trust_remote_code": served["coded"]}
    model = auto.from_pretrained(served["folder"], **options).eval()
    if "int8" in how:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        quantize_(model, Int8DynamicActivationInt8WeightConfig())
    called = compiled(model) if "compile" in how else model
    known = COST["inspect"].signature(model.forward).parameters
    constant = {"use_cache": False} if "use_cache" in known else {}

    def answer(texts: list[Any]) -> Any:
        rows = tokenizer.encode_batch(texts)
        given = {
            "input_ids": [row.ids for row in rows],
            "attention_mask": [row.attention_mask for row in rows],
        }
        if isinstance(texts[0], tuple) and "token_type_ids" in known:
            given["token_type_ids"] = [row.type_ids for row in rows]
        with torch.inference_mode():
            logits = called(
                **{name: torch.tensor(values) for name, values in given.items()}, **constant
            ).logits.float()
        last = [sum(row.attention_mask) - 1 for row in rows]
        return (logits if logits.dim() == 2 else logits[range(len(rows)), last]).numpy()

    return answer


def compiled(model: Any) -> Any:
    """For any batch and length, with the weights as constants."""
    import torch
    from torch._dynamo import config as tracing
    from torch._inductor import config as lowering

    tracing.recompile_limit = 64  # of all models together, which share their code
    lowering.freezing = True
    return torch.compile(model, dynamic=True)


class Served:
    """An answer as the clock of cost.py calls it."""

    def __init__(self, answer: Answer) -> None:
        import torch

        self.answer, self.device = answer, torch.device("cpu")

    def forward(self, texts: list[Any]) -> Any:
        return self.answer(texts)

    __call__ = forward


def speed(question: dict[str, Any]) -> dict[str, Any]:
    """Latency of single requests, then throughput of batches; the forms take turns."""
    forms = {name: Served(load(served)) for name, served in question["served"].items()}
    seconds = {}
    for what in ("requests", "batches"):
        calls = [{"texts": texts_of(texts)} for texts in question[what]]
        seconds[what] = COST["interleaved"](
            forms, dict.fromkeys(forms, calls), COST["WARM_UP"][what], COST["TURN"][what]
        )
    return {
        "costs": {name: costs(seconds, name, question["batches"]) for name in forms},
        "machine": COST["machine"](question),
    }


def costs(
    seconds: dict[str, dict[str, list[float]]], name: str, batches: list[Any]
) -> dict[str, float]:
    """Percentiles of the requests, in milliseconds, and the median throughput of the batches."""
    from statistics import median

    rates = [
        len(texts) / spent for texts, spent in zip(batches, seconds["batches"][name], strict=True)
    ]
    return COST["_latency"](seconds["requests"][name]) | {"examples_per_s": median(rates)}


def alone(question: dict[str, Any]) -> dict[str, Any]:
    """What one form says to all texts, in batches of one size, and the most memory that its process had."""
    ((_, served),) = question["served"].items()
    before = COST["peak_memory"]()
    answer = load(served)
    loaded = COST["peak_memory"]()
    rows = [row_C for texts in question["batches"] for row_C in answer(texts_of(texts))]
    said = [row_C.tolist() if question["every"] else int(row_C.argmax()) for row_C in rows]
    memory = {
        "memory_before_bytes": before,
        "memory_loaded_bytes": loaded,
        "memory_peak_bytes": COST["peak_memory"](),
    }
    return {"said": said, "costs": memory}


def texts_of(texts: list[list[str]]) -> list[Any]:
    """JSON has no tuples, which pairs are to the tokenizer."""
    return [cells[0] if len(cells) == 1 else tuple(cells) for cells in texts]


def main() -> None:
    """Answer one question."""
    asked, answered = (Path(argument).resolve() for argument in sys.argv[1:])
    question = json.loads(asked.read_text())
    sys.path += [entry for entry in question["packages"] if entry not in sys.path]
    sys.path.insert(
        0, str(asked.parent / "modules")
    )  # where a model's own code is put: not shared with other processes
    os.environ["HF_MODULES_CACHE"] = sys.path[0]
    if any(served["program"] is None for served in question["served"].values()):
        import torch

        torch.set_num_threads(question["threads"])
    answered.write_text(json.dumps({"speed": speed, "alone": alone}[question["measure"]](question)))


if __name__ == "__main__":
    main()
