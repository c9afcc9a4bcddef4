"""How each kind of server gives the log-probabilities of a prompt's tokens.

A server says in the list of its models which one it is. vLLM lists the likeliest tokens of a prompt
in its completions, SGLang in its own path `/generate`. llama.cpp lists those of a generated token
only, so that each predicted token is a request; its prompt cache computes the prompt once.
"""

import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from distill.errors import UserError
from distill.served.client import Client, Refusal, list_models
from distill.served.token_log_probs import Candidate, InvalidReply, TokenLogProbs, collect

log = logging.getLogger("distill")

Position = Mapping[int, Candidate]
_LIMIT = re.compile(r"(?:max(?:imum)? allowed|at most)\D*(\d+)", re.IGNORECASE)


@dataclass(frozen=True)
class ServerKind(ABC):
    """A server that has been reached, and the model that it serves.

    Args:
        client: Sends the requests.
        model: Name of the model there.
        k: Likeliest tokens per position.
        tokens: Size of the tokenizer's vocabulary.
    """

    client: Client
    model: str
    k: int
    tokens: int

    label: ClassVar[str]

    def log_probs(self, ids: list[int], rows: np.ndarray) -> TokenLogProbs:
        """The likeliest tokens at the predicted positions of an example.

        Args:
            ids: The tokens of the example.
            rows: Indices of the predicted tokens, each at least 1, (N,).

        Raises:
            UserError: The server refuses, or does not give what is needed.
        """
        try:
            positions = self._positions(ids, rows.tolist())
            return collect(positions, [ids[row] for row in rows], self.k, self.tokens)
        except Refusal as refusal:
            raise self._refused(refusal, len(ids)) from None
        except InvalidReply as error:
            raise UserError(
                f"teacher.url is {self.client.url}, but {self.model} there gives {error}: "
                "name the server of a model with the student's tokenizer, or lower teacher.tokens"
            ) from None
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"teacher.url is {self.client.url}, but {self.label} there gives no "
                f"log-probabilities of a prompt ({type(error).__name__} {error}): serve the "
                "teacher with vLLM, SGLang or llama.cpp"
            ) from error

    @abstractmethod
    def _positions(self, ids: list[int], rows: list[int]) -> list[Position]:
        """What the server lists at each predicted position."""

    def _refused(self, refusal: Refusal, length: int) -> UserError:
        limit = _LIMIT.search(refusal.message)
        if limit and "logprobs" in refusal.message and int(limit[1]) < self.k:
            return UserError(
                f"teacher.tokens is {self.k}, but the server's max_logprobs is {limit[1]}: set "
                f"teacher.tokens={limit[1]}, or start it with --max-logprobs {self.k}"
            )
        return UserError(
            f"teacher.url is {self.client.url}, but the server refuses {length} tokens with "
            f"{self.k} log-probabilities each ({refusal}): change the server's settings, "
            "task.max_length or teacher.tokens"
        )


class VLLM(ServerKind):
    """Completions with `prompt_logprobs`: {token: {logprob, rank, decoded_token}} by position."""

    label = "vLLM"

    def _positions(self, ids: list[int], rows: list[int]) -> list[Position]:
        request = {
            "model": self.model,
            "prompt": ids,
            "max_tokens": 1,
            "prompt_logprobs": self.k,
        }
        listed = self.client.post("/completions", request)["choices"][0]["prompt_logprobs"]
        if len(listed) != len(ids):
            raise InvalidReply(f"log-probabilities of {len(listed)} tokens for {len(ids)}")
        return [self._position(listed[row], ids[row]) for row in rows]

    def _position(self, listed: Any, label: int) -> Position:
        position = {
            int(token): Candidate(float(each["logprob"]), each.get("decoded_token"))
            for token, each in (listed or {}).items()
        }
        if label not in position:
            raise InvalidReply(f"log-probabilities without token {label}, which was sent")
        return position


class SGLang(ServerKind):
    """`/generate` with lists of (log-probability, token, text) by position."""

    label = "SGLang"

    def _positions(self, ids: list[int], rows: list[int]) -> list[Position]:
        request = {
            "input_ids": ids,
            "sampling_params": {"max_new_tokens": 1, "temperature": 1.0},
            "return_logprob": True,
            "logprob_start_len": 0,
            "top_logprobs_num": self.k,
            "return_text_in_logprobs": True,
        }
        meta = self.client.post_to_root("/generate", request)["meta_info"]
        labels, listed = meta["input_token_logprobs"], meta["input_top_logprobs"]
        if len(labels) != len(ids) or len(listed) != len(ids):
            raise InvalidReply(f"log-probabilities of {len(labels)} tokens for {len(ids)}")
        return [self._position([*(listed[row] or []), labels[row]], ids[row]) for row in rows]

    def _position(self, listed: list[Any], label: int) -> Position:
        if listed[-1][1] != label:
            raise InvalidReply(f"log-probabilities of token {listed[-1][1]} for {label}")
        return {int(token): Candidate(float(value), text) for value, token, text in listed}


class LlamaCpp(ServerKind):
    """`/completion` of one token after each prefix, with the likeliest tokens at its place."""

    label = "llama.cpp"

    def _positions(self, ids: list[int], rows: list[int]) -> list[Position]:
        return [self._next(ids[:row]) for row in rows]

    def _next(self, prefix: list[int]) -> Position:
        request = {
            "prompt": prefix,
            "n_predict": 1,
            "n_probs": self.k,
            "temperature": 0,
            "cache_prompt": True,
            "post_sampling_probs": False,
        }
        reply = self.client.post_to_root("/completion", request)
        listed = reply["completion_probabilities"][0]["top_logprobs"]
        return {
            int(each["id"]): Candidate(float(each["logprob"]), each.get("token")) for each in listed
        }


_KINDS: dict[str, type[ServerKind]] = {"vllm": VLLM, "sglang": SGLang, "llamacpp": LlamaCpp}


def connect(
    client: Client, names: tuple[str | None, str | None], k: int, tokens: int, length: int
) -> ServerKind:
    """Reach a server, and choose its model.

    Args:
        client: Sends the requests.
        names: `teacher.served_model` and `teacher.model` of the recipe.
        k: Likeliest tokens per position.
        tokens: Size of the tokenizer's vocabulary.
        length: Tokens of the longest example.

    Raises:
        UserError: It cannot be reached, serves another model, or only shorter prompts.
    """
    listed = list_models(client)
    name = choose_model(client.url, list(listed), *names)
    most = listed[name].get("max_model_len")
    if isinstance(most, int) and length >= most:
        raise UserError(
            f"task.max_length makes examples of {length} tokens, but the server's max_model_len "
            f"is {most}, for a prompt and one token more: set task.max_length to {most - 1} or less"
        )
    kind = _KINDS.get(str(listed[name].get("owned_by")).lower(), VLLM)
    log.info("the teacher is %s, served by %s at %s", name, kind.label, client.url)
    return kind(client, name, k, tokens)


def choose_model(url: str, listed: list[str], served_model: str | None, model: str | None) -> str:
    """The name of the teacher among those that a server lists."""
    if served_model is not None and served_model not in listed:
        raise UserError(
            f"teacher.served_model is {served_model}, but the server at {url} serves "
            f"{', '.join(listed)}: name one of them"
        )
    if served_model is not None:
        return served_model
    if model in listed:
        return str(model)
    if len(listed) != 1:
        raise UserError(
            f"teacher.served_model is not set, but the server at {url} serves "
            f"{', '.join(listed)}: name one of them"
        )
    return listed[0]
