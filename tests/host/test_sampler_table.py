"""The table of samplers in docs/composition.md, cell by cell."""

from __future__ import annotations

import pytest

from evaluation.sampler_table import COLUMNS, MEASURES, SAMPLERS, TOLERANCE, Bench


@pytest.fixture(scope="module")
def bench(host, pack) -> Bench:
    return Bench(host, pack)


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda sampler: sampler.title)
def test_cell(bench, sampler, column):
    cell = MEASURES[column](bench, sampler)
    if not isinstance(cell, str):
        assert cell < TOLERANCE


def test_docs_have_every_row_and_column(repository):
    """Numbers differ from machine to machine; what is measured must not."""
    page = (repository / "docs/composition.md").read_text(encoding="utf-8")
    lines = [" ".join(line.split()) for line in page.splitlines()]
    assert f"| sampler | {' | '.join(COLUMNS)} |" in lines
    for sampler in SAMPLERS:
        [row] = [line for line in lines if line.startswith(f"| {sampler.title} |")]
        assert row.count("|") == len(COLUMNS) + 2
    for name, meaning in COLUMNS.items():
        assert f"- {name}: {meaning}." in " ".join(lines)
