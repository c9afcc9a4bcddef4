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
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
}  # inputs stay float
settings["INFERENCE_NUM_THREADS"] = int(os.environ.get("OMP_NUM_THREADS", "0"))  # 0: all cores
model = openvino.Core().compile_model("openvino_model.xml", "CPU", settings)
tokenizer = tokenizers.Tokenizer.from_file("tokenizer.json")  # cuts and pads as well
columns = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}


def answer(texts):
    rows = tokenizer.encode_batch(texts)
    given = {
        each.any_name: numpy.array([getattr(row, columns[each.any_name]) for row in rows])
        for each in model.inputs
    }
    return model(given)["logits"]


if __name__ == "__main__":
    for text in sys.argv[1:] or ["a text"]:
        row = answer([text])[0]
        print(text, config["id2label"][str(row.argmax())], row.max(), sep=" | ")
