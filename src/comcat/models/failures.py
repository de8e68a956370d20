"""What went wrong in another library, in our words."""

from __future__ import annotations

import importlib
from typing import Any

from ..errors import ModelError

RANDOM_WEIGHTS = "pretrained=False (--no-pretrained) builds the architecture with random weights"
NOT_BY_PRETRAINED = (
    "a model that comcat made smaller is saved by comcat.save(model, folder), since save_pretrained leaves out its plan"
)

_NO_SUCH = {"RepositoryNotFoundError", "GatedRepoError", "RevisionNotFoundError", "HFValidationError"}
_UNREACHABLE = {"LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectionError", "ConnectError", "URLError"}
_UNREACHABLE |= {"TimeoutError", "TimeoutException"}


def required(library: str) -> Any:
    """``timm`` or ``transformers``, imported now. Raises ModelError if it is not installed."""
    try:
        return importlib.import_module(library)
    except ImportError as error:
        raise ModelError(f"models of {library} need the package: pip install 'comcat[{library}]' ({error})") from None


def first_line(error: BaseException) -> str:
    """The kind of ``error`` and the first line of its message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def loading_failure(spec: str, error: Exception, *, local: bool, instead: str | None = None) -> ModelError:
    """The error to raise when a library could not load ``spec``; ``local`` says that it is a folder.

    instead: what else does where the hub is away; by default what there is for a model.
    """
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    kinds = {cls.__name__ for e in chain for cls in type(e).__mro__}
    if not local and kinds & _NO_SUCH:
        return ModelError(f"{spec}: the hub has no such model, or it is not public ({first_line(error)})")
    if not local and kinds & _UNREACHABLE:
        if instead is None:
            at_hub = spec.startswith(("hf:", "timm:hf-hub:"))
            needs_config = ", but even pretrained=False (--no-pretrained) needs its config"
            instead = needs_config if at_hub else f", and {RANDOM_WEIGHTS}"
        return ModelError(
            f"{spec}: the hub cannot be reached and the model is not in the cache; a local folder works without it"
            f"{instead}"
        )
    return ModelError(f"{spec} cannot be loaded: {first_line(error)}")
