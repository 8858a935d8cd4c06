"""The algorithm factory: the language model that writes merging algorithms, and how it learns."""
