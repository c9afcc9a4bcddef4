import json
import os
import sys

import executorch.kernels.quantized  # noqa: F401  # look-ups of int8 embeddings
import numpy
import tokenizers
import torch
from executorch.extension.pybindings import portable_lib
from executorch.runtime import Runtime

if "OMP_NUM_THREADS" in os.environ:
    portable_lib._unsafe_reset_threadpool(int(os.environ["OMP_NUM_THREADS"]))
forward = Runtime.get().load_program("model.pte").load_method("forward")
most, given = (
    forward.metadata.input_tensor_meta(0).sizes()[0],
    ("ids", "attention_mask", "type_ids")[: forward.metadata.num_inputs()],
)
tokenizer = tokenizers.Tokenizer.from_file("tokenizer.json")  # cuts and pads as well


def answer(texts):
    if len(texts) > most:  # the memory is planned for so many
        return numpy.concatenate([answer(texts[:most]), answer(texts[most:])])
    rows = tokenizer.encode_batch(texts)
    (logits,) = forward.execute(
        [torch.tensor([getattr(row, name) for row in rows]) for name in given]
    )
    logits, last = logits.numpy(), [sum(row.attention_mask) - 1 for row in rows]
    return logits if logits.ndim == 2 else logits[range(len(rows)), last]


if __name__ == "__main__":
    with open("config.json") as file:
        names = json.load(file)["id2label"]
    texts = sys.argv[1:] or ["a text"]
    for text, row in zip(texts, answer(texts), strict=True):
        print(
            text,
            names.get(str(row.argmax())) or tokenizer.decode([row.argmax()]),
            row.max(),
            sep=" | ",
        )
