import json
import os
import sys

import numpy
import onnxruntime
import tokenizers

settings = onnxruntime.SessionOptions()
settings.intra_op_num_threads = int(os.environ.get("OMP_NUM_THREADS", "0"))  # 0: all cores
settings.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")  # inputs stay float
session = onnxruntime.InferenceSession("model.onnx", settings)
tokenizer = tokenizers.Tokenizer.from_file("tokenizer.json")  # cuts and pads as well


def answer(texts):
    rows = tokenizer.encode_batch(texts)
    given = {"input_ids": [row.ids for row in rows], "attention_mask": [row.attention_mask for row in rows]}
    given["token_type_ids"] = [row.type_ids for row in rows]
    (logits,) = session.run(["logits"], {each.name: numpy.array(given[each.name]) for each in session.get_inputs()})
    return logits if logits.ndim == 2 else logits[range(len(rows)), numpy.sum(given["attention_mask"], 1) - 1]


if __name__ == "__main__":
    with open("config.json") as file:
        names = json.load(file)["id2label"]
    texts = sys.argv[1:] or ["a text"]
    for text, row in zip(texts, answer(texts), strict=True):
        print(text, names.get(str(row.argmax())) or tokenizer.decode([row.argmax()]), row.max(), sep=" | ")
