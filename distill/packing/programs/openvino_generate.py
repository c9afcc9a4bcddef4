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


def read(ids, mask, past):
    kept = {
        each.any_name: each.partial_shape for each in model.inputs[2:]
    }  # keys and values of what was read before
    sizes = {
        name: (len(ids), heads.get_length(), 0, width.get_length())
        for name, (_, heads, _, width) in kept.items()
    }
    past = past or {name: numpy.zeros(size, "float32") for name, size in sizes.items()}
    found = model({"input_ids": ids, "attention_mask": mask, **past})
    return found["logits"], {
        name: found[name.replace("past_key_values", "present")] for name in kept
    }


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
