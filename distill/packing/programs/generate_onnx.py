import json
import os
import sys

import numpy
import onnxruntime
import tokenizers

settings = onnxruntime.SessionOptions()
settings.intra_op_num_threads = int(os.environ.get("OMP_NUM_THREADS", "0"))  # 0: all cores
# Activations stay in floats.
settings.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
session = onnxruntime.InferenceSession("model.onnx", settings)
tokenizer = tokenizers.Tokenizer.from_file("tokenizer.json")  # also truncates and pads
with open("config.json") as file:
    config = json.load(file)


def read(ids, mask, past):
    # Keys and values of earlier tokens.
    entries = {each.name: each.shape for each in session.get_inputs()[2:]}
    past = past or {
        name: numpy.zeros((len(ids), heads, 0, width), "float32")
        for name, (_, heads, _, width) in entries.items()
    }
    logits, *present = session.run(None, {"input_ids": ids, "attention_mask": mask, **past})
    return logits, dict(zip(entries, present, strict=True))


def predict(texts):
    rows = tokenizer.encode_batch(texts)
    mask = numpy.array([row.attention_mask for row in rows])
    logits, _ = read(numpy.array([row.ids for row in rows]), mask, None)
    return logits[range(len(rows)), mask.sum(1) - 1]


def generate(text, max_new_tokens=20):
    """Greedy decoding; without cached keys and values all tokens are read for each new one."""
    ids, past = tokenizer.encode(text).ids, None
    start = len(ids)
    end = min(start + max_new_tokens, config["positions"] or sys.maxsize)
    while len(ids) < end and not {*ids[start:]} & {*config["stop_token_ids"]}:
        logits, past = read(
            numpy.array([ids[-1:] if past else ids]), numpy.ones((1, len(ids)), int), past
        )
        ids.append(int(logits[0, -1].argmax()))
    return ids[start:]


if __name__ == "__main__":
    for text in sys.argv[1:] or ["The"]:
        print(text, tokenizer.decode(generate(text)), sep=" | ")
