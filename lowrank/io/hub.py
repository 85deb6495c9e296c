"""Files of models and adapters on the Hugging Face hub, through huggingface_hub and its cache."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from lowrank.errors import ConfigError, FileFormatError, MissingPackageError

from .json_files import read_json
from .shards import INDEX, SINGLE, files_of, refusal_of_pickles


def is_repo_id(source: str) -> bool:
    """Whether `source` reads as the name of a repository, `owner/name`."""
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", source))


def fetch_model(repo: str, revision: str | None = None, token: str | None = None) -> Path:
    """A local directory with the repository's config and safetensors, and nothing else of it."""
    directory = _fetch(repo, "config.json", revision, token).parent
    _fetch_if_there(repo, "generation_config.json", revision, token)
    index = _fetch_if_there(repo, INDEX, revision, token)
    if index is not None:
        for filename in files_of(read_json(index), index):
            _fetch(repo, filename, revision, token)
    else:
        _fetch_single(repo, revision, token)
    return directory


def fetch_tokenizer(repo: str, revision: str | None = None, token: str | None = None) -> Path:
    """A local directory with the repository's tokenizer files."""
    path = _fetch(repo, "tokenizer.json", revision, token)
    for name in ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        _fetch_if_there(repo, name, revision, token)
    return path.parent


def fetch_files(
    repo: str, filenames: Iterable[str], revision: str | None = None, token: str | None = None
) -> Path:
    """A local directory with just these files of the repository, which has them all."""
    return [_fetch(repo, filename, revision, token) for filename in filenames][0].parent


def push_folder(
    folder: str | Path,
    repo: str,
    message: str,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> str:
    """Upload the files of a folder in one commit, into a repository made if need be; its address.

    Raises ConfigError if the hub refuses or cannot be reached.
    """
    try:
        from huggingface_hub import HfApi
        from huggingface_hub import errors as hub
    except ImportError as error:
        raise MissingPackageError(
            "the hub needs huggingface_hub: pip install huggingface_hub"
        ) from error
    api = HfApi(token=token)
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo, folder_path=str(folder), commit_message=message, revision=revision
        )
    except hub.HFValidationError as error:
        raise ConfigError(f"{repo}: no name of a hub repository: {error}") from error
    except hub.RevisionNotFoundError as error:
        raise ConfigError(f"{repo}: no revision {revision!r}; make that branch first") from error
    except (hub.HfHubHTTPError, hub.LocalTokenNotFoundError) as error:
        said = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"{repo}: the hub refuses: {said}; log in with `hf auth login`, or pass token="
        ) from error
    except OSError as error:
        raise ConfigError(f"{repo}: the hub cannot be reached: {error}") from error
    return commit.commit_url


class _NotInCache(ConfigError):
    """The hub cannot be reached, and the file is not in the cache."""


def _fetch(repo: str, filename: str, revision: str | None, token: str | None) -> Path:
    try:
        from huggingface_hub import errors as hub
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise MissingPackageError(
            "the hub needs huggingface_hub: pip install huggingface_hub"
        ) from error
    try:
        return Path(hf_hub_download(repo, filename, revision=revision, token=token))
    except hub.GatedRepoError as error:
        raise ConfigError(
            f"{repo}: access must be granted first; ask on its page, pass token="
        ) from error
    except hub.RepositoryNotFoundError as error:
        raise ConfigError(
            f"{repo}: no such repository on the hub, or a private one without token="
        ) from error
    except hub.RevisionNotFoundError as error:
        raise ConfigError(f"{repo}: no revision {revision!r}") from error
    except hub.LocalEntryNotFoundError as error:
        raise _NotInCache(
            f"{repo}: {filename} is not in the cache, and the hub cannot be reached"
        ) from error
    except hub.HFValidationError as error:
        raise ConfigError(f"{repo}: no name of a hub repository: {error}") from error
    except hub.EntryNotFoundError as error:
        raise FileFormatError(f"{repo}: the repository has no {filename}") from error


def _fetch_if_there(
    repo: str, filename: str, revision: str | None, token: str | None
) -> Path | None:
    try:
        return _fetch(repo, filename, revision, token)
    except (FileFormatError, _NotInCache):
        return None  # offline, what the repository lacks is not in the cache either


def _fetch_single(repo: str, revision: str | None, token: str | None) -> None:
    from huggingface_hub import file_exists

    try:
        _fetch(repo, SINGLE, revision, token)
    except FileFormatError as error:
        for name in ("pytorch_model.bin", "pytorch_model.bin.index.json"):
            if file_exists(repo, name, revision=revision, token=token):
                raise FileFormatError(refusal_of_pickles(f"{repo}/{name}")) from error
        raise FileFormatError(
            f"{repo}: expected {SINGLE} or {INDEX}; the repository has neither"
        ) from error
