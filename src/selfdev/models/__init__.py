"""Where models come from, and how their folders are loaded."""
