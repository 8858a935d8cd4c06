"""Which of a model's tensors are merged, and what their names tell."""

import re
from collections.abc import Iterable, Mapping

from selfdev.errors import UserError

# Projections of the MLP as the families of causal models call them. Routers of mixtures, norms and biases are
# not among them.
_MLP = re.compile(
    r"(^|\.)(gate_proj|up_proj|down_proj|gate_up_proj|fc1|fc2|dense_h_to_4h|dense_4h_to_h)\.weight$"
    r"|(^|\.)(mlp|feed_forward)\.(c_fc|c_proj|fc_in|fc_out|w1|w2|w3)\.weight$"
    r"|(^|\.)experts\.(\d+\.)?(w1|w2|w3|gate_up_proj|down_proj)(\.weight)?$"
)
_ATTENTION = re.compile(r"(^|\.)(self_attn|attn|self_attention|attention)\.(.+\.)?\w+\.weight$")

# Computed from the config when a model is built, and masks of attention; old checkpoints carry them all the same.
_DERIVED = re.compile(r"rotary_emb\.inv_freq$|(^|\.)(attn|attention)\.(masked_)?bias$|(^|\.)position_ids$")

_HEAD = re.compile(r"(^|\.)(lm_head|embed_out|output_layer)\.weight$|^output\.weight$")
_EMBEDDING = re.compile(
    r"(^|\.)(embed_tokens|wte|embed_in|word_embeddings|tok_embeddings|embeddings)\.weight$"
)
_VOCABULARY = re.compile(f"{_HEAD.pattern}|{_EMBEDDING.pattern}" + r"|(^|\.)(lm_head|embed_out)\.bias$")

LAYER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")
"""Finds the index of a layer in a parameter's name."""

_SHOWN_NAMES = 6


def select_targets(names_and_shapes: Mapping[str, tuple[int, ...]], targets: str) -> list[str]:
    """The parameters that are merged, in the order given.

    Args:
        names_and_shapes: every tensor of the model.
        targets: `mlp`, the weights of the MLP projections, those of a mixture's experts included;
            `attention`, the weight matrices of attention; `all`; or a regular expression that is searched for
            in the names.

    Raises:
        UserError: nothing is selected, or the expression is none.
    """
    if not targets:
        raise UserError("targets are empty; use mlp, attention, all or a regular expression")
    named = [name for name in names_and_shapes if not _DERIVED.search(name)]
    if targets == "mlp":
        chosen = [name for name in named if _MLP.search(name)]
    elif targets == "attention":
        # Norms of queries and keys lie in the same module and are vectors.
        chosen = [name for name in named if _ATTENTION.search(name) and len(names_and_shapes[name]) >= 2]
    elif targets == "all":
        chosen = named
    else:
        try:
            chosen = [name for name in named if re.search(targets, name)]
        except re.error as error:
            raise UserError(
                f"targets '{targets}' is no regular expression: {error}; "
                "use mlp, attention, all or a valid one"
            ) from None
    if not chosen:
        some = named[:: max(1, len(named) // _SHOWN_NAMES)][:_SHOWN_NAMES]
        raise UserError(
            f"targets '{targets}' selects no parameter; use mlp, attention, all or a regular expression that "
            f"finds some of the model's {len(named)}: {', '.join(some)}"
            + (", ..." if len(some) < len(named) else "")
        )
    return chosen


def selects(targets: str, name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor of that name and shape would be merged."""
    try:
        return bool(select_targets({name: shape}, targets))
    except UserError:
        return False


def pattern_of(targets: str) -> tuple[str, int]:
    """What `select_targets` selects by: a regular expression for names, and the least number of dimensions."""
    known = {"mlp": (_MLP.pattern, 0), "attention": (_ATTENTION.pattern, 2), "all": ("", 0)}
    return known.get(targets, (targets, 0))


def of_vocabulary(name: str) -> bool:
    """Whether the tensor has a row for each token: the embeddings, the output head and its bias."""
    return bool(_VOCABULARY.search(name))


def head_of(names: Iterable[str]) -> str | None:
    """The name of the output head's weights; None if there is none."""
    return next((name for name in names if _HEAD.search(name)), None)


def embeddings_of(names: Iterable[str]) -> str | None:
    """The name of the token embeddings; None if there are none."""
    return next((name for name in names if _EMBEDDING.search(name)), None)


def layer_of(name: str) -> int:
    """The index of the layer that a parameter belongs to, from 0; -1 if it belongs to none."""
    found = LAYER.search(name)
    return int(found[1]) if found else -1


def stack_of(name: str) -> str | None:
    """What stands before the index of a parameter's layer, such as `model.layers`; None if it belongs to none."""
    found = LAYER.search(name)
    return name[: found.start()] if found else None


def count_layers(names: Iterable[str]) -> int:
    """How many layers parameters of these names belong to, counted from the highest index; at least 1."""
    return max(1, 1 + max(map(layer_of, names), default=0))
