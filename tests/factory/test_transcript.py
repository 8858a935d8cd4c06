"""Where a program ends in a server's answer, and which tokens it is."""

from tokenizers import Tokenizer, decoders
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from byte_model import byte_tokenizer
from selfdev.algorithms.source import Form
from selfdev.factory.journal import Answer
from selfdev.factory.prompt import STOP
from selfdev.factory.transcript import to_sample

SHORT = STOP[Form.SHORT]
PROGRAM = "a(deltas):\n    return deltas[0]\n"
BYTES = byte_tokenizer()


def ids(text: str) -> tuple[int, ...]:
    return tuple(BYTES(text).input_ids)


def test_the_servers_tokens_are_kept_up_to_the_one_that_ends_the_function() -> None:
    written = ids(PROGRAM + "\n\ndef b(deltas):")
    answer = Answer(text="", finished=False, tokens=written, log_probs=(-0.25,) * len(written))
    sample = to_sample(answer, BYTES, SHORT, 100)
    assert sample.tokens == ids(PROGRAM + "\n\n")
    assert sample.text == PROGRAM + "\n\n"
    assert sample.log_probs == (-0.25,) * len(sample.tokens)
    assert sample.log_prob == -0.25 * len(sample.tokens)
    assert sample.finished


def test_a_space_at_a_lines_begin_does_not_end_the_function() -> None:
    """Tokenizers in the manner of SentencePiece drop it where they decode a word alone."""
    words = Tokenizer(WordLevel({"<unk>": 0, "\n": 1, "▁return": 2, "x": 3}, unk_token="<unk>"))
    words.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    sample = to_sample(Answer(text="", finished=True, tokens=(1, 2, 1, 3)), tokenizer, SHORT, 100)
    assert sample.tokens == (1, 2, 1, 3)


def test_an_unfinished_program_keeps_all_its_tokens() -> None:
    answer = Answer(text="", finished=False, tokens=ids(PROGRAM[:9]))
    sample = to_sample(answer, BYTES, SHORT, 100)
    assert (sample.tokens, sample.finished, sample.log_prob) == (ids(PROGRAM[:9]), False, None)


def test_a_text_is_tokenised_with_the_end_that_the_server_left_out() -> None:
    sample = to_sample(Answer(text=PROGRAM, finished=True), BYTES, SHORT, 100)
    assert sample.tokens == ids(PROGRAM + "\n\n")
    assert sample.text == PROGRAM
    unfinished = to_sample(Answer(text=PROGRAM[:9], finished=False), BYTES, SHORT, 100)
    assert (unfinished.tokens, unfinished.finished) == (ids(PROGRAM[:9]), False)


def test_a_text_that_goes_on_is_cut_where_the_function_ends() -> None:
    sample = to_sample(Answer(text=PROGRAM + "\n\n\nprint()", finished=False), BYTES, SHORT, 100)
    assert sample.text == PROGRAM + "\n\n"
    assert sample.tokens == ids(PROGRAM + "\n\n")
    assert sample.finished


def test_a_message_ends_with_the_end_token() -> None:
    sample = to_sample(Answer(text="```python\n```", finished=True), BYTES, None, 100)
    assert sample.tokens == (*ids("```python\n```"), 0)
    told = to_sample(Answer(text="said", finished=True, tokens=(*ids("thought, said"), 0)), BYTES, None, 100)
    assert (told.text, told.tokens) == ("said", (*ids("thought, said"), 0))


def test_a_server_that_heeds_no_limit_is_cut() -> None:
    told = to_sample(Answer(text="", finished=True, tokens=ids("a" * 50)), BYTES, SHORT, 20)
    assert (len(told.tokens), told.finished) == (20, False)
    untold = to_sample(Answer(text="a" * 50, finished=True), BYTES, SHORT, 20)
    assert (len(untold.tokens), untold.finished) == (20, False)
    closed = to_sample(Answer(text="a" * 10_000, finished=False), None, SHORT, 20)
    assert len(closed.text) == 20 * 64


def test_without_a_tokenizer_there_are_no_tokens() -> None:
    sample = to_sample(Answer(text=PROGRAM, finished=True, tokens=(1, 2)), None, SHORT, 100)
    assert (sample.tokens, sample.text, sample.log_prob) == ((), PROGRAM, None)
