"""One readable file per op; importing this package registers every op and its backends."""

from pyelastic import _dispatch
from pyelastic.ops import fira as fira
from pyelastic.ops import margin_softmax as margin_softmax
from pyelastic.ops import maxsim as maxsim
from pyelastic.ops import norm_linear_attention as norm_linear_attention
from pyelastic.ops import projection as projection

_dispatch.check_requested_ops()
