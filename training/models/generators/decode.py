"""Write answers by beam search or sampling, and join the answers of several passages into one."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from training.models.generators.generator import Decoded


@torch.no_grad()
def beam_search(
    next_log_probs: Callable[[Tensor], Tensor],
    num_rows: int,
    *,
    start_id: int,
    end_id: int,
    max_tokens: int,
    num_beams: int,
    device: torch.device | str,
    run_to_end: bool = False,
) -> Decoded:
    """Return the best sequence of each row under a sum of log-probabilities, end-of-sequence included, unpenalised.

    `next_log_probs` maps prefixes int64 [num_rows * num_beams, length] (beams of a row side by side, start token first)
    to float32 [num_rows * num_beams, vocabulary]. With one beam this is greedy search. A sequence that reaches
    `max_tokens` without an end is taken as it stands. With `run_to_end` nothing stops early, so that ranks that share
    sharded weights call the model equally often.
    """
    prefix = torch.full((num_rows * num_beams, 1), start_id, dtype=torch.int64, device=device)
    scores = torch.full((num_rows, num_beams), float("-inf"), device=device)
    scores[:, 0] = 0.0  # all beams start equal, so only the first may be extended
    ended = torch.zeros(num_rows, num_beams, dtype=torch.bool, device=device)
    for length in range(max_tokens + 1):
        log_probs = next_log_probs(prefix).view(num_rows, num_beams, -1)
        vocabulary = log_probs.shape[-1]
        stay = torch.full_like(log_probs, float("-inf"))
        stay[..., end_id] = 0.0  # an ended beam repeats its end at no cost
        log_probs = torch.where(ended[..., None], stay, log_probs)
        before, (scores, flat) = scores, (scores[..., None] + log_probs).flatten(1).topk(num_beams, dim=1)
        parents, tokens = flat // vocabulary, flat % vocabulary
        if length == max_tokens:  # no room for this token: only an end counts
            scores = torch.where(tokens == end_id, scores, before.gather(1, parents))
        rows = (torch.arange(num_rows, device=device)[:, None] * num_beams + parents).flatten()
        prefix = torch.cat([prefix[rows], tokens.flatten()[:, None]], dim=1)
        ended = ended.gather(1, parents) | (tokens == end_id)
        if not run_to_end and bool(ended.all()):
            break
    best = prefix.view(num_rows, num_beams, -1)[:, 0, 1:].tolist()
    return Decoded([_until(row, end_id)[:max_tokens] for row in best], scores[:, 0].float())


@torch.no_grad()
def sample(
    next_log_probs: Callable[[Tensor], Tensor],
    num_rows: int,
    *,
    start_id: int,
    end_id: int,
    max_tokens: int,
    temperature: float,
    device: torch.device | str,
    run_to_end: bool = False,
) -> Decoded:
    """Draw one sequence a row, each token from `softmax(log_probs / temperature)` by torch's random state. Arguments
    and result are those of `beam_search`; the log-probabilities are at temperature 1."""
    prefix = torch.full((num_rows, 1), start_id, dtype=torch.int64, device=device)
    scores = torch.zeros(num_rows, device=device)
    ended = torch.zeros(num_rows, dtype=torch.bool, device=device)
    for length in range(max_tokens + 1):
        log_probs = next_log_probs(prefix).float()
        tokens = torch.multinomial((log_probs / temperature).softmax(dim=-1), 1)
        gained = log_probs.gather(1, tokens)[:, 0]
        counts = ~ended
        if length == max_tokens:  # no room for this token: only an end counts
            counts = counts & (tokens[:, 0] == end_id)
        scores = torch.where(counts, scores + gained, scores)
        tokens = tokens.masked_fill(ended[:, None], end_id)
        prefix = torch.cat([prefix, tokens], dim=1)
        ended = ended | (tokens[:, 0] == end_id)
        if not run_to_end and bool(ended.all()):
            break
    return Decoded([_until(row, end_id)[:max_tokens] for row in prefix[:, 1:].tolist()], scores)


def _until(tokens: list[int], end_id: int) -> list[int]:
    return tokens[: tokens.index(end_id)] if end_id in tokens else tokens


def marginal_answers(texts: Sequence[str], log_probs: Tensor, log_prior: Tensor) -> list[str]:
    """Choose for each question the answer with the largest sum of p(z|q) p(a|q,z) over the passages that wrote it.

    `texts` and `log_probs` [batch * k] are the answers of each passage, question by question; `log_prior` [batch, k]
    is log p(z|q), -inf at padded passages. Strings that differ in case or spaces only are one answer, spelled as the
    best-ranked passage has it; ties go to the better-ranked passage.
    """
    batch, k = log_prior.shape
    joint = (log_probs.view(batch, k).float().cpu() + log_prior.float().cpu()).double().exp().tolist()
    best: list[str] = []
    for b in range(batch):
        mass: dict[str, float] = {}
        spelling: dict[str, str] = {}
        for z in range(k):
            text = texts[b * k + z]
            key = _bare(text)
            spelling.setdefault(key, text)
            mass[key] = mass.get(key, 0.0) + joint[b][z]
        best.append(spelling[max(mass, key=lambda answer: mass[answer])])
    return best


def top1_answers(texts: Sequence[str], log_prior: Tensor) -> list[str]:
    """Choose for each question the answer of the passage with the largest p(z|q); shapes as in `marginal_answers`."""
    k = log_prior.shape[1]
    return [texts[b * k + int(z)] for b, z in enumerate(log_prior.argmax(dim=1).tolist())]


def restore_spelling(text: str, sources: Sequence[str]) -> str:
    """Spell `text` as the first source that contains it in whole words; return it unchanged if none does.

    Tokenisers that fold case and drop spaces ("8u504+1" becomes 8 u 504 + 1) lose the spelling of an answer; the
    passage that it was read from has it.
    """
    wanted = _bare(text)
    if not wanted:
        return text
    for source in sources:
        positions = [i for i, character in enumerate(source) if not character.isspace()]
        folded = [source[i].lower() for i in positions]
        if any(len(character) != 1 for character in folded):  # lower case of two letters would shift them
            folded = [character[0] for character in folded]
        bare, start = "".join(folded), -1
        while (start := bare.find(wanted, start + 1)) >= 0:
            first, last = positions[start], positions[start + len(wanted) - 1]
            if _is_edge(source, first) and _is_edge(source, last + 1):
                return source[first : last + 1]
    return text


def _bare(text: str) -> str:
    return "".join(text.lower().split())


def _is_edge(text: str, position: int) -> bool:
    """Return true if no word runs across `position`."""
    return not (0 < position < len(text) and text[position - 1].isalnum() and text[position].isalnum())
