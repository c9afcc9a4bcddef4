"""Checks of single values; their messages name the key, the value, the rule and a way out."""

import math
from urllib.parse import urlsplit

from distill.errors import UserError

__all__ = [
    "check_address",
    "check_choice",
    "check_fused",
    "check_positive",
    "check_range",
    "check_served",
]

ADDRESS_HINT = "write it as http://127.0.0.1:8000/v1"


def check_range(key: str, value: float | None, low: float, high: float, hint: str) -> None:
    """Raise UserError unless `value` is None or a finite number in [low, high]."""
    if value is not None and not (low <= value <= high and math.isfinite(value)):
        unbounded = high == math.inf
        limits = f"must be at least {low:g}" if unbounded else f"must lie in [{low:g}, {high:g}]"
        raise UserError(f"{key} is {value:g}, but it {limits}: {hint}")


def check_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise UserError unless `value` is one of the choices."""
    if value not in choices:
        raise UserError(
            f"{key} is {value}, but it must be one of {', '.join(choices)}: choose one of them"
        )


def check_positive(key: str, value: float | None, hint: str) -> None:
    """Raise UserError unless `value` is None or a finite number above 0."""
    if value is not None and not 0 < value < math.inf:
        raise UserError(f"{key} is {value:g}, but it must be a number above 0: {hint}")


def check_fused(fused: bool | None, precision: str) -> None:
    """Raise UserError if a fused optimizer is asked for where it would act on wrong gradients."""
    if fused and precision == "16-mixed":
        raise UserError(
            "optimizer.fused is true, but with trainer.precision=16-mixed a fused step unscales "
            "the gradients after they were clipped: set trainer.precision=bf16-mixed, or leave "
            "optimizer.fused out"
        )


def check_served(outputs: str, url: str | None, model: str | None) -> None:
    """Raise UserError unless the address of a server is there where it is read, and valid."""
    if outputs != "served":
        for key, value in (("url", url), ("served_model", model)):
            if value is not None:
                raise UserError(
                    f"teacher.{key} is {value}, but teacher.outputs is {outputs}, which asks no "
                    f"server: set teacher.outputs=served, or leave teacher.{key} out"
                )
        return
    if url is None:
        raise UserError(f"teacher.outputs is served, but teacher.url is not set: {ADDRESS_HINT}")
    check_address("teacher.url", url)


def check_address(key: str, url: str) -> None:
    """Raise UserError unless `url` is the address of a server, without a password."""
    parts = urlsplit(url)
    if parts.username is not None or parts.password is not None:
        raise UserError(
            f"{key} has a user or password for {parts.hostname}, but recipes are stored: "
            "leave it out, and set the environment variable DISTILL_TEACHER_KEY"
        )
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise UserError(
            f"{key} is {url}, but it must be the http address of a server: {ADDRESS_HINT}"
        )
