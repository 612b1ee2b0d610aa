"""The report in W&B is built from the project's own metric names. Only saving it needs a server, which is replaced."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from ranker.commands.wandb_command import wandb_report
from ranker.errors import UserError
from ranker.reports import wandb_report as module

pytest.importorskip("wandb_workspaces", reason="needs the extra 'wandb'")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """Answers what wandb-workspaces asks, and keeps what it saves."""
    from types import SimpleNamespace

    module.library()
    from wandb_workspaces.reports.v2 import interface

    saved: list[dict[str, Any]] = []

    def answer(api: object, query: object, variables: dict[str, Any]) -> dict[str, Any]:
        if "spec" not in variables:
            return {"project": {"internalId": "UHJvamVjdEludGVybmFsSWQ6MQ=="}}
        saved.append(variables)
        view = {"id": "VmlldzoxMjM=", "name": variables["name"], "displayName": variables["displayName"]}
        project = {"name": "evenkeel", "entityName": "team"}
        user = {"username": "u", "name": "u"}
        times = {"createdAt": "2026-01-01T00:00:00", "updatedAt": "2026-01-01T00:00:00"}
        return {"upsertView": {"view": view | times | {"project": project, "user": user, "spec": variables["spec"]}}}

    api = SimpleNamespace(projects=lambda entity: [SimpleNamespace(name="evenkeel")], client=SimpleNamespace())
    monkeypatch.setattr(interface, "_get_api", lambda: api)
    monkeypatch.setattr(interface, "execute_graphql", answer)
    monkeypatch.setattr(interface, "get_app_url", lambda _: "https://wandb.example", raising=False)
    return saved


def test_a_report_of_a_sweep_compares_groups_by_the_names_that_runs_have(
    server: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    status = wandb_report(
        ["team/evenkeel", "--metric", "click/auc", "watch_time/rmse", "--sweep", "methods", "--draft"]
    )

    assert status == 0, capsys.readouterr().err
    (saved,) = server
    assert (saved["entityName"], saved["projectName"], saved["type"]) == ("team", "evenkeel", "runs/draft")
    spec = json.loads(saved["spec"])
    grids = [block for block in spec["blocks"] if block["type"] == "panel-grid"]
    panels = [panel for grid in grids for panel in grid["metadata"]["panelBankSectionConfig"]["panels"]]
    lines = {panel["config"]["metrics"][0]: panel["config"] for panel in panels if "Line" in panel["viewType"]}
    assert {"train/loss", "val/click/auc", "progressive/click/auc", "val/watch_time/rmse"} <= set(lines)
    assert {config["xAxis"] for config in lines.values()} == {"trainer/global_step"}
    assert lines["train/loss"]["yLogScale"] is True
    bars = [panel["config"]["metrics"] for panel in panels if panel["viewType"] == "Bar Chart"]
    assert ["summary_metrics.test/click/auc"] in bars or ["summary:test/click/auc"] in bars
    text = json.dumps(grids)
    assert "sweep:methods" in text
    assert "completed" in text
    runsets = [grid["metadata"]["runSets"][0] for grid in grids]
    assert ["group" in json.dumps(runset["grouping"]) for runset in runsets] == [True, True, True, False]


@pytest.mark.parametrize(
    ("project", "metrics", "words"),
    [
        ("evenkeel", ["click/auc"], "give entity/project"),
        ("team/evenkeel", [], "at least one metric"),
        ("team/evenkeel", ["click/calibration"], "'calibration' has no better or worse"),
    ],
)
def test_a_mistake_is_one_line(project: str, metrics: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        module.report(project, metrics)


def test_without_a_login_it_is_said_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module.library()
    from wandb_workspaces.reports.v2 import interface

    def refuse() -> None:
        raise Exception("not logged in to W&B, try `wandb login --relogin`")  # as the package does

    monkeypatch.setattr(interface, "_get_api", refuse)
    assert wandb_report(["team/evenkeel", "--metric", "click/auc"]) == 2
    assert capsys.readouterr().err == "error: W&B, team/evenkeel: not logged in to W&B, try `wandb login --relogin`\n"
