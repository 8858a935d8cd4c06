"""Sampling programs from a causal language model, in process.

What a candidate is depends on its own random stream and on its place in a batch whose composition is a
function of the index alone, never on timing.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from selfdev.errors import UserError
from selfdev.models.limits import context_limit, end_tokens
from selfdev.models.shared_prefix import LayerCache, SharedPrefix, attending

CONSIDERED = 512
"""Only this many most likely tokens can be drawn: beyond top-p of them lies noise, and sorting costs."""


@dataclass(frozen=True)
class Sample:
    """What the factory wrote.

    Attributes:
        tokens: the sampled ids, the stopping token included.
        text: the tokens decoded, without special tokens.
        log_prob: log-probability of the tokens at temperature 1, in nats.
        finished: False if the limit on new tokens ended it.
    """

    tokens: tuple[int, ...]
    text: str
    log_prob: float
    finished: bool


@dataclass(frozen=True)
class Sampler:
    """How programs are drawn.

    Attributes:
        temperature: above 0.
        top_p: in (0, 1]: the smallest set of tokens with at least this probability is drawn from.
        max_new_tokens: where a program that does not end is cut.
        stop: a pattern; sampling of a row ends when it is found in what was written.
    """

    temperature: float
    top_p: float
    max_new_tokens: int
    stop: re.Pattern[str]

    @torch.inference_mode()
    def __call__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[Sequence[int]],
        rows: Sequence[Sequence[int]],
        tick: Callable[[int, int], None] = lambda finished, tokens: None,
    ) -> list[list[Sample]]:
        """Write one batch.

        Args:
            model: a causal language model, in evaluation mode.
            tokenizer: its tokenizer.
            prompts: token ids of each prompt.
            rows: for each prompt, the random seed of every row that continues it.
            tick: called now and then with the rows finished and the tokens written.

        Returns:
            For each prompt, its rows' samples in order.

        Raises:
            UserError: prompt and continuation do not fit the model's context.
        """
        check_context(model.config, max(map(len, prompts)) + self.max_new_tokens)
        seeds = [seed for group in rows for seed in group]
        uniform = torch.stack([_uniform(seed, self.max_new_tokens) for seed in seeds]).to(model.device)
        position = torch.tensor(
            [len(p) for p, group in zip(prompts, rows, strict=True) for _ in group], device=model.device
        )
        prefilled = [_prefill(model, prompt) for prompt in prompts]
        logits = torch.cat([last.expand(len(g), -1) for (_, last), g in zip(prefilled, rows, strict=True)])
        shared = SharedPrefix([cache for cache, _ in prefilled], [len(g) for g in rows], self.max_new_tokens)
        written = [_Row() for _ in seeds]
        alive = torch.arange(len(seeds))
        pieces = _Pieces(tokenizer)
        ends = end_tokens(model, tokenizer)
        tokens = 0
        with attending(model):
            for step in range(self.max_new_tokens):
                chosen, log_prob = self._draw(logits, uniform[alive.to(uniform.device), step])
                going = []
                for place, (row, token, lp) in enumerate(
                    zip(alive.tolist(), chosen.tolist(), log_prob.tolist(), strict=True)
                ):
                    written[row].add(token, lp, pieces[token])
                    if token in ends or self.stop.search(written[row].text):
                        written[row].finished = True
                    else:
                        going.append(place)
                tokens += len(alive)
                tick(len(seeds) - len(going), tokens)
                if not going or step + 1 == self.max_new_tokens:
                    break
                if len(going) < len(alive):
                    kept = torch.tensor(going)
                    shared.keep(kept)
                    alive, chosen, position = alive[kept], chosen[kept], position[kept]
                logits = model(
                    chosen[:, None], position_ids=position[:, None], use_cache=False, shared_prefix=shared
                ).logits[:, -1]
                shared.advance(1)
                position = position + 1
        finished = iter([row.sample(tokenizer) for row in written])
        return [[next(finished) for _ in group] for group in rows]

    def _draw(self, logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Returns one token id a row and its log-probability at temperature 1, both shape (rows,)."""
        top, ids = logits.float().topk(min(CONSIDERED, logits.shape[-1]), dim=-1)
        probability = torch.softmax(top / self.temperature, -1)
        below = probability.cumsum(-1) - probability
        probability = probability * (below < self.top_p)
        cumulative = probability.cumsum(-1)
        # Inverse transform: one uniform number a token, from the candidate's own stream.
        place = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)
        place = place.clamp(max=top.shape[-1] - 1)
        log_prob = top.gather(-1, place)[:, 0] - logits.float().logsumexp(-1)
        return ids.gather(-1, place)[:, 0], log_prob


class _Row:
    """What one row has written so far."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.log_prob = 0.0
        self.text = ""
        self.finished = False

    def add(self, token: int, log_prob: float, piece: str) -> None:
        self.tokens.append(token)
        self.log_prob += log_prob
        self.text += piece

    def sample(self, tokenizer: PreTrainedTokenizerBase) -> Sample:
        text = tokenizer.decode(self.tokens, skip_special_tokens=True)
        return Sample(tuple(self.tokens), text, self.log_prob, self.finished)


class _Pieces(dict[int, str]):
    """Text of each token, decoded once: the stop pattern needs no decoding of whole texts."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer

    def __missing__(self, token: int) -> str:
        self[token] = piece = str(self.tokenizer.decode([token]))
        return piece


def _uniform(seed: int, count: int) -> Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed))


def _prefill(model: PreTrainedModel, prompt: Sequence[int]) -> tuple[list[LayerCache], Tensor]:
    """Returns the prompt's keys and values, layer by layer, and the logits after its last token."""
    ids = torch.tensor([list(prompt)], device=model.device)
    out = model(ids, use_cache=True, logits_to_keep=1)
    return [(layer.keys[0], layer.values[0]) for layer in out.past_key_values.layers], out.logits[:, -1]


def check_context(config: PreTrainedConfig, tokens: int) -> None:
    """Raise UserError unless a model of this config can hold so many tokens."""
    limit = context_limit(config)
    if limit is not None and tokens > limit[1]:
        raise UserError(
            f"the factory's prompt and {limit[0]} do not fit: prompt and continuation need {tokens} tokens "
            f"and the model has {limit[1]}; use fewer examples or a smaller factory.max_new_tokens"
        )
