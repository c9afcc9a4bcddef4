"""A server on this machine that writes with weights from a folder, as vLLM and SGLang.

Its adapters are merged by the formula of Hu et al. 2021, W + (alpha / r) B A, without peft. Above
temperature 0 its texts differ at each request, whatever seed it is given.
"""

import copy
import json
import os
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.log_prob_server import LogProbServer, serve


class CompletionServer(LogProbServer):
    """Attributes that a test sets besides, or reads:

    loaded: the folders that were loaded, in order.
    adapters: the models of the adapters that are there, by name.
    length_limit: tokens after which it ends every completion; None: those that are requested.
    end: the second id of each completion, at which the model's config ends texts; None: no id.
    strange: an id in place of the first of each completion; None: the model's.
    states: the weights of each model that was loaded.
    """

    def __init__(self, model, tokenizer, kind="vllm"):
        super().__init__(model, tokenizer, kind)
        self.loaded, self.adapters, self.states = [], {}, []
        self.length_limit = self.strange = self.end = None
        self.requests = []

    # ---- weights

    def load_lora_adapter(self, body):
        if body["lora_name"] in self.adapters:
            return 400, {"error": {"message": f"{body['lora_name']} has already been loaded"}}
        folder = Path(body["lora_path"])
        settings = json.loads((folder / "adapter_config.json").read_text())
        tensors = load_file(folder / "adapter_model.safetensors")
        merged = copy.deepcopy(self.model)
        scale = settings["lora_alpha"] / settings["r"]
        for name in tensors:
            if "lora_A" in name:
                layer = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                down, up = tensors[name], tensors[name.replace("lora_A", "lora_B")]
                merged.get_submodule(layer).weight.data += scale * (up @ down)
        self.adapters[body["lora_name"]] = merged
        self.note(folder, merged)
        return 200, self.done("added")

    def unload_lora_adapter(self, body):
        if self.adapters.pop(body["lora_name"], None) is None:
            return 404, {"error": {"message": f"{body['lora_name']} cannot be found"}}
        return 200, self.done("removed")

    def done(self, what):
        """vLLM answers in plain text, SGLang in JSON."""
        return f"Success: {what}".encode() if self.kind == "vllm" else {"success": True}

    def models(self):
        about = {"owned_by": self.kind, "parent": self.names[0]}
        listed = [{"id": name, **about} for name in self.adapters]
        return {"data": super().models()["data"] + listed}

    def named(self, name):
        """The model of a name; None: there is no such one."""
        known = {None: self.model} | dict.fromkeys(self.names, self.model) | self.adapters
        return known.get(name)

    def update_weights_from_disk(self, body):
        folder = Path(body["model_path"])
        self.model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
        self.note(folder, self.model)
        return 200, {"success": True, "message": "updated"}

    def note(self, folder, model):
        self.loaded.append(folder.name)
        self.states.append({name: each.clone() for name, each in model.state_dict().items()})

    # ---- completions

    def write(self, model, prompt, tokens, temperature, stops):
        ids = []
        with self.lock, torch.no_grad():
            self.requests.append(tuple(prompt))
            while len(ids) < min(tokens, self.length_limit or tokens):
                logits = model(torch.tensor([[*prompt, *ids]])).logits[0, -1].double()
                if self.end is not None and len(ids) == 1:
                    ids.append(self.end)
                elif temperature == 0:
                    ids.append(int(logits.argmax()))
                else:
                    random = torch.Generator().manual_seed(int.from_bytes(os.urandom(6)))
                    probs = (logits / temperature).softmax(-1)
                    ids.append(int(torch.multinomial(probs, 1, generator=random)))
                if ids[-1] in stops:
                    break
        return [self.strange, *ids[1:]] if self.strange is not None else ids

    def completions(self, body):
        if "prompt_logprobs" in body:
            return super().completions(body)
        model = self.named(body["model"])
        if model is None:
            return 404, {"error": {"message": f"The model {body['model']} does not exist."}}
        stops = body["stop_token_ids"] + ([] if body.get("ignore_eos") else [self.end])
        ids = self.write(model, body["prompt"], body["max_tokens"], body["temperature"], stops)
        return 200, {"choices": [{"text": "", "token_ids": ids, "finish_reason": "length"}]}

    def generate(self, body):
        if "sampling_params" not in body or body.get("return_logprob"):
            return super().generate(body)
        model = self.named(body.get("lora_path"))
        if model is None:
            return 400, {"error": {"message": f"{body['lora_path']} is not loaded"}}
        settings = body["sampling_params"]
        stops = [*settings["stop_token_ids"], self.end]
        ids = self.write(
            model, body["input_ids"], settings["max_new_tokens"], settings["temperature"], stops
        )
        reason = {"type": "length"}
        if ids[-1] in stops:  # SGLang may leave the stop token out of the ids
            reason, ids = {"type": "stop", "matched": ids[-1]}, ids[:-1]
        return 200, {"output_ids": ids, "meta_info": {"finish_reason": reason}}


def serve_completions(model, tokenizer, kind="vllm"):
    """The server and its address, while it runs."""
    return serve(model, tokenizer, kind, CompletionServer)
