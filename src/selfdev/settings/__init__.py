"""The sections of a config. Every field has a unit or a range, and a reader; an unknown key is an error."""

from selfdev.settings.learning import Preferences, RefinementSettings
from selfdev.settings.scoring import Jail, Merge, Race, Scaling, TaskSettings, Verdict
from selfdev.settings.section import Section
from selfdev.settings.writing import ENDPOINT_MODEL, LIMITS, Endpoint, Factory, PromptSettings

__all__ = [
    "ENDPOINT_MODEL",
    "LIMITS",
    "Endpoint",
    "Factory",
    "Jail",
    "Merge",
    "Preferences",
    "PromptSettings",
    "Race",
    "RefinementSettings",
    "Scaling",
    "Section",
    "TaskSettings",
    "Verdict",
]
