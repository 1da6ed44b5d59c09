"""Torch modules on our kernels: `BiLSTM`, `Linear`, `Pool`, `CRF`; padded batches to ragged ones.

The modules work on ragged batches: `values` [total, ...] holds the sequences one after the other
and `cu_seqlens` [B+1] their offsets, from 0 to `total`. No padding is computed, and a sequence's
result does not depend, to the bit, on the others in its batch. Padded batches and PackedSequence
are accepted too and turned into that form and back. The parameters are named and shaped as in
torch.nn.LSTM and in pytorch-crf, so their state dicts load here and ours load there.

Dtypes, devices, autocast and errors are those of `xdistil_fast.torch_ops`: float32 or float64 on
the CPU, float32 or bfloat16 on a GPU, ValueError or TypeError before any work.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from xdistil_fast import torch_ops
from xdistil_fast.model_config import POOLINGS
from xdistil_fast.ragged import cu_seqlens_of, pack_padded, packed_order, unpack_padded

__all__ = ["CRF", "BiLSTM", "Linear", "Pool", "cu_seqlens_of", "pack_padded", "unpack_padded"]

_REDUCTIONS = ("none", "sum", "mean", "token_mean")


class BiLSTM(nn.Module):
    """One bidirectional LSTM layer over ragged batches.

    Parameters are those of `torch.nn.LSTM(input_size, hidden_size, bidirectional=True)`, by name
    (`weight_ih_l0`, `weight_hh_l0`, `bias_ih_l0`, `bias_hh_l0` and the same with `_reverse`), shape
    (gate rows i, f, g, o) and initial distribution: with the same seed they get the same values.

    Only the output sequence is returned. The final states h_n are rows of it (the last row's first
    half, the first row's second half); c_n is not kept. The state starts at zero.

    Under torch.autocast the layer returns float32; in bfloat16, on a processor that multiplies it,
    products take rounded operands (`torch_ops.bilstm`), else all is computed in float32.

    Shapes:
        * ragged: values [total, I] and cu_seqlens [B+1] -> [total, 2H];
        * padded: [T, B, I] ([B, T, I] with `batch_first`) and, optionally, `lengths` [B] or `mask`
          of the first two dimensions -> [T, B, 2H], zero beyond a sequence's end. Unlike with
          torch.nn.LSTM, the reverse direction starts at the sequence's end, never in padding;
        * PackedSequence of [*, I] -> PackedSequence of [*, 2H].

    Source: Hochreiter & Schmidhuber, "Long Short-Term Memory", Neural Computation 9(8), 1997, with
    the forget gate of Gers et al., 2000.

    Args:
        input_size: I, at least 1.
        hidden_size: H of each direction, at least 1.
        batch_first: whether padded batches come as [B, T, I].
        device: where the parameters live.
        dtype: of the parameters.

    Raises:
        ValueError: a size is not positive.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("input_size", input_size), ("hidden_size", hidden_size)):
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.batch_first = batch_first

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.weight_ih_l0 = parameter(4 * hidden_size, input_size)
        self.weight_hh_l0 = parameter(4 * hidden_size, hidden_size)
        self.bias_ih_l0 = parameter(4 * hidden_size)
        self.bias_hh_l0 = parameter(4 * hidden_size)
        self.weight_ih_l0_reverse = parameter(4 * hidden_size, input_size)
        self.weight_hh_l0_reverse = parameter(4 * hidden_size, hidden_size)
        self.bias_ih_l0_reverse = parameter(4 * hidden_size)
        self.bias_hh_l0_reverse = parameter(4 * hidden_size)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws all parameters from U(-1/sqrt(H), 1/sqrt(H)), as torch.nn.LSTM does."""
        bound = 1.0 / math.sqrt(self.hidden_size)
        for weight in self._weights():
            nn.init.uniform_(weight, -bound, bound)

    def extra_repr(self) -> str:
        """What print(module) shows."""
        return f"{self.input_size}, {self.hidden_size}, batch_first={self.batch_first}"

    def _weights(self) -> list[Tensor]:
        return [
            self.weight_ih_l0,
            self.weight_hh_l0,
            self.bias_ih_l0,
            self.bias_hh_l0,
            self.weight_ih_l0_reverse,
            self.weight_hh_l0_reverse,
            self.bias_ih_l0_reverse,
            self.bias_hh_l0_reverse,
        ]

    def forward(
        self,
        values: Tensor | PackedSequence,
        cu_seqlens: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor | PackedSequence:
        """Runs the layer; see the class for the forms of batch it takes.

        Args:
            values: ragged [total, I], padded [T, B, I] (or [B, T, I]), or a PackedSequence.
            cu_seqlens: [B+1], for ragged values and only for them.
            lengths: [B], for padded values.
            mask: [T, B] (or [B, T]), for padded values instead of `lengths`.

        Returns:
            The hidden states in the form of `values`, last dimension 2H.

        Raises:
            TypeError: a dtype is not supported, or dtypes differ.
            ValueError: shapes do not fit, or arguments that do not go together were given.
        """
        if isinstance(values, PackedSequence):
            if cu_seqlens is not None or lengths is not None or mask is not None:
                raise ValueError(
                    "a PackedSequence has its lengths: give no cu_seqlens, lengths or mask"
                )
            order, offsets = packed_order(values)
            order = order.to(values.data.device)
            inverse = torch.empty_like(order)
            inverse[order] = torch.arange(order.shape[0], device=order.device)
            out = self._ragged(values.data.index_select(0, order), offsets)
            return values._replace(data=out.index_select(0, inverse))
        if values.dim() == 3:
            if cu_seqlens is not None:
                raise ValueError(
                    "values of three dimensions are a padded batch: give lengths or mask, "
                    "not cu_seqlens"
                )
            rows, offsets = pack_padded(values, lengths, mask, batch_first=self.batch_first)
            steps = values.shape[1 if self.batch_first else 0]
            out = self._ragged(rows, offsets)
            return unpack_padded(out, offsets, steps=steps, batch_first=self.batch_first)
        if cu_seqlens is None or lengths is not None or mask is not None:
            raise ValueError(
                f"values of shape {list(values.shape)} are a ragged batch: give cu_seqlens, "
                "and neither lengths nor mask"
            )
        return self._ragged(values, cu_seqlens)

    def _ragged(self, values: Tensor, cu_seqlens: Tensor) -> Tensor:
        if values.dim() != 2 or values.shape[1] != self.input_size:
            raise ValueError(
                f"values must have shape [total, {self.input_size}], got {list(values.shape)}"
            )
        return torch_ops.bilstm(values, cu_seqlens, self._weights())

    @classmethod
    def from_torch(cls, lstm: nn.LSTM) -> BiLSTM:
        """A copy of a torch.nn.LSTM.

        Args:
            lstm: one layer, bidirectional, with biases, neither projection nor dropout.

        Returns:
            A BiLSTM with its own copy of the weights, of the same dtype and device.

        Raises:
            ValueError: the LSTM is of another kind; the message says in what.
        """
        for name, has, wants in (
            ("num_layers", lstm.num_layers, 1),
            ("bidirectional", lstm.bidirectional, True),
            ("bias", lstm.bias, True),
            ("proj_size", lstm.proj_size, 0),
            # torch applies it between layers only, so that with one layer it promises in vain.
            ("dropout", lstm.dropout, 0),
        ):
            if has != wants:
                raise ValueError(f"lstm has {name}={has}; BiLSTM supports {name}={wants} only")
        weight = next(lstm.parameters())
        module = cls(
            lstm.input_size,
            lstm.hidden_size,
            batch_first=lstm.batch_first,
            device=weight.device,
            dtype=weight.dtype,
        )
        module.load_state_dict(lstm.state_dict())
        return module.train(lstm.training)

    def to_torch(self) -> nn.LSTM:
        """A copy as a torch.nn.LSTM, of the same dtype and device."""
        lstm = nn.LSTM(
            self.input_size,
            self.hidden_size,
            batch_first=self.batch_first,
            bidirectional=True,
            device=self.weight_ih_l0.device,
            dtype=self.weight_ih_l0.dtype,
        )
        lstm.load_state_dict(self.state_dict())
        return lstm.train(self.training)


class Linear(nn.Linear):
    """torch.nn.Linear over a ragged batch, on our kernels.

    Beside the BiLSTM it spares a step the change from one thread pool to another: torch's threads
    go on spinning for milliseconds after each of its operators and keep ours from their cores.

    Args: those of torch.nn.Linear; `bias` must be True.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not bias:
            raise ValueError("bias must be True, got False")
        super().__init__(in_features, out_features, device=device, dtype=dtype)

    def forward(self, values: Tensor) -> Tensor:
        """`values` [total, in_features] to [total, out_features]."""
        return torch_ops.linear(values, self.weight, self.bias)


class Pool(nn.Module):
    """One state for each sequence of a ragged batch: values [total, D] and cu_seqlens -> [B, D].

    Args:
        pooling: "max", "mean" or "last"; see `xdistil_fast.torch_ops.pool`.

    Raises:
        ValueError: another pooling.
    """

    def __init__(self, pooling: str = "max") -> None:
        super().__init__()
        if pooling not in POOLINGS:
            raise ValueError(f"pooling is {pooling!r}; allowed: {', '.join(map(repr, POOLINGS))}")
        self.pooling = pooling

    def forward(self, values: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Pools each sequence; an empty one gives zeros."""
        return torch_ops.pool(values, cu_seqlens, self.pooling)

    def extra_repr(self) -> str:
        """The pooling, for `repr`."""
        return self.pooling


class CRF(nn.Module):
    """Linear-chain conditional random field over ragged batches.

    The score of tags y_1..y_T is start[y_1] + sum_t emissions[t, y_t]
    + sum_t transitions[y_t, y_{t+1}] + end[y_T]; their probability is its softmax over all tag
    sequences of that length. Names, argument order and meaning are those of pytorch-crf
    (`start_transitions`, `end_transitions`, `transitions[from, to]`, forward returns the
    log-likelihood, not its negative), and so is the initial distribution, U(-0.1, 0.1). Beyond it,
    sequences of length 0 are allowed: log-likelihood 0, no tags.

    Under torch.autocast everything is computed and returned in float32.

    Shapes (C is `num_tags`):
        * ragged: emissions [total, C], tags [total], `cu_seqlens` [B+1];
        * padded: emissions [T, B, C], tags and `mask` [T, B], or with `batch_first` [B, T, C] and
          [B, T]. The mask keeps the first steps of each sequence; None keeps all.

    Source: Lafferty, McCallum & Pereira, "Conditional Random Fields: Probabilistic Models for
    Segmenting and Labeling Sequence Data", ICML 2001.

    Args:
        num_tags: C, at least 1.
        batch_first: whether padded batches come as [B, T, ...].
        constraints: start [C] and transitions [C, C], 0 where a move is allowed and -inf where it
            is not (`xdistil_fast.labels.bio_constraints` makes those of BIO labels). They hold
            everywhere: a forbidden path has probability 0, is never decoded, and has
            log-likelihood -inf as training tags. They are not part of the state dict.
        device: where the parameters live.
        dtype: of the parameters.

    Raises:
        ValueError: `num_tags` is not positive, or `constraints` have a wrong shape or value.
    """

    _start_constraints: Tensor | None
    _transition_constraints: Tensor | None

    def __init__(
        self,
        num_tags: int,
        batch_first: bool = False,
        constraints: tuple[Any, Any] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_tags < 1:
            raise ValueError(f"num_tags must be at least 1, got {num_tags}")
        self.num_tags = num_tags
        self.batch_first = batch_first
        self.start_transitions = nn.Parameter(torch.empty(num_tags, device=device, dtype=dtype))
        self.end_transitions = nn.Parameter(torch.empty(num_tags, device=device, dtype=dtype))
        self.transitions = nn.Parameter(torch.empty(num_tags, num_tags, device=device, dtype=dtype))
        self.register_buffer("_start_constraints", None, persistent=False)
        self.register_buffer("_transition_constraints", None, persistent=False)
        if constraints is not None:
            start, transitions = constraints
            self._start_constraints = self._constraint("start", start, (num_tags,))
            self._transition_constraints = self._constraint(
                "transitions", transitions, (num_tags, num_tags)
            )
        self.reset_parameters()

    def _constraint(self, name: str, given: Any, shape: tuple[int, ...]) -> Tensor:
        parameter = self.transitions
        constraint = torch.as_tensor(given, device=parameter.device, dtype=parameter.dtype).clone()
        if tuple(constraint.shape) != shape:
            raise ValueError(
                f"constraints: {name} must have shape {list(shape)}, got {list(constraint.shape)}"
            )
        if not bool(((constraint == 0) | (constraint == -math.inf)).all()):
            raise ValueError(f"constraints: {name} must hold 0 (allowed) or -inf (forbidden) only")
        return constraint

    def reset_parameters(self) -> None:
        """Draws all parameters from U(-0.1, 0.1), as pytorch-crf does."""
        for parameter in (self.start_transitions, self.end_transitions, self.transitions):
            nn.init.uniform_(parameter, -0.1, 0.1)

    def extra_repr(self) -> str:
        """What print(module) shows."""
        constrained = self._start_constraints is not None
        return f"{self.num_tags}, batch_first={self.batch_first}, constrained={constrained}"

    def _scores(self) -> tuple[Tensor, Tensor, Tensor]:
        start: Tensor = self.start_transitions
        transitions: Tensor = self.transitions
        if self._start_constraints is not None and self._transition_constraints is not None:
            start = start + self._start_constraints
            transitions = transitions + self._transition_constraints
        return start, self.end_transitions, transitions

    def _ragged(
        self, emissions: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if emissions.dim() not in (2, 3) or emissions.shape[-1] != self.num_tags:
            raise ValueError(
                f"emissions must be ragged [total, {self.num_tags}] or padded with "
                f"{self.num_tags} as the last of three dimensions, got {list(emissions.shape)}"
            )
        if emissions.dim() == 3:
            if cu_seqlens is not None:
                raise ValueError(
                    "emissions of three dimensions are a padded batch: give mask, not cu_seqlens"
                )
            return pack_padded(emissions, mask=mask, batch_first=self.batch_first)
        if cu_seqlens is None or mask is not None:
            raise ValueError(
                "emissions of two dimensions are a ragged batch: give cu_seqlens=, not mask"
            )
        return emissions, cu_seqlens

    def forward(
        self,
        emissions: Tensor,
        tags: Tensor,
        mask: Tensor | None = None,
        reduction: str = "sum",
        *,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Log-likelihood of tags; see the class for the forms of batch.

        Args:
            emissions: ragged [total, C] or padded.
            tags: ragged [total] or padded, int32 or int64, each in 0..C-1 where it counts.
            mask: for padded emissions.
            reduction: "none", "sum", "mean" (over sequences) or "token_mean" (over pieces).
            cu_seqlens: [B+1], for ragged emissions.

        Returns:
            [B] for "none", else a scalar.

        Raises:
            TypeError: a dtype is not supported, or dtypes differ.
            ValueError: shapes do not fit, a tag is out of range, or `reduction` is unknown.
        """
        if reduction not in _REDUCTIONS:
            raise ValueError(f"reduction must be one of {_REDUCTIONS}, got {reduction!r}")
        if tags.shape != emissions.shape[:-1]:
            raise ValueError(
                f"tags must have shape {list(emissions.shape[:-1])} like emissions, "
                f"got {list(tags.shape)}"
            )
        values, offsets = self._ragged(emissions, mask, cu_seqlens)
        if emissions.dim() == 3:
            tags, _ = pack_padded(tags, mask=mask, batch_first=self.batch_first)
        log_likelihood = torch_ops.crf_log_likelihood(values, offsets, tags, *self._scores())
        if reduction == "none":
            return log_likelihood
        if reduction == "sum":
            return log_likelihood.sum()
        if reduction == "mean":
            return log_likelihood.mean()
        return log_likelihood.sum() / values.shape[0]

    @torch.no_grad()
    def decode(
        self,
        emissions: Tensor,
        mask: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
    ) -> list[list[int]]:
        """Best tags of each sequence (Viterbi), ties towards the lower tag.

        `xdistil_fast.torch_ops.crf_viterbi` gives the same as tensors, with the scores.

        Args:
            emissions: ragged [total, C] or padded.
            mask: for padded emissions.
            cu_seqlens: [B+1], for ragged emissions.

        Returns:
            One list of tags a sequence, of its length.

        Raises:
            TypeError: a dtype is not supported, or dtypes differ.
            ValueError: shapes do not fit.
        """
        values, offsets = self._ragged(emissions, mask, cu_seqlens)
        tags, _ = torch_ops.crf_viterbi(values, offsets, *self._scores())
        flat, bounds = tags.tolist(), offsets.tolist()
        return [flat[begin:end] for begin, end in itertools.pairwise(bounds)]

    @torch.no_grad()
    def marginals(
        self,
        emissions: Tensor,
        mask: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Probability of each tag at each piece, by forward-backward; carries no gradient.

        Args:
            emissions: ragged [total, C] or padded.
            mask: for padded emissions.
            cu_seqlens: [B+1], for ragged emissions.

        Returns:
            Like `emissions`; zero where a padded batch has no piece.

        Raises:
            TypeError: a dtype is not supported, or dtypes differ.
            ValueError: shapes do not fit.
        """
        values, offsets = self._ragged(emissions, mask, cu_seqlens)
        probabilities = torch_ops.crf_marginals(values, offsets, *self._scores())
        if emissions.dim() == 2:
            return probabilities
        steps = emissions.shape[1 if self.batch_first else 0]
        return unpack_padded(probabilities, offsets, steps=steps, batch_first=self.batch_first)
