"""What all sections of a config share."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

Device = Literal["auto", "cpu", "cuda", "mps"]
Dtype = Literal["float32", "bfloat16", "float16"]


class Section(BaseModel):
    """Knows its fields and no others."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
