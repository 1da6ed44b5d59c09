"""Batches, students and their rivals of bench/gpu_report.py, all of random weights."""

from __future__ import annotations

from typing import Any

SHAPES = {"32x32": (32, 32), "32x128": (32, 128), "512x128": (512, 128)}
ALL_SHAPES = (*SHAPES, "ragged 32", "ragged 512")
STUDENTS = {"E50 H200": (50, 200), "E100 H200": (100, 200), "E300 H600": (300, 600)}
DEVICE = "cuda"  # tests/cuda/test_report.py lets the sections run in emulation
NUM_TAGS = 9
VOCABULARY = 20_000
# Lengths of word pieces of a sentence, about: a log-normal with median 22.
LOG_MEDIAN, LOG_SIGMA = 3.1, 0.6


def lengths_of(shape: str) -> list[int]:
    """Of a batch: "BxT", or "ragged B" from a seeded log-normal, at most 256."""
    import random

    if shape in SHAPES:
        batch, length = SHAPES[shape]
        return [length] * batch
    generator = random.Random(0)
    batch = int(shape.split()[1])
    return [
        min(256, max(1, round(generator.lognormvariate(LOG_MEDIAN, LOG_SIGMA))))
        for _ in range(batch)
    ]


class Student:
    """A student of random weights with its batch, for us and for torch.nn.LSTM."""

    def __init__(self, input_size: int, hidden: int, shape: str) -> None:
        import torch

        torch.manual_seed(0)
        self.lengths = lengths_of(shape)
        self.total = sum(self.lengths)
        self.hidden, self.input_size = hidden, input_size
        self.ids = torch.randint(VOCABULARY, (self.total,), device=DEVICE)
        self.embedding = torch.randn(VOCABULARY, input_size, device=DEVICE) * 0.5
        self.lstm = torch.nn.LSTM(input_size, hidden, bidirectional=True).to(DEVICE)
        self.linear = torch.nn.Linear(2 * hidden, NUM_TAGS).to(DEVICE)
        self.cu_seqlens = torch.tensor([0, *self.lengths], device=DEVICE).cumsum(0).to(torch.int32)
        self.tags = torch.randint(NUM_TAGS, (self.total,), device=DEVICE)

    @property
    def weights(self) -> list[Any]:
        """As torch_ops.bilstm takes them."""
        return list(self.lstm.parameters())

    def padded(self, rows: Any) -> Any:
        """[total, ...] to [T, B, ...], zeros beyond the ends."""
        import torch

        return torch.nn.utils.rnn.pad_sequence(list(rows.split(self.lengths)))

    def mask(self) -> Any:
        """[T, B], where a padded batch has tokens."""
        import torch

        steps = torch.arange(max(self.lengths), device=DEVICE)[:, None]
        return steps < self.cu_seqlens.diff()[None]


class OurScores:
    """Ids to scores by our kernels alone, as `CudaStudent` runs them, on torch's memory.

    Args:
        student: what is run.
        precision: "float32", "bfloat16" or "int8".
        rows: sequences of a tile; 0: as planned.
        cluster: blocks of a tile; 0: as planned.
        pooling: "max", "mean" or "last", for scores of each sequence; None: of each token.
    """

    def __init__(
        self,
        student: Student,
        precision: str,
        rows: int = 0,
        cluster: int = 0,
        pooling: str | None = None,
    ) -> None:
        import torch

        from xdistil_fast import _backend
        from xdistil_fast.torch_ops import cuda

        self.extension = _backend.cuda()
        self.precision, self.pooling = precision, pooling
        hidden, batch = student.hidden, len(student.lengths)
        weights = [weight.detach() for weight in student.weights]
        self.plan = _backend.lstm_plan(precision, False, hidden, batch, 0, rows, cluster)
        self.scales = torch.zeros(0, device=DEVICE)
        self.output = student.linear.weight.detach()
        if precision == "int8":
            dtype = torch.int8
            self._pack_bytes(weights)
        else:
            dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
            self.packed = cuda._packed([weight.to(dtype) for weight in weights], backward=False)
        inputs = cuda._interleave([weights[0], weights[4]])
        bias = cuda._interleave([weights[2] + weights[3], weights[6] + weights[7]])
        table = torch.addmm(bias, student.embedding, inputs.t())
        self.table = table if precision == "float32" else table.half()
        self.ids = student.ids.to(torch.int32)
        self.cu_seqlens, self.student = student.cu_seqlens, student
        self.order = torch.empty(batch, dtype=torch.int32, device=DEVICE)
        self.out = torch.empty((student.total, 2 * hidden), dtype=dtype, device=DEVICE)
        self.bounds = torch.stack([self.cu_seqlens[:-1], self.cu_seqlens[1:]], dim=1)
        self.counts = self.cu_seqlens.diff()
        self.pooled = torch.empty((batch, 2 * hidden), device=DEVICE)
        self.scores = torch.empty((batch if pooling else student.total, NUM_TAGS), device=DEVICE)

    def _pack_bytes(self, weights: list[Any]) -> None:
        """Weights as `xdistil quantize` rounds them; those of the output layer take levels."""
        import torch

        from xdistil_fast.quantization import quantize_matrix
        from xdistil_fast.torch_ops import cuda

        pairs = [
            [torch.from_numpy(part).to(DEVICE) for part in quantize_matrix(name, weight)]
            for name, weight in (
                ("bilstm.weight_hh_l0", weights[1].cpu().numpy()),
                ("bilstm.weight_hh_l0_reverse", weights[5].cpu().numpy()),
                ("output.weight", self.output.cpu().numpy()),
            )
        ]
        (forward, forward_scales), (reverse, reverse_scales), (output, output_scales) = pairs
        self.output = output * (output_scales[:, None] / 63)
        self.scales = cuda._interleave([forward_scales / 63, reverse_scales / 63])
        size = self.extension.lstm_packed_size("int8", False, forward.shape[1])
        self.packed = torch.empty(size, dtype=torch.int8, device=DEVICE)
        pointers = [tensor.data_ptr() for tensor in (forward, reverse, self.packed)]
        place = cuda._place(self.packed)
        self.extension.lstm_pack("int8", False, forward.shape[1], False, *pointers, *place)

    def __call__(self) -> Any:
        """[total, num_tags], or [B, num_tags] with a pooling."""
        import torch

        stream = torch.cuda.current_stream().cuda_stream if DEVICE == "cuda" else 0
        total, batch = self.student.total, len(self.student.lengths)
        hidden = self.student.hidden
        offsets, order = self.cu_seqlens.data_ptr(), self.order.data_ptr()
        self.extension.order_by_length(batch, total, offsets, order, 0, stream)
        self.extension.lstm_forward(
            self.precision, hidden, self.plan, batch, total, offsets, order,
            self.packed.data_ptr(), self.table.data_ptr(),
            "float32" if self.precision == "float32" else "float16",
            self.ids.data_ptr(), self.out.data_ptr(), 0, 0, 0, stream, self.scales.data_ptr(),
        )  # fmt: skip
        kind, states = self.precision, self.out
        if self.pooling is not None:
            kind, states = "float32", self.pooled
            mean = self.pooling == "mean"
            self.extension.pool_rows(
                "sum" if mean else self.pooling, self.precision, total, batch, 2 * hidden,
                self.bounds.data_ptr(), self.counts.data_ptr() if mean else 0,
                self.out.data_ptr(), states.data_ptr(), 0, 0, stream,
            )  # fmt: skip
        self.extension.linear(
            kind, "float32", len(self.scores), NUM_TAGS, 2 * hidden, states.data_ptr(),
            self.output.data_ptr(), self.student.linear.bias.data_ptr(),
            self.scores.data_ptr(), 0, stream,
        )  # fmt: skip
        return self.scores


def pool_padded(hidden: Any, mask: Any, pooling: str) -> Any:
    """States [T, B, 2H] of padded sequences to [B, 2H]; mask [T, B] is True in a sequence."""
    import torch

    if pooling == "max":
        return hidden.masked_fill(~mask[:, :, None], -torch.inf).amax(0)
    if pooling == "mean":
        return (hidden * mask[:, :, None]).sum(0) / mask.sum(0)[:, None]
    half = hidden.shape[2] // 2
    columns = torch.arange(hidden.shape[1], device=hidden.device)
    return torch.cat([hidden[mask.sum(0) - 1, columns, :half], hidden[0, :, half:]], dim=1)


class TheirScores:
    """Ids to scores by an embedding, cuDNN's LSTM and a linear layer, padded and dense."""

    def __init__(self, student: Student, precision: str, pooling: str | None = None) -> None:
        import copy

        import torch

        dtype = getattr(torch, precision)
        self.lstm = copy.deepcopy(student.lstm).to(dtype)
        self.lstm.flatten_parameters()
        self.linear = copy.deepcopy(student.linear).to(dtype)
        self.embedding = student.embedding.to(dtype)
        self.ids = student.padded(student.ids)
        self.mask, self.pooling = student.mask(), pooling

    def __call__(self) -> Any:
        """[T, B, num_tags], or [B, num_tags] with a pooling."""
        import torch

        with torch.inference_mode():
            hidden, _ = self.lstm(torch.nn.functional.embedding(self.ids, self.embedding))
            if self.pooling is not None:
                hidden = pool_padded(hidden, self.mask, self.pooling)
            return self.linear(hidden)


def padded_crf_loss(emissions: Any, tags: Any, mask: Any, crf: Any) -> Any:
    """Negative log-likelihood of padded [T, B, C] emissions, as pytorch-crf takes it, in torch."""
    import torch

    start, end, transitions = crf
    steps, batch = tags.shape
    columns = torch.arange(batch, device=tags.device)
    score = start[tags[0]] + emissions[0, columns, tags[0]]
    alpha = start + emissions[0]
    for t in range(1, steps):
        move = transitions[tags[t - 1], tags[t]] + emissions[t, columns, tags[t]]
        score = score + move * mask[t]
        following = torch.logsumexp(alpha[:, :, None] + transitions, 1) + emissions[t]
        alpha = torch.where(mask[t][:, None], following, alpha)
    last = mask.sum(0) - 1
    score = score + end[tags[last, columns]]
    return (torch.logsumexp(alpha + end, 1) - score).sum()
