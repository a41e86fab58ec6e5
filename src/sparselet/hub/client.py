"""The hub's library: loaded when first used, and its errors as text."""

import importlib
import warnings
from typing import Any

from sparselet.errors import MissingExtra


def hub_library() -> Any:
    """The module huggingface_hub. Raises MissingExtra."""
    try:
        return importlib.import_module("huggingface_hub")
    except ModuleNotFoundError as error:
        raise MissingExtra("the hub needs huggingface_hub: pip install 'sparselet[hub]'.") from error


def hub_api() -> Any:
    """The library's client. Raises MissingExtra."""
    return hub_library().HfApi(library_name="sparselet")


def show_progress(shown: bool) -> None:
    """Whether transfers show bars on standard error. HF_HUB_DISABLE_PROGRESS_BARS, where it is set, wins."""
    utils = hub_library().utils
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the variable wins
        (utils.enable_progress_bars if shown else utils.disable_progress_bars)()


def hub_error_text(error: Exception) -> str:
    """What failed, and what the user can do, as one line."""
    errors = hub_library().errors
    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        return hub_error_text(error.__cause__)
    if isinstance(error, errors.GatedRepoError):
        return "access is granted on request; ask on its page, and log in with `hf auth login`."
    if isinstance(error, errors.RepositoryNotFoundError):
        return "there is no such repository, or you may not see it; check the name, or log in with `hf auth login`."
    if isinstance(error, errors.RevisionNotFoundError):
        return "it has no such revision; give a branch, tag or commit that it has."
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set; unset it to reach the hub."
    if http_status(error) in (401, 403):
        return f"access is refused ({http_status(error)}); log in with `hf auth login` and a token that may do this."
    lines = [line.strip(" .") for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}{': ' if lines else ''}{' '.join(lines)}."


def http_status(error: Any) -> int:
    """The HTTP status of the hub's answer; 0 if it did not answer."""
    return error.response.status_code if isinstance(error, hub_library().errors.HfHubHTTPError) else 0
