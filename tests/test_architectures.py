"""Which models of transformers can be trained packed: right, or refused before any work."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    CodeGenConfig,
    CodeGenForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from byte_model import byte_tokenizer
from scripted import writer_config
from selfdev.errors import UserError
from selfdev.factory.adapter import with_new_adapter
from selfdev.factory.factory import LocalFactory
from selfdev.factory.imitation import Lesson, imitate
from selfdev.factory.packing import check_training, completion_log_probs
from selfdev.factory.taught import Taught
from selfdev.runs import run

PROMPT = (1, 2, 3, 4, 5)
COMPLETIONS = ((6, 7, 8), (9,), (10, 11, 12, 13))

SIZES = {
    "vocab_size": 257,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 2048,
    "initializer_range": 0.3,
    "eos_token_id": 0,
    "bos_token_id": None,
    "pad_token_id": 0,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
OLD = {
    "vocab_size": 257,
    "n_layer": 2,
    "n_head": 4,
    "n_embd": 32,
    "n_positions": 2048,
    "initializer_range": 0.3,
    "eos_token_id": 0,
    "bos_token_id": None,
}
GEMMA2 = {**GROUPED, "head_dim": 8}

RIGHT: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**GROUPED)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**GROUPED)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**GROUPED)),
    "gpt-neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**OLD)),
    # Their output layer has a bias.
    "phi": lambda: PhiForCausalLM(PhiConfig(**SIZES)),
    "gpt-j": lambda: GPTJForCausalLM(GPTJConfig(**OLD, rotary_dim=4)),
    "codegen": lambda: CodeGenForCausalLM(CodeGenConfig(**OLD, rotary_dim=4)),
    # Their logits are scaled.
    "granite": lambda: GraniteForCausalLM(GraniteConfig(**GROUPED, logits_scaling=3.0)),
    "cohere": lambda: CohereForCausalLM(CohereConfig(**GROUPED, logit_scale=0.3)),
}
REFUSED: dict[str, Callable[[], PreTrainedModel]] = {
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**GEMMA2)),
    # One of its two caps alone.
    "gemma2 that caps scores": lambda: Gemma2ForCausalLM(
        Gemma2Config(**GEMMA2, attn_logit_softcapping=0.5, final_logit_softcapping=None)
    ),
    "gemma2 that caps logits": lambda: Gemma2ForCausalLM(
        Gemma2Config(**GEMMA2, attn_logit_softcapping=None, final_logit_softcapping=1.0)
    ),
    "bloom": lambda: BloomForCausalLM(
        BloomConfig(vocab_size=257, n_layer=2, n_head=4, hidden_size=32, initializer_range=0.3)
    ),
    "mamba": lambda: MambaForCausalLM(
        MambaConfig(vocab_size=257, hidden_size=32, num_hidden_layers=2, state_size=8)
    ),
}


def random_model(make: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    """Its biases, which begin at 0, are random too."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make().eval()
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if name.endswith("bias"):
                    weight.normal_(std=0.5)
    return model


def plain(model: PreTrainedModel) -> torch.Tensor:
    found = []
    for completion in COMPLETIONS:
        ids = torch.tensor([[*PROMPT, *completion]])
        log_probs = model(ids).logits[0, len(PROMPT) - 1 : -1].log_softmax(-1)
        found.append(log_probs.gather(-1, torch.tensor(completion)[:, None])[:, 0])
    return torch.cat(found)


@pytest.mark.parametrize("name", RIGHT)
def test_packed_log_probs_and_gradients_are_those_of_plain_logits(name: str) -> None:
    model = random_model(RIGHT[name])
    check_training(model)
    packed = torch.cat(completion_log_probs(model, PROMPT, COMPLETIONS))
    torch.testing.assert_close(packed, plain(model), atol=1e-4, rtol=1e-4)
    names, weights = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(packed.pow(2).sum(), weights)
    expected = torch.autograd.grad(plain(model).pow(2).sum(), weights)
    for each, its, theirs in zip(names, found, expected, strict=True):
        torch.testing.assert_close(its, theirs, atol=2e-3, rtol=2e-3, msg=each)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_trained_is_refused_with_the_way_out(name: str) -> None:
    model = random_model(REFUSED[name])
    with pytest.raises(UserError, match=rf"\({name.split()[0]}\).*refinement\.backend: trl.*refit: never"):
        check_training(model)


def test_narrow_weights_can_be_trained_too() -> None:
    for name in ("llama", "phi", "granite"):
        check_training(random_model(RIGHT[name]).bfloat16())


def test_dropout_is_left_out_of_training() -> None:
    """It would make what is learned depend on the global random stream."""
    learned = []
    for seed in range(2):
        model = with_new_adapter(random_model(RIGHT["gpt2"]), rank=4, seed=0)
        torch.manual_seed(seed)
        imitate(model, [Lesson(PROMPT, COMPLETIONS)] * 2, 1e-2)
        learned.append([weight for weight in model.parameters() if weight.requires_grad])
    assert all(torch.equal(one, other) for one, other in zip(*learned, strict=True))


@pytest.fixture(scope="module")
def gemma2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gemma2") / "model"
    random_model(REFUSED["gemma2"]).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def factory_of(folder: Path, **refinement: object) -> LocalFactory:
    config = writer_config(folder)
    settings = type(config.refinement)(**{**config.refinement.model_dump(), **refinement})
    return LocalFactory(config.model_copy(update={"refinement": settings, "programs": 2}))


def test_a_run_that_would_be_trained_wrongly_ends_before_it_begins(gemma2: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Gemma2ForCausalLM"):
        run(writer_config(gemma2), tmp_path / "run")
    assert not (tmp_path / "run" / "archive.db").exists()
    with pytest.raises(UserError, match=r"refinement\.imitation\.passes: 0"):
        factory_of(gemma2, backend="trl", imitation={"passes": 1}).prepare(lambda *_: None)
    factory_of(gemma2, refit="never").prepare(lambda *_: None)


def test_a_warm_start_is_not_made_wrongly(
    gemma2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SELFDEV_CACHE", str(tmp_path))
    config = factory_of(gemma2, refit="never").config
    warm = type(config.factory)(
        **config.factory.model_dump() | {"warm_start": {"steps": 1, "rank": 2, "targets": 2}}
    )
    with pytest.raises(UserError, match=r"factory\.warm_start\.steps: 0"):
        LocalFactory(config.model_copy(update={"factory": warm})).prepare(lambda *_: None)
    assert not any((tmp_path).rglob("*.safetensors"))


def test_a_model_that_sees_less_than_the_prompt_samples_by_its_own_attention(tmp_path: Path) -> None:
    model = random_model(lambda: MistralForCausalLM(MistralConfig(**GROUPED, sliding_window=16)))
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"16 tokens back \(sliding_window\).*refinement\.backend: trl"):
        factory_of(tmp_path)
    factory = factory_of(tmp_path, refit="never")
    [prompt] = factory.prompts(0)
    tokens = prompt.tokens(factory.tokenizer)
    samples = factory.write([(0, prompt), (1, prompt)], 0, 1.0, [], lambda *_: None)
    for sample in samples:
        ids = torch.tensor([[*tokens, *sample.tokens]])
        log_probs = model(ids).logits[0, len(tokens) - 1 : -1].log_softmax(-1)
        expected = log_probs.gather(-1, torch.tensor(sample.tokens)[:, None]).sum().item()
        assert sample.log_prob == pytest.approx(expected, rel=1e-4)


def test_trl_trains_it_by_the_models_own_logits(gemma2: Path, tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="TRL is not installed; pip install 'selfdev[trl]'")
    factory = factory_of(gemma2, backend="trl", epochs=1, learning_rate=1e-3)
    factory.prepare(lambda *_: None)
    [prompt] = factory.prompts(0)
    chosen, rejected = factory.tokens("a(deltas):\n"), factory.tokens("b(deltas):\n")
    facts = factory.refine(Taught([(prompt, chosen, rejected)]), 0, [], tmp_path / "adapter", lambda *_: None)
    assert facts["tokens_a_pass"] is None
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
