"""Thin modules over the ops."""

from pyelastic.nn.margin_softmax import (
    AdaFace,
    ArcFace,
    CombinedMargin,
    CosFace,
    CurricularFace,
    ElasticArcFace,
    ElasticCosFace,
    MagFace,
    MarginSoftmax,
    NormFace,
    SubCenterArcFace,
    SVSoftmax,
)

__all__ = [
    "AdaFace",
    "ArcFace",
    "CombinedMargin",
    "CosFace",
    "CurricularFace",
    "ElasticArcFace",
    "ElasticCosFace",
    "MagFace",
    "MarginSoftmax",
    "NormFace",
    "SVSoftmax",
    "SubCenterArcFace",
]
