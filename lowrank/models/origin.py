"""What the name of a model stands for: itself, or the base of the adapter that is there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lowrank.errors import ConfigError
from lowrank.io.adapter import adapter_directory
from lowrank.io.adapter_config import CONFIG_FILE, read_config
from lowrank.io.hub import fetch_first, is_repo_id

MODEL_FILE = "config.json"


@dataclass(frozen=True)
class Origin:
    """model: a directory, a hub repository at `revision`, or a .gguf file; adapter: None, or the
    directory of one to put onto it.
    """

    model: str | Path
    revision: str | None = None
    adapter: Path | None = None


def origin_of(source: str | Path, revision: str | None = None, token: str | None = None) -> Origin:
    """Of a directory or repository with an adapter and no model, the base its config names.

    Raises ConfigError if it names none.
    """
    path = Path(source)
    if path.is_dir():
        is_adapter = (path / CONFIG_FILE).is_file() and not (path / MODEL_FILE).is_file()
    elif not path.exists() and is_repo_id(str(source)):
        found = fetch_first(str(source), (MODEL_FILE, CONFIG_FILE), revision, token)
        is_adapter = found is not None and found.name == CONFIG_FILE
    else:
        is_adapter = False
    if not is_adapter:
        return Origin(source, revision)
    directory = adapter_directory(source, None, revision, token)
    config = read_config(directory / CONFIG_FILE)
    if not config.base_model_name_or_path:
        raise ConfigError(
            f"{source}: {CONFIG_FILE} names no base_model_name_or_path; load the base, and put the "
            "adapter onto it with lowrank.load_adapter(model, path)"
        )
    return Origin(config.base_model_name_or_path, config.revision, directory)
