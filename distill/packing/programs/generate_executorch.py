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
inputs = ("ids", "attention_mask")[: forward.metadata.num_inputs()]
tokenizer = tokenizers.Tokenizer.from_file("tokenizer.json")  # also truncates and pads


def predict(texts):
    if len(texts) > largest_batch:
        return numpy.concatenate([predict(texts[:largest_batch]), predict(texts[largest_batch:])])
    rows = tokenizer.encode_batch(texts)
    columns = [torch.tensor([getattr(row, name) for row in rows]) for name in inputs]
    logits = forward.execute(columns)[0].numpy()
    return logits[range(len(rows)), [sum(row.attention_mask) - 1 for row in rows]]


if __name__ == "__main__":
    for text in sys.argv[1:] or ["The"]:
        row = predict([text])[0]
        print(text, tokenizer.decode([row.argmax()]), row.max(), sep=" | ")
