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
    hub = _Repository(repo, revision, token)
    directory = hub.fetch("config.json").parent
    hub.fetch_if_there("generation_config.json")
    index = hub.fetch_if_there(INDEX)
    if index is not None:
        for filename in files_of(read_json(index), index):
            hub.fetch(filename)
    else:
        _fetch_single(hub)
    return directory


def fetch_tokenizer(repo: str, revision: str | None = None, token: str | None = None) -> Path:
    """A local directory with the repository's tokenizer files."""
    hub = _Repository(repo, revision, token)
    path = hub.fetch("tokenizer.json")
    for name in ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        hub.fetch_if_there(name)
    return path.parent


def fetch_files(
    repo: str, filenames: Iterable[str], revision: str | None = None, token: str | None = None
) -> Path:
    """A local directory with just these files of the repository, which has them all."""
    hub = _Repository(repo, revision, token)
    return [hub.fetch(filename) for filename in filenames][0].parent


def fetch_first(
    repo: str, filenames: Iterable[str], revision: str | None = None, token: str | None = None
) -> Path | None:
    """The first of these files that the repository has; None if it has none of them."""
    hub = _Repository(repo, revision, token)
    found = (hub.fetch_if_there(filename) for filename in filenames)
    path = next((path for path in found if path is not None), None)
    if path is None and hub.away is not None:
        raise hub.away
    return path


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


class _Repository:
    """One on the hub; after it could not be reached once, what the cache has of it.

    `away`: the first error of that kind, else None.
    """

    def __init__(self, repo: str, revision: str | None, token: str | None) -> None:
        self.repo, self.revision, self.token = repo, revision, token
        self.away: _NotInCache | None = None

    def fetch(self, filename: str) -> Path:
        """The file, in the cache. ConfigError, or FileFormatError if the repository lacks it."""
        try:
            from huggingface_hub import errors as hub
            from huggingface_hub import hf_hub_download
        except ImportError as error:
            raise MissingPackageError(
                "the hub needs huggingface_hub: pip install huggingface_hub"
            ) from error
        repo, revision = self.repo, self.revision
        try:
            path = hf_hub_download(
                repo,
                filename,
                revision=revision,
                token=self.token,
                local_files_only=self.away is not None,
            )
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
            lost = _NotInCache(
                f"{repo}: {filename} is not in the cache, and the hub {_why_not_reached(error)}"
            )
            self.away = self.away or lost
            raise lost from error
        except hub.HFValidationError as error:
            raise ConfigError(f"{repo}: no name of a hub repository: {error}") from error
        except hub.EntryNotFoundError as error:
            raise FileFormatError(f"{repo}: the repository has no {filename}") from error
        except Exception as error:  # of the transport, whose types change with versions, or a disk
            raise ConfigError(
                f"{repo}: {filename} cannot be fetched: {_words(error)}; try again: what is "
                "complete is kept"
            ) from error
        return Path(path)

    def fetch_if_there(self, filename: str) -> Path | None:
        """None if the repository lacks it or, where that is away, the cache."""
        try:
            return self.fetch(filename)
        except (FileFormatError, _NotInCache):
            return None


def _why_not_reached(error: Exception) -> str:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "is not asked: HF_HUB_OFFLINE is set; unset it once to fetch the file"
    cause = f" ({_words(error.__cause__)})" if error.__cause__ else ""
    return f"cannot be reached{cause}; see to the connection, or pass a local directory"


def _words(error: BaseException) -> str:
    """In one line."""
    return " ".join(str(error).split()) or type(error).__name__


def _fetch_single(hub: _Repository) -> None:
    from huggingface_hub import file_exists

    repo = hub.repo
    try:
        hub.fetch(SINGLE)
    except FileFormatError as error:
        for name in ("pytorch_model.bin", "pytorch_model.bin.index.json"):
            if file_exists(repo, name, revision=hub.revision, token=hub.token):
                raise FileFormatError(refusal_of_pickles(f"{repo}/{name}")) from error
        raise FileFormatError(
            f"{repo}: expected {SINGLE} or {INDEX}; the repository has neither"
        ) from error
