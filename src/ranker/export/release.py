"""From a candidate to the folder that is handed out, if the gate lets it through."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ranker.data.schema import SCHEMA_FILE
from ranker.export.agreement import difference
from ranker.export.bundle import ABOUT, FORMAT, GATE, METRICS, PROGRAMS, new_folder, write_json
from ranker.export.candidate import Candidate, normalisation
from ranker.export.engine import open_program
from ranker.export.program import Served, to_onnx, to_program
from ranker.runs.run_folder import plain
from ranker.stability.gate import Evidence, GateSettings, Verdict, judge


class _RefusedError(Exception):
    """Leaves the draft of a folder behind to be removed."""


def hand_out(
    candidate: Candidate,
    evidence: Evidence,
    settings: GateSettings,
    *,
    destination: Path,
    onnx: bool,
    force: bool,
    about: Mapping[str, Any],
) -> Verdict:
    """Judges, converts, compares what was converted, judges that, and only then puts the folder in place.

    A model that is refused for what it is, is not converted: the agreement of its outputs is not asked.

    Args:
        candidate: the model.
        evidence: what is known of it.
        settings: what it must show.
        destination: the folder.
        onnx: write an ONNX file too.
        force: replace an export that is there.
        about: where the model comes from; goes into export.json.

    Raises:
        UserError: the destination is taken, or packages are missing.
    """
    verdict = judge(evidence, settings)
    if not verdict.passed:
        return verdict
    rows = candidate.sample(settings.agreement_rows)
    statistics = candidate.weights.statistics
    served = Served(candidate.net, schema=candidate.schema, statistics=statistics)
    try:
        with new_folder(destination, replace=force) as draft:
            program = to_program(served)
            torch.export.save(program, draft / PROGRAMS["pt2"])
            if onnx:
                to_onnx(program, served, draft / PROGRAMS["onnx"])
            differences = {
                form: difference(
                    open_program(draft / file, schema=candidate.schema), served, candidate.net, rows, statistics
                )
                for form, file in PROGRAMS.items()
                if (draft / file).is_file()
            }
            verdict = judge(replace(evidence, differences=differences), settings)
            if not verdict.passed:
                raise _RefusedError
            candidate.schema.to_yaml(draft / SCHEMA_FILE)
            write_json(draft / METRICS, plain({name: evidence.metrics[name] for name in evidence.metrics}))
            write_json(draft / GATE, plain(verdict.to_dict() | {"agreement_rows": len(rows)}))
            signature = served.signature.describe()
            known = {"dense_statistics": normalisation(statistics, candidate.schema)}
            write_json(draft / ABOUT, {"format": FORMAT, **plain(about), **known, **signature})
    except _RefusedError:
        pass
    return verdict
