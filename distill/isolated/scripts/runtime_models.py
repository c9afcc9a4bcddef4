"""Loads a model for one runtime: the program of an exported folder, or PyTorch in several forms."""

import inspect
import os
from collections.abc import Callable
from typing import Any

Predict = Callable[[list[Any]], Any]  # texts, or pairs of texts -> logits (B, C)


def load_runtime_model(model: dict[str, Any]) -> Predict:
    """The function that computes logits of texts; for the keys see `RuntimeModel`."""
    if model["program"] is None:
        return load_torch(model)
    return load_program(model["folder"], model["program"])["predict"]


def load_program(folder: str, program: str) -> dict[str, Any]:
    """Run a program in an exported folder, and return its global names."""
    os.chdir(folder)
    names: dict[str, Any] = {"__name__": "program"}
    exec(compile(program, "program", "exec"), names)
    return names


def load_torch(model: dict[str, Any]) -> Predict:
    """A transformers model with the tokenizer of programs; `form` is like `torch_compile_bf16`."""
    import tokenizers
    import torch
    import transformers

    tokenizer = tokenizers.Tokenizer.from_file(model["tokenizer"])
    form = model["form"].split("_")
    module = getattr(transformers, model["auto_class"]).from_pretrained(
        model["folder"],
        dtype=torch.bfloat16 if "bf16" in form else torch.float32,
        attn_implementation="eager",
        trust_remote_code=model["trust_remote_code"],
    )
    module.eval()
    if "int8" in form:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        quantize_(module, Int8DynamicActivationInt8WeightConfig())
    forward = compile_model(module) if "compile" in form else module
    known = inspect.signature(module.forward).parameters
    options = {"use_cache": False} if "use_cache" in known else {}

    def predict(texts: list[Any]) -> Any:
        rows = tokenizer.encode_batch(texts)
        inputs = {
            "input_ids": [row.ids for row in rows],
            "attention_mask": [row.attention_mask for row in rows],
        }
        if isinstance(texts[0], tuple) and "token_type_ids" in known:
            inputs["token_type_ids"] = [row.type_ids for row in rows]
        tensors = {name: torch.tensor(values) for name, values in inputs.items()}
        with torch.inference_mode():
            logits = forward(**tensors, **options).logits.float()
        if model["answer"] == "next_token":  # the logits of the last token predict it
            logits = logits[range(len(rows)), [sum(row.attention_mask) - 1 for row in rows]]
        return logits.numpy()

    return predict


def compile_model(model: Any) -> Any:
    """Compile for any batch size and length, with the weights as constants."""
    import torch
    from torch._dynamo import config as dynamo
    from torch._inductor import config as inductor

    dynamo.recompile_limit = 64  # shared by all models of a process
    inductor.freezing = True
    return torch.compile(model, dynamic=True)


def as_texts(batch: list[list[str]]) -> list[Any]:
    """Convert pairs to tuples for the tokenizer; JSON has lists."""
    return [cells[0] if len(cells) == 1 else tuple(cells) for cells in batch]


def set_threads(request: dict[str, Any]) -> None:
    """Limit PyTorch's threads; without a model in PyTorch it is not imported, to save memory."""
    if any(model["program"] is None for model in request["models"].values()):
        import torch

        torch.set_num_threads(request["threads"])
