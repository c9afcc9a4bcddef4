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
columns = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}


def answer(texts):
    rows = tokenizer.encode_batch(texts)
    given = {
        each.name: numpy.array([getattr(row, columns[each.name]) for row in rows])
        for each in session.get_inputs()
    }
    return session.run(["logits"], given)[0]


if __name__ == "__main__":
    with open("config.json") as file:
        names = json.load(file)["id2label"]
    for text in sys.argv[1:] or ["a text"]:
        row = answer([text])[0]
        print(text, names[str(row.argmax())], row.max(), sep=" | ")
