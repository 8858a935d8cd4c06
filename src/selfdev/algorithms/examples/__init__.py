"""Short worked examples of merging algorithms, one function `merge_NAME(deltas)` a file.

A small factory's prompt draws its examples from here, and its warm start trains on them. Each takes a
float32 tensor of shape (experts, *parameter), the task vectors, and returns the merged one, of shape (*parameter).
They are read as text, in the untyped style that a small model can write: some clean each task vector,
some weight the experts, some rescale, some do several of these.
"""

from importlib import resources


def examples() -> dict[str, str]:
    """Return the source of every example under its name (without `merge_`), sorted by name.

    The text starts at `def merge_`; the import of torch above it in the file is left out.
    """
    files = [entry for entry in resources.files(__name__).iterdir() if entry.name.endswith(".py")]
    sources = {
        file.name.removesuffix(".py"): file.read_text(encoding="utf-8")
        for file in files
        if file.name != "__init__.py"
    }
    return {name: source[source.index("def merge_") :] for name, source in sorted(sources.items())}
