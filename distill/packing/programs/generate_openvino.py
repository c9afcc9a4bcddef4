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


def read(ids, mask, past):
    # Keys and values of earlier tokens.
    entries = {each.any_name: each.partial_shape for each in model.inputs[2:]}
    sizes = {
        name: (len(ids), heads.get_length(), 0, width.get_length())
        for name, (_, heads, _, width) in entries.items()
    }
    past = past or {name: numpy.zeros(size, "float32") for name, size in sizes.items()}
    outputs = model({"input_ids": ids, "attention_mask": mask, **past})
    return outputs["logits"], {
        name: outputs[name.replace("past_key_values", "present")] for name in entries
    }


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
