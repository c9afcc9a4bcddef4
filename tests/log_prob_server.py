"""A server on this machine that gives the log-probabilities of a model, with faults on request."""

import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch


class LogProbServer:
    """Answers as vLLM, SGLang or llama.cpp do, from a model in this process.

    Attributes that a test sets while it runs:
        limit: the most log-probabilities per position.
        fewer: log-probabilities that are left out of each position.
        busy, cut, garbled: requests that get 429, a closed connection, or text that is no JSON.
        lost: paths whose next request takes effect, and whose reply is lost.
        delay: seconds before a reply.
        stale: whether a prompt that was seen before gets the values of the one after it.
        down: whether every connection is closed.
        last: prompts after which it goes down; None: it stays.
        prompts: the prompts that were answered, in order.
    """

    def __init__(self, model, tokenizer, kind="vllm"):
        self.model, self.tokenizer, self.kind = model, tokenizer, kind
        self.names, self.length, self.key = ["teacher"], None, None
        self.limit, self.fewer, self.delay = 64, 0, 0.0
        self.busy = self.cut = self.garbled = 0
        self.stale = self.down = False
        self.lost = []
        self.last, self.texts = None, {}
        self.prompts, self.lock = [], threading.Lock()

    # ---- replies

    def log_probs(self, ids):
        with self.lock, torch.no_grad():
            self.prompts.append(tuple(ids))
            self.down = self.down or len(self.prompts) == self.last
            if self.stale and self.prompts.count(tuple(ids)) > 1:
                ids = [ids[0], *reversed(ids[1:])]
            return self.model(torch.tensor([ids])).logits[0].float().log_softmax(-1)

    def listed(self, values, k):
        top = values.topk(max(k - self.fewer, 1))
        return list(zip(*(each.tolist() for each in top), strict=True))

    def decode(self, token):
        if token not in self.texts:
            self.texts[token] = self.tokenizer.decode([token])
        return self.texts[token]

    def models(self):
        about = {"owned_by": self.kind, "max_model_len": self.length}
        return {"data": [{"id": name, **about} for name in self.names]}

    def completions(self, body):
        ids, k = body["prompt"], body["prompt_logprobs"]
        if k > self.limit:
            return 400, {
                "error": {
                    "message": f"Requested prompt logprobs of {k}, "
                    f"which is greater than max allowed: {self.limit}"
                }
            }
        values = self.log_probs(ids)
        positions = [None]
        for place in range(1, len(ids)):
            pairs = self.listed(values[place - 1], k)
            pairs.append((float(values[place - 1, ids[place]]), ids[place]))
            positions.append(
                {
                    str(token): {"logprob": value, "decoded_token": self.decode(token)}
                    for value, token in pairs
                }
            )
        return 200, {"choices": [{"text": "", "prompt_logprobs": positions}]}

    def generate(self, body):
        ids, k = body["input_ids"], body["top_logprobs_num"]
        values = self.log_probs(ids)
        triple = lambda value, token: [value, token, self.decode(token)]  # noqa: E731
        labels = [[None, ids[0], ""]]
        top = [None]
        for place in range(1, len(ids)):
            labels.append(triple(float(values[place - 1, ids[place]]), ids[place]))
            top.append([triple(*pair) for pair in self.listed(values[place - 1], k)])
        return 200, {"meta_info": {"input_token_logprobs": labels, "input_top_logprobs": top}}

    def completion(self, body):
        values = self.log_probs(body["prompt"])[-1]
        top = [
            {"id": token, "token": self.decode(token), "logprob": value}
            for value, token in self.listed(values, body["n_probs"])
        ]
        return 200, {"completion_probabilities": [{"top_logprobs": top}]}

    def fault(self):
        """The fault of this request, if any."""
        with self.lock:
            if self.down:
                return "cut"
            for name in ("busy", "cut", "garbled"):
                if getattr(self, name):
                    setattr(self, name, getattr(self, name) - 1)
                    return name
        return None


def _handler(server):
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def reply(self, status, content):
            text = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def do_GET(self):
            if server.down:
                return self.connection.close()
            if server.key and self.headers.get("Authorization") != f"Bearer {server.key}":
                return self.reply(401, {"error": "no key"})
            return self.reply(200, server.models())

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if server.key and self.headers.get("Authorization") != f"Bearer {server.key}":
                return self.reply(401, {"error": "no key"})
            time.sleep(server.delay)
            match server.fault():
                case "busy":
                    return self.reply(429, {"error": {"message": "later"}})
                case "cut":
                    return self.connection.close()
                case "garbled":
                    return self.reply(200, b'{"choices": [')
            path = self.path.removeprefix("/v1").removeprefix("/")
            function = getattr(server, path, None)
            reply = function(body) if function else (404, {"detail": "Not Found"})
            if path in server.lost:
                server.lost.remove(path)
                return self.connection.close()
            return self.reply(*reply)

    return Handler


@contextmanager
def serve(model, tokenizer, kind="vllm", of=LogProbServer):
    """The server and its address, while it runs."""
    server = of(model, tokenizer, kind)
    http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(server))
    http.daemon_threads = True
    thread = threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    server.url = f"http://127.0.0.1:{http.server_port}/v1"
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
        thread.join()
