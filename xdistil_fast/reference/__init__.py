"""What the compiled kernels compute, written in NumPy and float64 to be read and to test against.

Nothing here is used to train or to tag: it is slow on purpose.
"""

from xdistil_fast.reference.crf import (
    CRFGradients,
    Enumeration,
    crf_log_likelihood,
    crf_log_likelihood_grad,
    crf_marginals,
    crf_viterbi,
    enumerate_paths,
)
from xdistil_fast.reference.lstm import BiLSTMGradients, bilstm_backward, bilstm_forward
from xdistil_fast.reference.student import (
    pool,
    student_class_scores,
    student_hidden,
    student_scores,
)

__all__ = [
    "BiLSTMGradients",
    "CRFGradients",
    "Enumeration",
    "bilstm_backward",
    "bilstm_forward",
    "crf_log_likelihood",
    "crf_log_likelihood_grad",
    "crf_marginals",
    "crf_viterbi",
    "enumerate_paths",
    "pool",
    "student_class_scores",
    "student_hidden",
    "student_scores",
]
