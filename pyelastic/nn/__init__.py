"""Thin modules over the ops."""

from pyelastic.nn.late_interaction import LateInteraction
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
from pyelastic.nn.nalaformer import NaLaFormer
from pyelastic.nn.norm_linear_attention import CausalNormAwareLinearAttention, NormAwareLinearAttention
from pyelastic.nn.projection import ProjectionHead

__all__ = [
    "AdaFace",
    "ArcFace",
    "CausalNormAwareLinearAttention",
    "CombinedMargin",
    "CosFace",
    "CurricularFace",
    "ElasticArcFace",
    "ElasticCosFace",
    "LateInteraction",
    "MagFace",
    "MarginSoftmax",
    "NaLaFormer",
    "NormAwareLinearAttention",
    "NormFace",
    "ProjectionHead",
    "SVSoftmax",
    "SubCenterArcFace",
]
