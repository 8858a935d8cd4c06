"""Data sets on the Hugging Face Hub, as parquet files in the Hub's own cache."""

from collections.abc import Iterable
from pathlib import Path

from selfdev.errors import UserError
from selfdev.evaluation.tasks.declaration import Hub


def fetch(hub: Hub, roles: Iterable[str]) -> dict[str, tuple[Path, ...]]:
    """Fetch the files of a data set, unless the cache has them.

    Args:
        hub: the data set, and what its files' names begin with.
        roles: which of the fields of `hub` that name files are wanted.

    Returns:
        The files of each role, in the order of their names.

    Raises:
        UserError: the data set cannot be fetched, or has no such file.
    """
    # Late: the Hub's client takes a moment to import, and most tasks do without it.
    from huggingface_hub import snapshot_download

    patterns = {role: f"{getattr(hub, role)}*.parquet" for role in roles}
    try:
        folder = Path(
            snapshot_download(hub.dataset, repo_type="dataset", allow_patterns=sorted(set(patterns.values())))
        )
    # The client raises errors of its own, of the operating system and of the HTTP library it is built on.
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(
            f"the data set '{hub.dataset}' is not in the Hub's cache and cannot be fetched: {reason}; connect once, "
            "or name the folder that holds its files, such as gsm8k:data/gsm8k"
        ) from error
    files = {role: tuple(sorted(folder.glob(pattern))) for role, pattern in patterns.items()}
    for role, found in files.items():
        if not found:
            raise UserError(
                f"the data set '{hub.dataset}' has no file {patterns[role]}; name a folder of JSON lines instead, "
                "such as gsm8k:data/gsm8k"
            )
    return files
