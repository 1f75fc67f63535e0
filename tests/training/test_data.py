"""Batches are pure functions of (seed, number); spans for the warm start come from where they should."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.helpers.tiny_world import TinyWorld
from training.data import ClozeSource, Collator, Stream, gold_first, stream_slice
from training.models.build import build_generator
from training.models.generators.copy_reader import CopyBatch
from training.training_settings import ObjectiveConfig

# ---------------------------------------------------------------- the stream


def test_each_pass_is_a_permutation_of_its_own():
    first, second = stream_slice(17, 0, 17, 5), stream_slice(17, 17, 34, 5)
    assert sorted(first) == sorted(second) == list(range(17))
    assert list(first) != list(second)
    assert list(first) != list(stream_slice(17, 0, 17, 6))


@pytest.mark.parametrize("size", [3, 8, 17, 40])
def test_batches_are_slices_of_the_stream(size):
    stream = Stream(17, size, seed=5)
    together = np.concatenate([stream.batch(number) for number in range(6)])
    assert list(together) == list(stream_slice(17, 0, 6 * size, 5))
    assert max(Counter(together.tolist()).values()) <= -(-6 * size // 17)


def test_a_batch_depends_on_its_number_alone():
    stream = Stream(17, 4, seed=5)
    wanted = [list(stream.batch(number)) for number in range(9)]
    assert [list(Stream(17, 4, seed=5).batch(number)) for number in reversed(range(9))] == wanted[::-1]


def test_one_rank_and_two_ranks_train_on_the_same_questions():
    alone = Stream(23, 8, seed=1)
    pair = [Stream(23, 4, seed=1, rank=rank, world_size=2) for rank in range(2)]
    for number in range(7):
        parts = [stream.batch(number) for stream in pair]
        assert sorted(np.concatenate(parts)) == sorted(alone.batch(number))


def test_accumulating_small_batches_sees_the_same_questions():
    small = Stream(23, 1, seed=1)
    assert [int(small.batch(number)[0]) for number in range(16)] == list(stream_slice(23, 0, 16, 1))


def test_no_question_is_refused():
    with pytest.raises(ValueError, match=r"questions\.train"):
        Stream(0, 4, seed=1)


# ---------------------------------------------------------------- spans


def cloze(world: TinyWorld, batch_size: int = 16, **settings) -> ClozeSource:
    store = world.store()
    config = ObjectiveConfig(**{"name": "inverse_cloze", "drop_probability": 0.0, "title_probability": 0.0, **settings})
    separator = world.tokenizer.sep_token_id
    assert isinstance(separator, int)
    return ClozeSource(store, Stream(len(store), batch_size, seed=2), config=config, separator_id=separator, pad_id=0)


def pairs(source: ClozeSource, numbers: range = range(4)) -> list[tuple[list[int], list[int], list[int]]]:
    """Query, passage and the whole row of the store, as token lists."""
    found = []
    for number in numbers:
        batch = source.batch(number)
        rows = source.tokens.rows(batch.passage_numbers.numpy())
        for i, row in enumerate(rows):
            query = batch.query_ids[i][batch.query_mask[i].bool()].tolist()
            passage = batch.passage_ids[i][batch.passage_token_mask[i].bool()].tolist()
            found.append((query, passage, row.tolist()))
    return found


def place_of(part: list[int], whole: list[int]) -> list[int]:
    return [at for at in range(len(whole) - len(part) + 1) if whole[at : at + len(part)] == part]


def test_a_span_is_cut_out_of_the_text(world):
    source = cloze(world, keep_probability=0.0, min_span=3, max_span=6)
    lengths = set()
    for query, passage, row in pairs(source):
        assert (query[0], query[-1]) == (row[0], row[-1])
        span = query[1:-1]
        lengths.add(len(span))
        title_end = row.index(source.separator_id)
        cut = [at for at in place_of(span, row) if row[:at] + row[at + len(span) :] == passage]
        assert cut, "the passage is the row without the query"
        assert cut[0] > title_end
        assert passage[: title_end + 1] == row[: title_end + 1]
        assert len(passage) > title_end + 2
    assert lengths == {3, 4, 5, 6}


def test_a_kept_span_stays_and_its_share_is_as_asked(world):
    assert all(passage == row for _, passage, row in pairs(cloze(world, keep_probability=1.0)))
    share = np.mean([passage == row for _, passage, row in pairs(cloze(world, keep_probability=0.3), range(40))])
    assert share == pytest.approx(0.3, abs=0.08)


def test_the_passage_is_never_left_without_text(world):
    for _, passage, row in pairs(cloze(world, keep_probability=0.0, min_span=200, max_span=300)):
        assert passage == row  # the span would have been all of it


def test_titles_as_queries_leave_the_passage_whole(world):
    for query, passage, row in pairs(cloze(world, title_probability=1.0)):
        assert query[1:-1] == row[1 : row.index(world.tokenizer.sep_token_id)]
        assert passage == row


def test_dropped_tokens_leave_an_ordered_rest_and_never_nothing(world):
    for query, _, row in pairs(cloze(world, drop_probability=0.5, min_span=4, max_span=8)):
        rest = iter(row)
        assert all(token in rest for token in query)
        assert len(query) > 2
    assert all(len(query) > 2 for query, _, _ in pairs(cloze(world, drop_probability=1.0)))


def test_two_crops_of_one_passage(world):
    source = cloze(world, name="independent_cropping", min_span=4, max_span=7)
    different = 0
    for query, passage, row in pairs(source):
        assert place_of(query[1:-1], row)
        assert place_of(passage[1:-1], row)
        assert 4 <= len(passage) - 2 <= 7
        different += query != passage
    assert different > 50


def test_one_rank_and_two_ranks_cut_the_same_spans(world):
    alone = cloze(world, batch_size=8, title_probability=0.3, keep_probability=0.5)
    both = []
    for rank in range(2):
        part = cloze(world, batch_size=4, title_probability=0.3, keep_probability=0.5)
        part.stream.rank, part.stream.world_size = rank, 2
        both += pairs(part, range(3, 4))
    assert sorted(both) == sorted(pairs(alone, range(3, 4)))


def test_a_passage_twice_in_a_batch_has_one_number(world):
    source = cloze(world, batch_size=200)  # of 180 passages
    batch = source.batch(0)
    assert batch.passage_numbers.dtype == torch.int64
    assert batch.passage_numbers.tolist() == source.stream.batch(0).tolist()
    assert len(set(batch.passage_numbers.tolist())) == 180


def test_batches_of_spans_repeat_exactly(world):
    first, again = cloze(world).batch(3), cloze(world).batch(3)
    other = cloze(world).batch(4)
    assert torch.equal(first.query_ids, again.query_ids)
    assert torch.equal(first.passage_ids, again.passage_ids)
    assert not torch.equal(first.passage_numbers, other.passage_numbers)


# ---------------------------------------------------------------- questions with passages


def collator(world: TinyWorld) -> Collator:
    generator = build_generator(world.generator, world.tokenizer)
    return Collator(world.store(), world.question_store("train"), generator, 0)


def test_rows_of_a_batch_are_those_of_the_stores(world):
    collate = collator(world)
    numbers = np.array([5, 0])
    hits = [np.array([7, 100, 3]), np.array([42])]
    batch = collate(numbers, hits)
    assert isinstance(batch.generator_batch, CopyBatch)
    assert batch.generator_batch.passage_mask.tolist() == [[True, True, True], [True, False, False]]
    store, questions = world.store(), world.question_store("train")
    for row, number in enumerate([7, 100, 3, 42]):
        tokens = batch.passage_ids[row][batch.passage_token_mask[row].bool()]
        assert tokens.tolist() == store.tokens("retriever").rows([number])[0].tolist()
        source = batch.generator_batch.source_ids[row][batch.generator_batch.copy_mask[row]]
        assert source.tolist()[:-1] == store.tokens("generator").rows([number])[0].tolist()
    for row, number in enumerate(numbers):
        tokens = batch.question_ids[row][batch.question_mask[row].bool()]
        assert tokens.tolist() == questions.tokens("retriever").rows([number])[0].tolist()
        answer = batch.generator_batch.answer_ids[row][batch.generator_batch.answer_mask[row]].tolist()
        assert answer[:-1] == questions.answer_tokens(number)[0].tolist()
        text = world.tokenizer.decode(answer, skip_special_tokens=True)
        assert text == questions.question(number).answers[0]
    assert collate(numbers, hits, with_answers=False).generator_batch.answer_ids.shape == (2, 0)


def test_without_passages_there_is_one_empty_one(world):
    empty = np.empty(0, dtype=np.int64)
    batch = collator(world)(np.array([1, 2]), [empty, empty])
    assert isinstance(batch.generator_batch, CopyBatch)
    assert batch.generator_batch.passage_mask.tolist() == [[True], [True]]
    assert batch.generator_batch.copy_mask.sum(dim=1).tolist() == [1, 1]  # its [SEP]
    assert batch.passage_ids.shape == (2, 1)


def test_batches_move_whole(world):
    batch = collator(world)(np.array([1]), [np.array([2, 3])])
    moved = batch.to("cpu")
    assert torch.equal(moved.passage_ids, batch.passage_ids)
    assert moved.num_tokens == batch.num_tokens > 0
    assert replace(batch).num_tokens == batch.num_tokens


# ---------------------------------------------------------------- reader warm-up


def test_one_labelled_passage_among_the_best_others():
    hits = np.array([9, 4, 8, 1, 7])
    places = Counter()
    for seed in range(60):
        chosen = gold_first(hits, np.array([4, 6]), 3, np.random.default_rng(seed))
        assert sorted(chosen) in ([4, 8, 9], [6, 8, 9])
        places[int(np.flatnonzero(np.isin(chosen, [4, 6]))[0])] += 1
    assert min(places[place] for place in range(3)) > 8


def test_without_a_labelled_passage_the_hits_stay():
    hits = np.array([9, 4, 8, 1])
    assert gold_first(hits, np.empty(0, np.int64), 3, np.random.default_rng(0)).tolist() == [9, 4, 8]
    assert gold_first(hits, np.array([4]), 1, np.random.default_rng(0)).tolist() == [4]
