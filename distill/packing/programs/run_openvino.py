import json
import os
import sys

import numpy
import openvino
import tokenizers

with open("config.json") as file:
    config = json.load(file)
settings = {
    "INFERENCE_PRECISION_HINT": config["precision"],
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,  # activations stay in floats
    "INFERENCE_NUM_THREADS": int(os.environ.get("OMP_NUM_THREADS", "0")),  # 0: all cores
}
model = openvino.Core().compile_model("openvino_model.xml", "CPU", settings)
tokenizer = tokenizers.Tokenizer.from_file("tokenizer.json")  # also truncates and pads
columns = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}


def predict(texts):
    rows = tokenizer.encode_batch(texts)
    inputs = {
        each.any_name: numpy.array([getattr(row, columns[each.any_name]) for row in rows])
        for each in model.inputs
    }
    return model(inputs)["logits"]


if __name__ == "__main__":
    for text in sys.argv[1:] or ["a text"]:
        logits = numpy.atleast_2d(predict([text])[0])
        labels = [config["id2label"][str(place)] for place in logits.argmax(-1)]
        print(text, *labels, logits.max(), sep=" | ")
