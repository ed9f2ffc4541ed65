"""Forms in which a sum node is given weights at run time, for every query b its own table W_b (K, I).

=============================  ======================================================================================
:class:`Dense`                 W_b itself
:class:`Gates`                 ``W_b = sum_t g_bt W_t``: a convex combination of T tables that queries and nodes share
:class:`LowRank`               ``W_b = (W + v u_b^T) / (1 + v u_b^T 1)``: the node's own table W, moved by a rank R
=============================  ======================================================================================

Only the first makes a table of every query. A step of the others costs T products with a table that queries share, or
one such product and R vectors a query. Where weights do not simply add up (maxima, powers, entropies) the tables of a
few queries at a time are written out; a choice of children writes out the rows of the units that were reached.
"""

from circuits.weights.forms import Dense, Form
from circuits.weights.gates import Gates
from circuits.weights.low_rank import LowRank

__all__ = ["Dense", "Form", "Gates", "LowRank"]
