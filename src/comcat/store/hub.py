"""Compressed models on the hub."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

from torch import nn

from ..errors import StoreError
from ..files import home_path
from ..models.failures import first_line
from .folder import FILES, STOCK_CONFIG, own_config

_MESSAGE = "Upload a model compressed with comcat"


def looks_like_repo(text: str) -> bool:
    """Whether ``text`` could be the hub's ``"user/repo"``."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", text) is not None


def download(repo_id: str, *, revision: str | None = None, token: str | bool | None = None) -> Path:
    """The folder to which the hub's repository was downloaded, of which only the files of a saved model are taken.

    Raises StoreError if it cannot be had.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo_id, revision=revision, token=token, allow_patterns=[*FILES, STOCK_CONFIG]))
    except Exception as error:  # anything from HTTP errors to OSError, depending on where it fails
        at = f" at {revision!r}" if revision else ""
        raise StoreError(
            f"there is no folder {repo_id!r}, and the hub's {repo_id}{at} cannot be had: {first_line(error)}"
        ) from error


def push_to_hub(
    model_or_folder: nn.Module | str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool = False,
    token: str | bool | None = None,
    commit_message: str = _MESSAGE,
) -> str:
    """Upload a compressed model, or a folder that :func:`comcat.save` wrote, to the hub as ``"user/repo"``.

    The repository is made if it is not there (``private`` counts only then). Of a folder, only what comcat wrote goes
    up. Returns the repository's address.

    Raises StoreError if the folder is not comcat's or is damaged, or if the hub refuses.
    """
    if not looks_like_repo(repo_id):
        raise StoreError(f"got the repository {repo_id!r}, expected 'user/repo'")
    if isinstance(model_or_folder, nn.Module):
        from .saving import save

        with tempfile.TemporaryDirectory(prefix="comcat-") as parent:
            folder = save(model_or_folder, Path(parent) / repo_id.partition("/")[2])
            return _upload(folder, repo_id, private, token, commit_message)
    return _upload(home_path(model_or_folder), repo_id, private, token, commit_message)


def _upload(folder: Path, repo_id: str, private: bool, token: str | bool | None, message: str) -> str:
    from huggingface_hub import HfApi

    names = _names(folder)
    try:
        api = HfApi(token=token)
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(folder_path=folder, repo_id=repo_id, commit_message=message, allow_patterns=names)
    except Exception as error:
        raise StoreError(f"cannot push to the hub's {repo_id}: {first_line(error)}") from error
    return str(url)


def _names(folder: Path) -> list[str]:
    """The files to upload, which are whole."""
    from .loading import check_files, read_config

    if not folder.is_dir():
        raise StoreError(f"there is no folder {str(folder)!r}, expected one that comcat.save wrote, or a model")
    config = own_config(folder) if (folder / STOCK_CONFIG).is_file() else None
    if config is None:
        config = read_config(folder)
        check_files(folder, config)
    return [name for name in config["sha256"] if (folder / name).is_file()]
