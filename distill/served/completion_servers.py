"""Servers that write the student's completions: they load its weights, then read prompts.

vLLM loads adapters over HTTP, SGLang adapters and complete weights. Both read them from a folder
that the server sees too. A server's defaults come from the generation config of its model, so that
each request names every sampling setting.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from distill.errors import UserError
from distill.models import Sampling, until_stop
from distill.served.client import Client, Refusal, list_models

log = logging.getLogger("distill")

SETTING = "loss.completions_url"  # the key of the recipe
_EVERYTHING = {"top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}  # no token is left out


@dataclass(frozen=True)
class CompletionServer(ABC):
    """A server that has been reached.

    Args:
        client: Sends the requests.
        base: Name of the model that it serves.
    """

    client: Client
    base: str

    label: ClassVar[str]

    def check_loads(self, adapter: bool) -> None:  # noqa: B027  # most load both
        """UserError if the server loads no such weights: an adapter, or complete ones."""

    def load(self, folder: Path, name: str, adapter: bool) -> None:
        """Load the student's weights.

        Args:
            folder: In the format of peft, or of transformers.
            name: Of the adapter at the server.
            adapter: Whether it is one.

        Raises:
            UserError: The server does not load them.
        """
        try:
            self._load(str(folder.resolve()), name, adapter)
        except Refusal as refusal:
            if adapter and name in list_models(self.client):
                return  # an earlier attempt has loaded it, and its reply was lost
            raise UserError(
                f"{SETTING} is {self.client.url}, but {self.label} there does not load "
                f"{folder} ({refusal}): {self._way_out(adapter)}"
            ) from None

    def unload(self, name: str) -> None:
        """Remove an adapter, if it is there."""
        with suppress(Refusal):
            self.client.command("/unload_lora_adapter", {"lora_name": name})

    def complete(
        self, prompt: Sequence[int], sampling: Sampling, seed: int, name: str | None
    ) -> list[int]:
        """The ids of one completion, its stop token included.

        Args:
            prompt: Ids, at least one.
            sampling: How completions are drawn.
            seed: Of the server's generator.
            name: Of the adapter; None: the model itself.

        Raises:
            UserError: The server refuses, or what it gives is no completion.
        """
        try:
            ids, end = self._complete([*prompt], sampling, seed, name)
            ids = until_stop([int(each) for each in ids], sampling.stops)
            if isinstance(end, int) and (not ids or ids[-1] not in (*sampling.stops, end)):
                ids.append(end)
        except Refusal as refusal:
            problem = f"refuses a prompt of {len(prompt)} tokens ({refusal})"
            hint = "change the server's settings, task.max_length or loss.completion_tokens"
            raise self._unusable(problem, hint) from None
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            problem = f"gives no token ids of a completion ({type(error).__name__} {error})"
            raise self._unusable(problem, "serve the student with a newer version") from error
        self._check(ids, sampling)
        return ids

    def _check(self, ids: list[int], sampling: Sampling) -> None:
        hint = "serve the model that student.model names"
        unknown = [each for each in ids if not 0 <= each < (sampling.classes or each + 1)]
        if unknown:
            raise self._unusable(f"writes token {unknown[0]}, which the student lacks", hint)
        if not ids or len(ids) > sampling.tokens:
            problem = f"writes {len(ids)} tokens of at least 1 and at most {sampling.tokens}"
            raise self._unusable(problem, hint)
        if len(ids) < sampling.tokens and ids[-1] not in sampling.stops:
            problem = (
                f"ends a completion at token {ids[-1]}, after {len(ids)} of {sampling.tokens}, and "
                f"the student's stop at {', '.join(map(str, sampling.stops)) or 'no token'}"
            )
            hint = (
                "raise its longest context, or add the token to eos_token_id in "
                "generation_config.json of student.model"
            )
            raise self._unusable(problem, hint)

    def _unusable(self, problem: str, hint: str) -> UserError:
        return UserError(
            f"{SETTING} is {self.client.url}, but {self.label} there {problem}: {hint}"
        )

    @abstractmethod
    def _load(self, folder: str, name: str, adapter: bool) -> None: ...

    @abstractmethod
    def _way_out(self, adapter: bool) -> str:
        """How to start the server so that it loads weights."""

    @abstractmethod
    def _complete(
        self, prompt: list[int], sampling: Sampling, seed: int, name: str | None
    ) -> tuple[list[Any], Any]:
        """The ids that the server gives, and the stop token that ended them, if it says so."""


class VLLM(CompletionServer):
    """Completions with `return_token_ids`; adapters are loaded at runtime."""

    label = "vLLM"

    def check_loads(self, adapter: bool) -> None:
        if not adapter:
            raise UserError(
                f"{SETTING} is {self.client.url}, but vLLM there loads adapters only, and the "
                "student has none: set student.lora.rank, or serve the student with SGLang"
            )

    def _load(self, folder: str, name: str, adapter: bool) -> None:
        self.client.command("/load_lora_adapter", {"lora_name": name, "lora_path": folder})

    def _way_out(self, adapter: bool) -> str:
        return (
            "start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, --enable-lora and a "
            "--max-lora-rank of at least student.lora.rank, where it can read this folder"
        )

    def _complete(
        self, prompt: list[int], sampling: Sampling, seed: int, name: str | None
    ) -> tuple[list[Any], Any]:
        request = {
            "model": name or self.base,
            "prompt": prompt,
            "max_tokens": sampling.tokens,
            "temperature": sampling.temperature,
            "top_k": -1,
            "seed": seed,
            "stop_token_ids": [*sampling.stops],
            "ignore_eos": True,  # no other token stops
            "return_token_ids": True,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            **_EVERYTHING,
        }
        choice = self.client.post("/completions", request)["choices"][0]
        return choice["token_ids"], choice.get("stop_reason")


class SGLang(CompletionServer):
    """`/generate` with ids; weights are loaded from a folder."""

    label = "SGLang"

    def unload(self, name: str) -> None:
        with suppress(Refusal):
            self.client.post_to_root("/unload_lora_adapter", {"lora_name": name})

    def _load(self, folder: str, name: str, adapter: bool) -> None:
        if adapter:
            path, request = "/load_lora_adapter", {"lora_name": name, "lora_path": folder}
        else:
            path, request = "/update_weights_from_disk", {"model_path": folder}
        reply = self.client.post_to_root(path, request)
        if isinstance(reply, dict) and not reply.get("success", True):
            raise Refusal(200, str(reply.get("message") or reply.get("error_message") or "failed"))

    def _way_out(self, adapter: bool) -> str:
        if adapter:
            return "start it with --enable-lora and a --max-lora-rank that fits student.lora.rank"
        return "serve a model of the student's architecture, where it can read this folder"

    def _complete(
        self, prompt: list[int], sampling: Sampling, seed: int, name: str | None
    ) -> tuple[list[Any], Any]:
        request: dict[str, Any] = {
            "input_ids": prompt,
            "sampling_params": {
                "max_new_tokens": sampling.tokens,
                "temperature": sampling.temperature,
                "top_k": -1,
                "sampling_seed": seed,
                "stop_token_ids": [*sampling.stops],
                "no_stop_trim": True,
                "presence_penalty": 0.0,
                "frequency_penalty": 0.0,
                **_EVERYTHING,
            },
        }
        if name is not None:
            request["lora_path"] = name
        reply = self.client.post_to_root("/generate", request)
        reason = reply["meta_info"].get("finish_reason") or {}
        return reply["output_ids"], reason.get("matched") if isinstance(reason, dict) else None


_KINDS: dict[str, type[CompletionServer]] = {"vllm": VLLM, "sglang": SGLang}


def connect_writer(client: Client) -> CompletionServer:
    """Reach the server that is to write the student's completions.

    Raises:
        UserError: It cannot be reached, or loads no weights over HTTP.
    """
    base, about = next(iter(list_models(client).items()))
    kind = str(about.get("owned_by")).lower()
    if kind not in _KINDS:
        raise UserError(
            f"{SETTING} is {client.url}, but the server there says that it is {kind}, and "
            "only vLLM and SGLang load new weights over HTTP: start one of them"
        )
    return _KINDS[kind](client, base)
