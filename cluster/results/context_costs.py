"""Shows the costs and the gains of each way to give a generator its context: one table, and needles as heat maps."""

from collections.abc import Mapping
from typing import Any

from cluster.results.findings import Measured
from training.reporting.plots import HeatMap, heat_svg
from training.reporting.report import Section, Table

GIGA, KIBI = 1e9, 2**10
COLUMNS = {
    "prompt tokens": ("prompt_tokens", 1.0),
    "GFLOP": ("flops", GIGA),
    "GFLOP retrieval": ("retrieval_flops", GIGA),
    "KV cache KiB": ("kv_cache_bytes", KIBI),
    "state KiB": ("state_bytes", KIBI),
    "seconds": ("seconds", 1.0),
    "search s": ("search_seconds", 1.0),
}
NOTES = (
    "Of one question, means over the split. GFLOP: 2 a weight and token, and the attention of dense kernels, for "
    "prompt and answer; retrieval apart. KV cache and state: at the end of the prompt. See "
    "training/measuring/costs.py.",
)


def context_table(stages: Mapping[str, Measured]) -> Table | None:
    """Return one row per stage and context whose costs were measured; None if there is none."""
    rows: list[list[Any]] = []
    for name, measured in stages.items():
        for position, (mode, costs) in enumerate(measured.result.get("costs", {}).items()):
            prefix = f"{mode}/" if position else ""
            label = f"{name}, {measured.result.get('source', 'index')} ({mode})" if not position else f"{name}, {mode}"
            quality = [measured.metrics.get(f"{prefix}{metric}") for metric in ("exact_match", "f1")]
            rows.append([label, *quality, *(costs[key] / unit for key, unit in COLUMNS.values())])
    if not rows:
        return None
    return Table("What the context costs", ["context", "exact_match", "f1", *COLUMNS], rows, NOTES)


def needle_sections(stages: Mapping[str, Measured]) -> list[Section]:
    """Return a heat map for each stage with needles."""
    sections = []
    for name, measured in stages.items():
        sweep = measured.result.get("needle")
        if sweep:
            heat = HeatMap(
                title=f"{name}: exact match, {sweep['num_questions']} questions a cell",
                columns=[f"{length:,}" for length in sweep["lengths"]],
                rows=[f"{depth:.0%}" for depth in sweep["depths"]],
                values=[list(column) for column in zip(*sweep["exact_match"], strict=True)],
                x_title="tokens of the prompt",
                y_title="depth of the labelled passage",
            )
            sections.append(Section("Needle in a haystack", heat_svg(heat)))
    return sections
