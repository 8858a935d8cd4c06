"""From a server's answer to a sample: where the program ends, and which tokens it is.

The archived answer is never changed by this; what is read of it is a function of the answer alone.
"""

import re

from transformers import PreTrainedTokenizerBase

from selfdev.factory.journal import Answer
from selfdev.factory.sampling import Ending, Sample

END_STRINGS = ("\n\n\n", "\ndef ", "\nclass ", "\n#")
"""Where a server may stop a program of the short form: four strings at most, so not all of its ends."""

_LONGEST_TOKEN = 64
"""Characters a token, at most, where nobody counts: a server that heeds no limit is cut there."""


def to_sample(
    answer: Answer, tokenizer: PreTrainedTokenizerBase | None, stop: re.Pattern[str] | None, limit: int
) -> Sample:
    """Read an answer.

    Args:
        answer: what the server wrote.
        tokenizer: of the weights that learn from it; None if nothing does.
        stop: ends a text that is continued where it is found; None for a message, which ends itself.
        limit: on the tokens, which a server may have ignored.

    Returns:
        The sample. Its tokens are those that the server sampled, if it tells them, and else the text's, tokenised once
        and with the end that a finished program has; none without a tokenizer.
    """
    if tokenizer is not None and answer.tokens is not None:
        return _of_tokens(answer, answer.tokens, tokenizer, stop, limit)
    text, finished = answer.text[: limit * _LONGEST_TOKEN], answer.finished
    found = None if stop is None else stop.search(text)
    if found is not None:
        text, finished = text[: found.end()], True
    if tokenizer is None:
        return Sample((), text, None, finished, answer.seconds)
    ended = text
    if finished and found is None and stop is not None:
        ended = text.rstrip("\n") + END_STRINGS[0]  # the server leaves out the string that it stopped at
    tokens = [int(i) for i in tokenizer(ended, add_special_tokens=False).input_ids]
    if finished and stop is None and tokenizer.eos_token_id is not None:
        tokens.append(int(tokenizer.eos_token_id))
    return Sample(tuple(tokens[:limit]), text, None, finished and len(tokens) <= limit, answer.seconds)


def _of_tokens(
    answer: Answer,
    tokens: tuple[int, ...],
    tokenizer: PreTrainedTokenizerBase,
    stop: re.Pattern[str] | None,
    limit: int,
) -> Sample:
    finished = answer.finished and len(tokens) <= limit
    tokens, text = tokens[:limit], ""
    if stop is not None:
        ending = Ending(tokenizer, set(), stop)
        for count, token in enumerate(tokens, start=1):
            text += ending.piece(token)
            if stop.search(text):
                tokens, finished = tokens[:count], True
                break
    # A message's text is the server's own: it leaves out what a reasoning model thought aloud.
    text = answer.text if stop is None else str(tokenizer.decode(list(tokens), skip_special_tokens=True))
    log_probs = None if answer.log_probs is None else answer.log_probs[: len(tokens)]
    return Sample(tokens, text, log_probs, finished, answer.seconds)
