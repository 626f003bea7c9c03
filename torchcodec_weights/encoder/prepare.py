"""A matrix ready to be encoded: normalized, with the order of its rows and columns."""

from dataclasses import dataclass

import numpy as np

from torchcodec_weights.codecs.base import Codec
from torchcodec_weights.codecs.records import EncoderSettings, ErrorFeedback, FloatArray
from torchcodec_weights.encoder.spread import Spread
from torchcodec_weights.format.container import SORTED_COLUMNS, SORTED_ROWS
from torchcodec_weights.format.order import sorted_order
from torchcodec_weights.matrix.feedback import Prediction, conditional_variances, prediction
from torchcodec_weights.matrix.importance import Importance
from torchcodec_weights.matrix.normalize import Normalized
from torchcodec_weights.matrix.weighted import normalize_weighted, take_outliers


@dataclass(frozen=True)
class Prepared:
    """A matrix ready to be encoded.

    Attributes:
        norm: the normalized matrix, in its own order.
        order: in which order the codec gets rows and columns, as `Header.order`.
        feedback: error feedback across columns, in the codec's order, or None.
        spread: of the variances in Z; None where they are one.
    """

    norm: Normalized
    order: int = 0
    feedback: ErrorFeedback | None = None
    spread: Spread | None = None


def by_importance(
    dense: FloatArray,
    importance: Importance,
    codec: Codec,
    settings: EncoderSettings,
    bits: float,
    seed: int,
) -> Prepared:
    """Scales, outliers, order and feedback by the importance of rows and columns.

    Args:
        dense: float32 (rows, cols), finite.
        importance: of the matrix.
        bits: per weight, about what payloads will take; decides what is an outlier.
        seed: of the random signs.
    """
    by_columns = _by_columns(importance, codec, settings)
    predicted = prediction(importance.moments) if by_columns else None
    columns = importance.columns if predicted is None else predicted.variances
    norm = normalize_weighted(dense, importance.rows, columns, seed, even_rows=codec.even_rows)
    step = 2.0 ** Spread(norm.z).log2_step_for(bits, codec.rate_curve(settings))
    norm = take_outliers(norm, codec.outlier_steps * step)
    order = 0
    if by_columns:
        order = SORTED_COLUMNS
    elif settings.tile_shape is None and not codec.decodes_whole:
        order = SORTED_COLUMNS | SORTED_ROWS
    feedback = None if predicted is None else _in_coded_order(predicted, norm)
    return Prepared(norm, order, feedback, Spread(norm.z))


def column_costs(importance: Importance, codec: Codec, settings: EncoderSettings) -> FloatArray:
    """What an error in each column costs with a codec: float32 (cols,)."""
    if _by_columns(importance, codec, settings):
        return conditional_variances(importance.moments)
    return importance.columns


def _by_columns(importance: Importance, codec: Codec, settings: EncoderSettings) -> bool:
    """Whether a matrix is coded by columns: not embeddings, whose rows are decoded one by one."""
    known = importance.moments.ndim == 2
    return known and settings.tile_shape is None and codec.codes_columns(len(importance.columns))


def _in_coded_order(predicted: Prediction, norm: Normalized) -> ErrorFeedback:
    """Factors for Z with its columns sorted, from those for W."""
    scale = norm.col_scale
    columns = sorted_order(norm.act_pre_scale, len(scale))
    factors = predicted.factors * scale[:, None] / scale
    return ErrorFeedback(
        np.ascontiguousarray(factors[np.ix_(columns, columns)]),
        np.argsort(columns).astype(np.uint32)[predicted.order],
    )
