import json
import os
import sys

import executorch.kernels.quantized  # noqa: F401  # operators of quantized embeddings
import numpy
import tokenizers
import torch
from executorch.extension.pybindings import portable_lib
from executorch.runtime import Runtime

if "OMP_NUM_THREADS" in os.environ:
    portable_lib._unsafe_reset_threadpool(int(os.environ["OMP_NUM_THREADS"]))
forward = Runtime.get().load_program("model.pte").load_method("forward")
largest_batch = forward.metadata.input_tensor_meta(0).sizes()[0]  # its memory is planned for it
inputs = ("ids", "attention_mask", "type_ids")[: forward.metadata.num_inputs()]
tokenizer = tokenizers.Tokenizer.from_file("tokenizer.json")  # also truncates and pads


def predict(texts):
    rows = tokenizer.encode_batch(texts)
    parts = [rows[first : first + largest_batch] for first in range(0, len(rows), largest_batch)]
    return numpy.concatenate([logits_of(part) for part in parts])


def logits_of(rows):
    columns = [torch.tensor([getattr(row, name) for row in rows]) for name in inputs]
    return forward.execute(columns)[0].numpy()


if __name__ == "__main__":
    with open("config.json") as file:
        names = json.load(file)["id2label"]
    for text in sys.argv[1:] or ["a text"]:
        logits = numpy.atleast_2d(predict([text])[0])
        labels = [names[str(place)] for place in logits.argmax(-1)]
        print(text, *labels, logits.max(), sep=" | ")
