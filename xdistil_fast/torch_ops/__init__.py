"""Our kernels as torch operators: `torch.ops.xdistil.*` and the functions to call them by.

Each kernel that torch code uses is a `torch.library.custom_op` with a fake implementation (shapes
only, for torch.compile), an autograd formula where it has a gradient, and an autocast rule. The
gradient is an operator of its own, so torch.compile traces through forward and backward alike. The
operators hand NumPy views of detached, contiguous tensors to the extension, which knows nothing of
torch, and compute on `torch.get_num_threads()` threads; the result does not depend on the number.

Common to all of them:

* Ragged batches: `values` [total, ...] and `cu_seqlens` [B+1], int32 or int64, which starts at 0,
  ascends and ends at `total`; sequences of length 0 are allowed.
* float32 or float64, all floating tensors of one call alike. Under torch.autocast the inputs are
  cast to float32 (float64 stays), the kernel runs in float32, and so does its gradient. But the
  BiLSTM under autocast in bfloat16: on CUDA it is cast to it, on a CPU that multiplies bfloat16 its
  products are, forward and backward, and nothing else.
* CPU, and CUDA where the extension `_cuda` was built (cuda.py): on the stream that is current, in
  CUDA graphs too. All tensors of a call on one device; `cu_seqlens` may be on the CPU, where its
  values are checked. What lies on a GPU is not checked for its values, which would wait for it:
  impossible `cu_seqlens` make sequences empty, impossible tags a likelihood NaN.
* First derivatives only: differentiating a gradient raises RuntimeError, as does differentiating
  `crf_marginals` or `crf_viterbi`.
* TypeError for a wrong dtype; ValueError for a wrong shape, device, `cu_seqlens`, tag or id. Both
  come before any work.

Sources: Hochreiter & Schmidhuber, "Long Short-Term Memory", 1997; Lafferty, McCallum & Pereira,
"Conditional Random Fields", 2001.
"""

from __future__ import annotations

from xdistil_fast.torch_ops.crf import crf_log_likelihood, crf_marginals, crf_viterbi
from xdistil_fast.torch_ops.layers import bilstm, embedding, linear
from xdistil_fast.torch_ops.pooling import pool

__all__ = [
    "bilstm",
    "crf_log_likelihood",
    "crf_marginals",
    "crf_viterbi",
    "embedding",
    "linear",
    "pool",
]
