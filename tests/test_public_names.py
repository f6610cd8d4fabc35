"""The names that code outside this repository calls, with the parameters it passes."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import edge_ibtm

SIGNATURES = {
    "build_model": "name num_classes weights img_size",
    "insert_mergers": "model merger keep_ratio macs layout density",
    "remove_mergers": "model",
    "merge_trace": "model images",
    "count_macs": "model img_size",
    "finetune": "model train val config",
    "quantize": "model calibration scheme",
    "lower": "model example path target",
    "verify": "reference artifact inputs limits",
    "probe": "artifact_or_model example threads device",
    "tokens.kept_tokens": "tokens keep_ratio prefix",
    "tokens.match": "metric keep prefix",
    "tokens.merge": "x assignment size weight",
    "tokens.unmerge": "x assignment",
    "information.soft_assign": "features centroids beta",
    "information.class_likelihood": "phi labels classes",
    "information.ib_loss": "phi_merged phi_input labels classes",
    "information.ib_bound": "phi_merged phi_input labels q conditional",
    "information.input_entropy": "phi_input",
}
FIELDS = {
    "Artifact": "path target bytes subgraphs delegated non_delegated sha256",
    "Verdict": "sqnr_db cosine max_abs top1_agreement ok",
    "Latency": "p50_ms p90_ms p99_ms load_ms first_ms",
    "SiteTrace": "path assignment weights sizes",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_function_takes_these_parameters_in_this_order(name: str) -> None:
    function = edge_ibtm
    for part in name.split("."):
        function = getattr(function, part)
    wanted = SIGNATURES[name].split()
    given = [p for p in inspect.signature(function).parameters if p in wanted]
    assert given == wanted


@pytest.mark.parametrize("name", FIELDS)
def test_results_have_these_fields(name: str) -> None:
    kind = getattr(edge_ibtm, name)
    fields = getattr(kind, "model_fields", None) or kind.__dataclass_fields__
    assert set(FIELDS[name].split()) <= set(fields)


def test_importing_the_package_is_cheap() -> None:
    code = "import edge_ibtm, edge_ibtm.cli, edge_ibtm.pipeline, sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nonsense"):
        edge_ibtm.nonsense  # noqa: B018
