"""Prompts of causal models with a system prompt, earlier turns and the tokeniser's own chat template."""

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from indexing.corpus.files.corpus import Question
from tests.training.models.text.test_tokenizers import TEXTS, byte_level
from training.models.build import build_generator
from training.models.generators.causal import CausalBatch
from training.models.text import prompts, token_rows
from training.training_settings import FreshGeneratorConfig, GeneratorConfig

CHATML = (
    "{% for message in messages %}<|start|>{{ message['role'] }}\n{{ message['content'] | trim }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
FRESH = FreshGeneratorConfig(num_decoder_layers=1, hidden=16, num_heads=2, intermediate=16)
EARLIER = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Good day."}]


def chat_tokenizer(template: str | None = CHATML) -> PreTrainedTokenizerFast:
    tokenizer = byte_level(["system user assistant Question: Answer: Be brief. Hello." * 4, *TEXTS])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|start|>"]})
    tokenizer.chat_template = template
    return tokenizer


def prompt(
    tokenizer: PreTrainedTokenizerFast, config: GeneratorConfig, question: Question, passages: list[tuple[str, str]]
) -> list[int]:
    """The tokens that the model reads before it answers."""
    model = build_generator(config, tokenizer)
    pair = prompts.QuestionText(tokenizer, config)("generator", question)
    asked = np.array(token_rows.generator_question_side(tokenizer, config).tokenize([pair])[0])
    rows = [np.array(row) for row in token_rows.generator_passage_side(tokenizer, config, 24).tokenize(passages)]
    batch = model.collate([asked], [rows], None)
    assert isinstance(batch, CausalBatch)
    return batch.joint_ids[0][batch.joint_mask[0]].tolist()


def config_of(**changes: object) -> GeneratorConfig:
    settings = {"kind": "causal", "fresh": FRESH, "passage_template": "{title}: {text}\n", **changes}
    return GeneratorConfig(**settings)  # type: ignore[arg-type]


PASSAGES = [("Trellis", "a town"), ("Lo", "a river")]
READ = "Trellis: a town\nLo: a river\nQuestion: who was born?\nAnswer:"


@pytest.mark.parametrize("system_prompt", ["", "Be brief."])
@pytest.mark.parametrize("earlier", [[], EARLIER, [{"role": "system", "content": "Be exact."}, *EARLIER]])
def test_the_chat_template_is_filled_in_as_the_tokeniser_would(system_prompt, earlier):
    tokenizer = chat_tokenizer()
    question = Question(id="q", text="who was born?", answers=["x"], earlier=earlier)
    default = [{"role": "system", "content": system_prompt}] if system_prompt else []
    messages = [*([] if earlier and earlier[0]["role"] == "system" else default), *earlier]
    text = tokenizer.apply_chat_template(
        [*messages, {"role": "user", "content": READ}], tokenize=False, add_generation_prompt=True
    )
    found = prompt(tokenizer, config_of(system_prompt=system_prompt), question, PASSAGES)
    assert found == tokenizer(str(text), add_special_tokens=False).input_ids
    assert str(tokenizer.decode(found)).endswith("Answer:<|end|>\n<|start|>assistant\n")


@pytest.mark.parametrize("template", [None, "unused"])
def test_without_a_chat_template_the_prompt_is_generator_template(template):
    tokenizer = chat_tokenizer(CHATML if template else None)
    config = config_of(system_prompt="Be brief.", chat_template="never" if template else "auto")
    plain = prompt(tokenizer, config, Question(id="q", text="who was born?", answers=["x"]), PASSAGES)
    assert tokenizer.decode(plain) == f"Be brief.\n\n{READ}"
    chat = prompt(tokenizer, config, Question(id="q", text="who was born?", answers=["x"], earlier=EARLIER), PASSAGES)
    assert tokenizer.decode(chat) == f"Be brief.\n\nUser: Hello.\n\nAssistant: Good day.\n\n{READ}"
    nothing = prompt(
        tokenizer, config_of(chat_template="never"), Question(id="q", text="who was born?", answers=["x"]), PASSAGES
    )
    assert tokenizer.decode(nothing) == READ


def test_a_template_without_system_role_has_it_in_the_first_turn():
    tokenizer = chat_tokenizer(NO_SYSTEM)
    found = prompt(
        tokenizer, config_of(system_prompt="Be brief."), Question(id="q", text="who was born?", answers=["x"]), PASSAGES
    )
    assert tokenizer.decode(found) == f"<|start|>user\nBe brief.\n\n{READ}<|end|>\n<|start|>assistant\n"


def test_long_chats_lose_their_oldest_turns_and_long_system_prompts_are_refused():
    tokenizer = chat_tokenizer()
    turns = [dict(turn, content=f"{turn['content']} {i}") for i in range(20) for turn in EARLIER]
    question = Question(
        id="q", text="who was born?", answers=["x"], earlier=[{"role": "system", "content": "Be brief."}, *turns]
    )
    text = tokenizer.decode(prompt(tokenizer, config_of(max_context_tokens=80), question, PASSAGES))
    assert "Be brief." in text
    assert "Good day. 19" in text
    assert "Hello. 0" not in text
    assert text.count("<|start|>user") == text.count("<|start|>assistant")
    with pytest.raises(ValueError, match=r"generator\.max_context_tokens=3: the system prompt of question 'q'"):
        prompt(tokenizer, config_of(max_context_tokens=3), question, PASSAGES)


def test_a_beginning_that_the_template_writes_is_not_written_twice():
    tokenizer = chat_tokenizer("<|start|>" + CHATML)
    tokenizer.bos_token = "<|start|>"
    found = prompt(tokenizer, config_of(), Question(id="q", text="who was born?", answers=["x"]), PASSAGES)
    start = tokenizer.convert_tokens_to_ids("<|start|>")
    assert isinstance(start, int)
    assert found[:3].count(start) == 2  # of the text and of the turn, as the template says


def test_questions_of_other_generators_keep_their_end():
    tokenizer, config = (
        chat_tokenizer(),
        GeneratorConfig(kind="copy", max_question_tokens=12, system_prompt="Be brief."),
    )
    question = Question(id="q", text="who was born?", answers=["x"], earlier=EARLIER)
    side, text = token_rows.generator_question_side(tokenizer, config), prompts.QuestionText(tokenizer, config)
    row = side.tokenize([text("generator", question)])[0]
    assert len(row) == 12
    assert str(tokenizer.decode(row)).endswith("who was born?")
    assert text("retriever", question) == ("", "who was born?")
