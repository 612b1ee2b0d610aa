"""Published numbers match the CSV files of their runs, and edits are found."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from ranker.errors import UserError
from ranker.paper import analytic_studies, rendering
from ranker.paper.jobs import DATA, Setting
from ranker.paper.published import differences, publish, render

ROOT = Path(__file__).parents[3]


def test_every_published_number_is_what_its_runs_say() -> None:
    assert differences(ROOT) == []


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / "results" / "no_data", tmp_path / "results" / "no_data")
    (tmp_path / "README.md").write_text(
        "before\n<!-- results/no_data/fig3.md#loss -->\nold\n<!-- end -->\nafter\n", encoding="utf-8"
    )
    return tmp_path


def test_an_edited_number_is_found_and_publishing_mends_it(copy: Path) -> None:
    path = copy / "results" / "no_data" / "fig3.md"
    path.write_text(path.read_text(encoding="utf-8").replace("0.191", "0.190"), encoding="utf-8")
    told = differences(copy)
    assert any(line.startswith("results/no_data/fig3.md:") and "0.190" in line for line in told)
    assert any(line.startswith("README.md:") for line in told)
    publish(copy)
    assert differences(copy) == []
    text = (copy / "README.md").read_text(encoding="utf-8")
    assert text.startswith("before\n")
    assert text.endswith("<!-- end -->\nafter\n")
    assert "| 0.09 | 10.5 | 0.191 |" in text


def test_a_changed_run_is_found(copy: Path) -> None:
    publish(copy)
    path = copy / "results" / "no_data" / "fig3.csv"
    path.write_text(path.read_text(encoding="utf-8").replace("10.5", "11.5"), encoding="utf-8")
    assert len(differences(copy)) > 1


def test_a_block_that_names_nothing_is_refused(copy: Path) -> None:
    with pytest.raises(UserError, match=r"fig3\.md#lost: no section 'lost'"):
        rendering.quote("<!-- results/no_data/fig3.md#lost -->\n<!-- end -->\n", copy)
    with pytest.raises(UserError, match="fig9"):
        rendering.quote("<!-- results/no_data/fig9.md#loss -->\n<!-- end -->\n", copy)


def test_a_study_that_was_not_made_yet_is_named_with_its_command(copy: Path) -> None:
    block = "<!-- results/synthetic_laptop/table2.md#best -->\nold\n<!-- end -->\n"
    (copy / "README.md").write_text(block, encoding="utf-8")
    publish(copy)
    assert differences(copy) == []
    text = (copy / "README.md").read_text(encoding="utf-8")
    assert "Not made yet: `python scripts/reproduce.py table2 data=synthetic scale=laptop`." in text


def test_a_section_may_have_any_name_without_spaces(copy: Path) -> None:
    block = "<!-- results/x.md#at-0.4x -->\n<!-- end -->\n"
    (copy / "results" / "x.md").write_text("## at-0.4x\n\n| 3 of 3 |\n", encoding="utf-8")
    quoted = rendering.quote(block, copy)
    assert quoted == "<!-- results/x.md#at-0.4x -->\n| 3 of 3 |\n<!-- end -->\n"


def test_table_1_at_a_width_is_the_sum_done_by_hand() -> None:
    d, h = 100, 512
    small = d * h + h + h * h + h + 6 * (h + 1)
    assert analytic_studies.parameters("Small", width=d) == small
    h = 4096
    large = d * h + h + 3 * (h * h + h) + 6 * (h + 1)
    assert analytic_studies.parameters("Large", width=d) == large
    assert analytic_studies.parameters("Large+DCN", width=d, cross_layers=2) == large + 2 * (d * d + d) + 2 * d


def test_the_fitting_width_is_the_nearest() -> None:
    width = analytic_studies.fitting_width(57e6, "Large")
    off = [abs(analytic_studies.parameters("Large", width=width + step) - 57e6) for step in (-1, 0, 1)]
    assert min(off) == off[1]


def test_figure_3_shrinks_below_the_edge_and_grows_above() -> None:
    # x shrinks by 1 - 20 * 0.09 = -0.8 a step, or grows by -1.2
    assert analytic_studies.descend(0.09, steps=2)[2] == pytest.approx((0.64, 0.91**2))
    assert analytic_studies.descend(0.11, steps=2)[2] == pytest.approx((1.44, 0.89**2))


def test_what_was_measured_without_a_run_is_measured_again(tmp_path: Path) -> None:
    for study in (analytic_studies.FIG3, analytic_studies.TABLE1):
        runs, _ = study.phases[0].read(Setting(DATA["kuairand"]), tmp_path, [])
        published = ROOT / "results" / "no_data" / f"{study.name}.md"
        assert render(study, DATA["kuairand"], {study.name: runs}, "no_data") == published.read_text(encoding="utf-8")
