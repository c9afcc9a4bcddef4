import json
import os
import sys

import numpy
import onnxruntime
import tokenizers

settings = onnxruntime.SessionOptions()
settings.intra_op_num_threads = int(os.environ.get("OMP_NUM_THREADS", "0"))  # 0: all cores
settings.add_session_config_entry(
    "session.qdq_matmulnbits_accuracy_level", "1"
)  # inputs stay float
session = onnxruntime.InferenceSession("model.onnx", settings)
tokenizer = tokenizers.Tokenizer.from_file("tokenizer.json")  # cuts and pads as well
with open("config.json") as file:
    config = json.load(file)


def read(ids, mask, past):
    kept = {
        each.name: each.shape for each in session.get_inputs()[2:]
    }  # keys and values of what was read before
    past = past or {
        name: numpy.zeros((len(ids), heads, 0, width), "float32")
        for name, (_, heads, _, width) in kept.items()
    }
    logits, *present = session.run(None, {"input_ids": ids, "attention_mask": mask, **past})
    return logits, dict(zip(kept, present, strict=True))


def answer(texts):
    rows = tokenizer.encode_batch(texts)
    mask = numpy.array([row.attention_mask for row in rows])
    logits, _ = read(numpy.array([row.ids for row in rows]), mask, None)
    return logits[range(len(rows)), mask.sum(1) - 1]


def write(text, most=20):
    """The likeliest token, again and again; without a cache all is read again for each."""
    ids, past = tokenizer.encode(text).ids, None
    start, end = len(ids), min(len(ids) + most, config["positions"] or sys.maxsize)
    while len(ids) < end and config["eos_token_id"] not in ids[start:]:
        logits, past = read(
            numpy.array([ids[-1:] if past else ids]), numpy.ones((1, len(ids)), int), past
        )
        ids.append(int(logits[0, -1].argmax()))
    return ids[start:]


if __name__ == "__main__":
    for text in sys.argv[1:] or ["The"]:
        print(text, tokenizer.decode(write(text)), sep=" | ")
