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
columns = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}


def predict(texts):
    rows = tokenizer.encode_batch(texts)
    inputs = {
        each.name: numpy.array([getattr(row, columns[each.name]) for row in rows])
        for each in session.get_inputs()
    }
    return session.run(["logits"], inputs)[0]


if __name__ == "__main__":
    with open("config.json") as file:
        names = json.load(file)["id2label"]
    for text in sys.argv[1:] or ["a text"]:
        logits = numpy.atleast_2d(predict([text])[0])
        labels = [names[str(place)] for place in logits.argmax(-1)]
        print(text, *labels, logits.max(), sep=" | ")
