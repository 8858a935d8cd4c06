"""Several LoRA adapters as one, since a server takes one a request.

    W + s1 B1 A1 + s2 B2 A2 = W + [s1 B1, s2 B2] [A1; A2]

The factors stand beside each other, so the sum is exact and the ranks add up.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor

from selfdev.errors import SelfdevError

_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"


def combined_rank(adapters: Sequence[Path]) -> int:
    """The rank of the sum: what a server must be ready for."""
    return sum(int(_config(folder)["r"]) for folder in adapters)


def combine_adapters(adapters: Sequence[Path], out: Path) -> None:
    """Write the sum of adapters of one model as one adapter.

    Args:
        adapters: folders that peft wrote, at least one; all of plain LoRA.
        out: folder to write, which exists and is empty.

    Raises:
        SelfdevError: one of them is more than plain LoRA.
    """
    read = [(_scale(folder), _factors(folder)) for folder in adapters]
    ranks = [int(_config(folder)["r"]) for folder in adapters]
    combined: dict[str, Tensor] = {}
    for module in sorted({module for _, factors in read for module in factors}):
        # A module that one adapter leaves alone gets zeros in its place: one rank for all, as servers want it.
        some_a, some_b = next(factors[module] for _, factors in read if module in factors)
        a = [torch.zeros(rank, some_a.shape[1]) for rank in ranks]
        b = [torch.zeros(some_b.shape[0], rank) for rank in ranks]
        for place, (scale, factors) in enumerate(read):
            if module in factors:
                a[place], b[place] = factors[module][0].float(), scale * factors[module][1].float()
        combined[f"{module}.lora_A.weight"] = torch.cat(a, 0).contiguous()
        combined[f"{module}.lora_B.weight"] = torch.cat(b, 1).contiguous()
    save_file(combined, out / _WEIGHTS, metadata={"format": "pt"})
    LoraConfig(
        r=sum(ranks),
        lora_alpha=sum(ranks),  # a scale of 1: each adapter's own is in its factor B
        target_modules=sorted({name.split(".")[-3] for name in combined}),
        task_type="CAUSAL_LM",
        base_model_name_or_path=_config(adapters[0]).get("base_model_name_or_path"),
        inference_mode=True,
    ).save_pretrained(out)


def _factors(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """A (rank, inputs) and B (outputs, rank) of every module."""
    weights = load_file(folder / _WEIGHTS)
    factors = {}
    for name, a in weights.items():
        module, found, _ = name.partition(".lora_A.weight")
        if found:
            factors[module] = a, weights[f"{module}.lora_B.weight"]
    if 2 * len(factors) != len(weights):
        raise SelfdevError(
            f"adapter '{folder}' holds more than the two factors of LoRA, which cannot be added to others; "
            "train plain LoRA where a server samples"
        )
    return factors


def _scale(folder: Path) -> float:
    config = _config(folder)
    if config.get("rank_pattern") or config.get("alpha_pattern") or config.get("use_dora"):
        raise SelfdevError(
            f"adapter '{folder}' is no plain LoRA of one rank, which is what a server is given"
        )
    rank = float(config["r"])
    return float(config["lora_alpha"]) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / _CONFIG).read_text())
    return config
