"""selfdev: a language model invents algorithms that improve language models."""

__version__ = "0.1.0"
