"""What a run directory holds: the columns of every table, and the order that makes a table searchable.

docs/format.md describes each column; a test compares the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

MANIFEST = "manifest.json"
WORK = ".work"
ADDING = ".adding"

# DuckDB fetches extensions by itself unless told not to.
OFFLINE: dict[str, Any] = {"autoinstall_known_extensions": False, "autoload_known_extensions": False}


def _schema(*columns: tuple[str, pa.DataType], null: Sequence[str] = ()) -> pa.Schema:
    return pa.schema([pa.field(name, dtype, nullable=name in null) for name, dtype in columns])


_NEURON = (("layer", pa.int16()), ("neuron", pa.int32()))
_PLACE = (("context", pa.int64()), ("position", pa.int32()), ("next_token", pa.int32()))
_UNIT = (*_NEURON, ("unit", pa.string()), ("polarity", pa.int8()))
_CLAIM = (
    ("tests", pa.string()),
    ("spec", pa.string()),
    ("name", pa.string()),
    ("family", pa.string()),
    ("kind", pa.string()),
    ("complexity", pa.int16()),
)
_SIDES = ("purity", "coverage", "f1")
_VALUES = _schema(
    *_NEURON,
    ("polarity", pa.int8()),
    ("rank", pa.int16()),
    ("token", pa.int32()),
    ("logit", pa.float32()),
    ("probability", pa.float32()),
)

_MOMENTS = (
    *_NEURON,
    ("tokens", pa.int64()),
    ("mean", pa.float64()),
    ("std", pa.float64()),
    ("skewness", pa.float64()),
    ("kurtosis", pa.float64()),
    ("min", pa.float32()),
    ("max", pa.float32()),
    ("positive_fraction", pa.float64()),
)
_HISTOGRAM = (*_NEURON, ("counts", pa.list_(pa.int64())))
_TRIGGER = (
    *_NEURON,
    ("polarity", pa.int8()),
    ("rank", pa.int16()),
    ("coefficient", pa.float32()),
    *_PLACE,
    ("gate_sign", pa.int8()),
    ("up_sign", pa.int8()),
)
_SAMPLE = (*_NEURON, ("bin", pa.int16()), ("coefficient", pa.float32()), *_PLACE)
_KIND = ("kind", pa.string())
_SOURCE = (("source", pa.int32()), ("source_token", pa.string()), ("class", pa.string()))
_HELP = ("helpful", "unhelpful")
_INNER = ("any", *(f"{side}{what}" for what in ("", "_top", "_weighted", "_top_weighted") for side in _HELP))
_AGREEMENTS = ("", "_output", "_permuted", "_other")

SCHEMAS: dict[str, pa.Schema] = {
    "neurons": _schema(
        *_MOMENTS,
        ("value_norm", pa.float32()),
        ("key_norm", pa.float32()),
        ("up_norm", pa.float32()),
        ("value_max_probability", pa.float32()),
        ("value_entropy", pa.float32()),
        ("key_tokens", pa.list_(pa.int32())),
        ("key_coefficients", pa.list_(pa.float32())),
        ("key_tokens_negative", pa.list_(pa.int32())),
        ("key_coefficients_negative", pa.list_(pa.float32())),
        null=["skewness", "kurtosis", "up_norm"],
    ),
    "histograms": _schema(*_HISTOGRAM),
    "triggers": _schema(*_TRIGGER, null=["next_token", "gate_sign", "up_sign"]),
    "samples": _schema(*_SAMPLE, null=["next_token"]),
    "null_neurons": _schema(_KIND, *_MOMENTS, null=["skewness", "kurtosis"]),
    "null_histograms": _schema(_KIND, *_HISTOGRAM),
    "null_triggers": _schema(_KIND, *_TRIGGER, null=["next_token", "gate_sign", "up_sign"]),
    "null_samples": _schema(_KIND, *_SAMPLE, null=["next_token"]),
    "values": _VALUES,
    "values_by_token": _VALUES,
    "contexts": _schema(
        ("context", pa.int64()),
        ("document", pa.int64()),
        ("start", pa.int32()),
        ("tokens", pa.list_(pa.int32())),
    ),
    "documents": _schema(
        ("document", pa.int64()), ("title", pa.string()), ("metadata", pa.string()), null=["title"]
    ),
    "vocabulary": _schema(
        ("token", pa.int32()), ("text", pa.string()), ("bytes", pa.binary()), ("special", pa.bool_())
    ),
    "shards": _schema(
        ("shard", pa.int32()),
        ("layer", pa.int16()),
        ("contexts", pa.int64()),
        ("tokens", pa.int64()),
        ("sum", pa.float64()),
        ("sum_squares", pa.float64()),
        ("sum_cubes", pa.float64()),
        ("sum_fourths", pa.float64()),
    ),
    "patterns": _schema(
        *_UNIT,
        *_CLAIM,
        ("rank", pa.int16()),
        ("role", pa.string()),
        ("equivalents", pa.list_(pa.string())),
        ("triggers", pa.int32()),
        ("hits", pa.int32()),
        ("base_rate", pa.float64()),
        ("p", pa.float64()),
        ("p_family", pa.float64()),
        ("test_triggers", pa.int32()),
        ("test_hits", pa.int32()),
        ("test_base_rate", pa.float64()),
        ("test_p", pa.float64()),
        ("test_where", pa.int64()),
        ("token_rate", pa.float64()),
        ("token_p", pa.float64()),
        ("q", pa.float64()),
        ("token_q", pa.float64()),
        ("discovery_score", pa.float64()),
        ("chosen", pa.bool_()),
    ),
    "pattern_tests": _schema(
        *_UNIT,
        *_CLAIM,
        ("threshold", pa.float32()),
        ("tokens", pa.int64()),
        ("documents", pa.int32()),
        ("active", pa.int64()),
        ("present", pa.int64()),
        ("both", pa.int64()),
        *((f"{name}{end}", pa.float64()) for name in _SIDES for end in ("", "_low", "_high")),
        ("iou", pa.float64()),
        ("auprc", pa.float64()),
        ("pearson", pa.float64()),
        ("mutual_information", pa.float64()),
        ("baseline_constant", pa.float64()),
        ("baseline_random", pa.float64()),
        ("baseline_token", pa.float64()),
        ("baseline_other", pa.float64()),
        ("specificity_rank", pa.int32()),
        ("specificity_null", pa.float64()),
        ("q", pa.float64()),
        ("verdict", pa.string()),
        ("quadrants_active", pa.list_(pa.int64())),
        ("quadrants_both", pa.list_(pa.int64())),
        ("counts_present", pa.list_(pa.int64())),
        ("counts_absent", pa.list_(pa.int64())),
        null=[
            *(f"{name}{end}" for name in _SIDES for end in ("", "_low", "_high")),
            "auprc",
            "pearson",
            "baseline_other",
            "specificity_rank",
            "specificity_null",
            "quadrants_active",
            "quadrants_both",
        ],
    ),
    "calibration": _schema(
        ("layer", pa.int16()),
        ("unit", pa.string()),
        ("measure", pa.string()),
        ("count", pa.int64()),
        ("levels", pa.list_(pa.float64())),
        ("values", pa.list_(pa.float64())),
    ),
    "value_ranks": _schema(
        *_NEURON,
        ("polarity", pa.int8()),
        ("token", pa.int32()),
        ("rank", pa.int32()),
        ("probability", pa.float32()),
        ("last_token", pa.int32()),
        ("last_rank", pa.int32()),
        ("permuted_rank", pa.int32()),
        ("other_rank", pa.int32()),
        ("top_token", pa.int32()),
        ("top_probability", pa.float32()),
        null=["other_rank"],
    ),
    "question_ranks": _schema(
        ("question", pa.int32()),
        ("set", pa.string()),
        ("subject", pa.string()),
        ("prompt", pa.string()),
        ("answer", pa.string()),
        ("label", pa.string()),
        ("token", pa.int32()),
        ("spaced", pa.bool_()),
        ("pieces", pa.int32()),
        ("lens", pa.string()),
        ("point", pa.int16()),
        ("layer", pa.int16()),
        ("part", pa.string()),
        ("rank", pa.int32()),
        ("log_probability", pa.float32()),
        ("null_rank", pa.int32()),
        null=["null_rank"],
    ),
    "case_questions": _schema(
        ("question", pa.int32()),
        *((name, pa.string()) for name in ("set", "subject", "prompt", "answer", "near", "far", "label")),
        ("token", pa.int32()),
        ("near_token", pa.int32()),
        ("far_token", pa.int32()),
        ("rank", pa.int32()),
        ("partner", pa.string()),
    ),
    "case_stream": _schema(
        ("question", pa.int32()),
        ("word", pa.string()),
        ("point", pa.int16()),
        ("logit", pa.float32()),
        ("null", pa.float32()),
    ),
    "case_sources": _schema(
        ("question", pa.int32()),
        *_SOURCE,
        ("contribution", pa.float32()),
        ("leave_one_out", pa.float32()),
        null=["class"],
    ),
    "case_origins": _schema(
        ("question", pa.int32()),
        ("layer", pa.int16()),
        *_SOURCE,
        ("vector", pa.int16()),
        ("point", pa.string()),
        ("recomputed", pa.float32()),
        ("fixed", pa.float32()),
        null=["class"],
    ),
    "case_neurons": _schema(
        ("question", pa.int32()),
        ("drawn", pa.bool_()),
        ("rank", pa.int16()),
        *_NEURON,
        *((name, pa.float32()) for name in ("coefficient", "difference", "chain")),
        *((name, pa.int32()) for name in ("answer_rank", "near_rank", "answer_last_rank", "near_last_rank")),
        ("promotes", pa.list_(pa.string())),
        ("suppresses", pa.list_(pa.string())),
        ("query_kind", pa.string()),
        ("query_layer", pa.int16()),
        ("query_unit", pa.int32()),
        ("query_source", pa.string()),
        ("query_share", pa.float32()),
        null=["query_kind", "query_layer", "query_unit", "query_source", "query_share"],
    ),
    "case_ablations": _schema(
        ("question", pa.int32()),
        ("kind", pa.string()),
        ("layer", pa.int16()),
        ("unit", pa.int32()),
        ("source", pa.int32()),
        *((name, pa.float32()) for name in ("contribution", "leave_one_out", "effect")),
        null=["source"],
    ),
    "parameters": _schema(("layer", pa.int16()), ("part", pa.string()), ("parameters", pa.int64())),
    "removal": _schema(
        *_NEURON,
        ("polarity", pa.int8()),
        ("rank", pa.int16()),
        ("kind", pa.string()),
        ("removed", pa.string()),
        ("document", pa.int64()),
        ("context", pa.int64()),
        ("position", pa.int32()),
        ("removed_position", pa.int32()),
        ("whole", pa.float32()),
        ("without", pa.float32()),
    ),
    "refinement": _schema(
        ("example", pa.int32()),
        ("layer", pa.int16()),
        ("unit", pa.string()),
        ("lens", pa.string()),
        *((name, pa.int32()) for name in ("residual", "ffn", "output", "permuted")),
        *(
            (f"p_{name}", pa.float32())
            for name in ("residual", "output", "output_permuted", "final", "final_permuted")
        ),
        *((f"rank_{name}", pa.int32()) for name in ("output", "output_permuted", "final")),
        ("output_rank_final", pa.int32()),
        ("ffn_rank_residual", pa.int32()),
        ("ffn_rank_residual_permuted", pa.int32()),
        ("ffn_z_residual", pa.float32()),
        ("ffn_z_residual_permuted", pa.float32()),
        ("similarity", pa.float32()),
        ("similarity_permuted", pa.float32()),
        ("memory", pa.int32()),
        ("ffn_rank_memory", pa.int32()),
        ("ffn_rank_memory_permuted", pa.int32()),
        *((name, pa.int32()) for name in ("active", "nonzero", "active_1", "active_10", "active_50")),
        *((name, pa.float32()) for name in ("participation", "mass_10", "mass_100")),
        *(
            (f"{name}{of}", pa.int32())
            for of in _AGREEMENTS
            for name in ("agree", "agree_positive", "agree_all")
        ),
        *((f"strongest{of}", pa.float32()) for of in _AGREEMENTS),
        null=[
            "permuted",
            *(f"{name}_permuted" for name in ("p_output", "p_final", "rank_output", "ffn_rank_residual")),
            *(f"{name}_permuted" for name in ("ffn_z_residual", "similarity", "ffn_rank_memory")),
            *(f"{name}_permuted" for name in ("agree", "agree_positive", "agree_all", "strongest")),
        ],
    ),
    "refinement_examples": _schema(
        ("example", pa.int32()),
        ("unit", pa.string()),
        ("document", pa.int64()),
        ("context", pa.int64()),
        ("position", pa.int32()),
        ("next_token", pa.int32()),
        ("partner", pa.int32()),
        ("prediction", pa.int32()),
        ("p_prediction", pa.float32()),
        null=["partner"],
    ),
    "contribution_examples": _schema(
        ("example", pa.int32()),
        ("target", pa.string()),
        ("token", pa.int32()),
        ("document", pa.int64()),
        ("context", pa.int64()),
        ("position", pa.int32()),
        ("next_token", pa.int32()),
    ),
    "contribution_points": _schema(
        ("example", pa.int32()),
        ("target", pa.string()),
        ("lens", pa.string()),
        ("point", pa.int16()),
        ("logit", pa.float32()),
        ("others", pa.float32()),
        ("log_probability", pa.float32()),
    ),
    "contribution_layers": _schema(
        ("example", pa.int32()),
        ("target", pa.string()),
        ("layer", pa.int16()),
        ("attention", pa.float32()),
        ("ffn", pa.float32()),
        ("active", pa.int32()),
        *((f"{side}{what}", pa.int32()) for what in ("", "_negative") for side in _HELP),
        ("undecided", pa.int32()),
        *((f"{side}{what}", pa.float32()) for what in ("_effective", "_all", "_top") for side in _HELP),
        *((f"by_{choice}", pa.float32()) for choice in ("contribution", "coefficient", "weight", "rank")),
        null=["by_rank"],
    ),
    "contribution_neurons": _schema(
        ("example", pa.int32()),
        *_NEURON,
        ("side", pa.int8()),
        ("rank", pa.int16()),
        ("coefficient", pa.float32()),
        ("contribution", pa.float32()),
        ("query", pa.float32()),
        ("chain", pa.float32()),
        ("asked", pa.bool_()),
    ),
    "contribution_sums": _schema(
        ("example", pa.int32()),
        ("layer", pa.int16()),
        ("neurons", pa.int32()),
        ("separate", pa.float32()),
        ("together", pa.float32()),
    ),
    "cross_queries": _schema(
        ("example", pa.int32()),
        ("query", pa.int16()),
        *((name, pa.float32()) for name in _INNER),
        *((f"upper_{side}", pa.float32()) for side in _HELP),
        null=_INNER,
    ),
    "cross_layers": _schema(
        ("example", pa.int32()),
        ("layer", pa.int16()),
        ("asked", pa.int32()),
        *((f"{side}{what}", pa.int32()) for what in ("", "_asked", "_first") for side in _HELP),
        ("called", pa.int32()),
        ("called_top", pa.int32()),
        *((f"{what}_first", pa.int32()) for what in ("values", "queries", "chains", "both")),
        *((f"{what}_mass", pa.float32()) for what in ("value", "query", "chain")),
    ),
}

# Of null units: the columns of neurons and the rest, behind the kind of null.
NULLS = ("null_neurons", "null_histograms", "null_triggers", "null_samples")

# What the study adds.
STUDY = ("value_ranks", "question_ranks", "parameters")

CONTRIBUTIONS = tuple(name for name in SCHEMAS if name.startswith(("contribution_", "cross_")))
CASES = tuple(name for name in SCHEMAS if name.startswith("case_"))

# What a run may be without, and how to come by it.
OPTIONAL = {
    **dict.fromkeys(NULLS, "build one with `mnemoscope build ... --nulls random,rotated`"),
    **dict.fromkeys(("patterns", "pattern_tests", "calibration"), "add it with `mnemoscope patterns RUN`"),
    "removal": "add it with `mnemoscope removal RUN`",
    **dict.fromkeys(STUDY, "add it with `mnemoscope study`"),
    **dict.fromkeys(
        ("refinement", "refinement_examples"), "add it with `mnemoscope study --only refinement`"
    ),
    **dict.fromkeys(CASES, "add it with `mnemoscope study --only cases`"),
    **dict.fromkeys(CONTRIBUTIONS, "add it with `mnemoscope study --only contributions`"),
}

# What each file is sorted by first, and so what can be looked up in it without reading the rest.
KEYS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("neurons", "histograms", "triggers", "samples", "values", *NULLS), ("layer", "neuron")),
    "values_by_token": ("token",),
    "contexts": ("context",),
    "documents": ("document",),
    "vocabulary": ("token",),
    "shards": ("shard", "layer"),
    **dict.fromkeys(("patterns", "pattern_tests", "removal"), ("layer", "neuron")),
    "calibration": ("layer",),
    "value_ranks": ("layer", "neuron"),
    "question_ranks": ("question",),
    "parameters": ("layer",),
    "refinement": ("example", "layer"),
    "refinement_examples": ("example",),
    **dict.fromkeys(CONTRIBUTIONS, ("example",)),
    **dict.fromkeys(CASES, ("question",)),
}

# Rows per group: small enough that one key costs a millisecond, large enough that the footer stays small.
GROUP_ROWS = {
    "neurons": 4_096,
    "histograms": 256,
    "null_neurons": 4_096,
    "null_histograms": 256,
    "pattern_tests": 512,
}
GROUP_ROWS_DEFAULT = 12_800


def numbers(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """The numbers of a column without nulls, not copied where that is possible.

    Not by `to_numpy`, which imports pandas where it is installed: a quarter of a second before the first neuron.
    """
    whole = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    return np.from_dlpack(whole)


def pack(rows: pa.Table, key: Sequence[str]) -> np.ndarray:
    """One sortable i64 per row from one key column, or from two (the first in the upper half)."""
    packed = np.zeros(rows.num_rows, np.int64)
    for column in key:
        packed = (packed << 32) | numbers(rows[column]).astype(np.int64)
    return packed
