"""Looking inside: what a model is made of, what a mixer remembers and what it does to a signal."""

from discretax.inspection._memory import Memory as Memory, memory as memory
from discretax.inspection._responses import (
    eigenvalues as eigenvalues,
    frequency_response as frequency_response,
    impulse_response as impulse_response,
)
from discretax.inspection._summary import summary as summary
from discretax.inspection._table import LayerSummary as LayerSummary, Summary as Summary
