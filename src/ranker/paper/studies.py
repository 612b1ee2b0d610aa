"""Every study by its name on the command line, in the order in which ``all`` makes them."""

from __future__ import annotations

from ranker.paper import (
    ablations,
    conditions,
    curve_figures,
    divergence_figures,
    fig3,
    rates,
    searched_clippy,
    table1,
    table2,
    table3,
)
from ranker.paper.study import Study

STUDIES: tuple[Study, ...] = (
    table1.STUDY,
    fig3.STUDY,
    table2.STUDY,
    table3.STUDY,
    divergence_figures.FIG1,
    divergence_figures.FIG4,
    curve_figures.FIG5,
    curve_figures.FIG6,
    divergence_figures.FIG8,
    rates.STUDY,
    ablations.RULE,
    ablations.LAMBDA,
    ablations.ADAM,
    conditions.BATCH,
    conditions.WINDOW,
    conditions.MITIGATION,
    table2.MORE,
    searched_clippy.STUDY,
)
BY_NAME = {study.name: study for study in STUDIES}
