"""Every setting declares itself in full, is refused in one form, and stands on the generated pages."""

import re

import pytest

from cluster.config.setting_names import DECLARED, declared_settings
from cluster.config.settings import Settings
from docs import reference
from indexing.declare import check_values, differences, is_point, looked_at, section, setting, values_of


@pytest.mark.parametrize("name", DECLARED)
def test_a_meaning_is_a_sentence_and_a_default_is_allowed(name: str) -> None:
    default, declared = DECLARED[name]
    assert re.fullmatch(r"[A-Z].*\.", declared.meaning), declared.meaning
    assert not declared.refusal(default)
    if isinstance(default, (int, float)) and not isinstance(default, bool):
        assert declared.choices or declared.holds or declared.least is not None or declared.above is not None
        assert declared.unit or declared.choices or name.endswith("seed")


def test_sections_are_described() -> None:
    for _, entry in sorted(vars(Settings()).items()):
        assert re.match(r"[A-Z].*\.", type(entry).__doc__ or "", re.DOTALL)


def test_pages_are_not_stale() -> None:
    assert reference.main(["--check"]) == 0
    assert len(declared_settings()) == len(DECLARED)


@pytest.mark.parametrize(
    ("declared", "value", "expected"),
    [
        ({"least": 1}, 0, "must be at least 1"),
        ({"above": 0}, 0.0, "must be above 0"),
        ({"least": 0, "most": 1}, 1.5, "must be between 0 and 1"),
        ({"least": 0, "below": 1}, 1.0, "must be at least 0 and below 1"),
        ({"above": 0, "most": 0.5}, 0.6, "must be above 0 and at most 0.5"),
        ({}, -1, "must not be negative"),
        ({}, float("inf"), "must be a finite number"),
        ({"choices": (0, 1, 2)}, 3, "must be 0, 1 or 2"),
        ({"holds": lambda number: number % 2 == 0, "allowed": "even"}, 3, "must be even"),
        ({"least": 1}, 1, ""),
    ],
)
def test_numbers(declared: dict, value: float, expected: str) -> None:
    field = setting(1, "Number of things.", **declared)
    assert field.metadata["declaration"].refusal(value) == expected  # pyright: ignore[reportAttributeAccessIssue]


def test_texts_lists_and_nothing() -> None:
    declared = setting("a", "Letter.", choices=("apple", "pear")).metadata["declaration"]  # pyright: ignore
    assert declared.refusal("aple") == "must be one of apple, pear. Did you mean apple?"
    assert declared.refusal(["pear", "plum"]) == "must be one of apple, pear."
    assert declared.refusal(None) == ""


def test_values_are_checked_by_their_dotted_name() -> None:
    settings = Settings()
    settings.encoder.lora.alpha = 0.0
    with pytest.raises(ValueError, match=r"^encoder\.lora\.alpha=0\.0: must be above 0$"):
        check_values(settings)
    settings.encoder.lora.alpha = 1.0
    settings.evaluation.also = ["fused", "both"]
    with pytest.raises(ValueError, match=r"^evaluation\.also=both: must be one of marginal, fused"):
        check_values(settings)
    assert values_of(settings.encoder.lora)["alpha"] == 1.0
    assert differences(settings, Settings()) == {
        "encoder": {"lora": {"alpha": 1.0}},
        "evaluation": {"also": ["fused", "both"]},
    }


def test_defaults_are_not_shared() -> None:
    first, second = Settings(), Settings()
    first.questions.labels.append("MAYBE")
    first.retrieval.where["lang"] = "en"
    assert second == Settings()
    assert section(dict).default_factory is dict  # pyright: ignore[reportAttributeAccessIssue]


def test_points_in_time_and_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [is_point(text) for text in ("", "end", "2024-02-29", "2024-02-30", "24-1-1", "now")] == [True] * 3 + [
        False
    ] * 3
    assert looked_at("/a/b") == looked_at("") == ""
    monkeypatch.setenv("HOME", "/home/me")
    assert looked_at("~/a").endswith("since ~ is not replaced: write /home/me/a")
