import json
import os
import sys

import numpy
import openvino
import tokenizers

with open("config.json") as file:
    config = json.load(file)
settings = {"INFERENCE_PRECISION_HINT": config["precision"], "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}  # inputs stay float
settings["INFERENCE_NUM_THREADS"] = int(os.environ.get("OMP_NUM_THREADS", "0"))  # 0: all cores
model = openvino.Core().compile_model("openvino_model.xml", "CPU", settings)
tokenizer = tokenizers.Tokenizer.from_file("tokenizer.json")  # cuts and pads as well


def answer(texts):
    rows = tokenizer.encode_batch(texts)
    given = {"input_ids": [row.ids for row in rows], "attention_mask": [row.attention_mask for row in rows]}
    given["token_type_ids"] = [row.type_ids for row in rows]
    logits = model({each.any_name: numpy.array(given[each.any_name]) for each in model.inputs})["logits"]
    return logits if logits.ndim == 2 else logits[range(len(rows)), numpy.sum(given["attention_mask"], 1) - 1]


if __name__ == "__main__":
    texts = sys.argv[1:] or ["a text"]
    for text, row in zip(texts, answer(texts), strict=True):
        print(text, config["id2label"].get(str(row.argmax())) or tokenizer.decode([row.argmax()]), row.max(), sep=" | ")
