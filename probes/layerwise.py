"""Walking a model layer by layer over calibration tokens, each layer on the compressed prefix.

The references hold the hidden states of all calibration tokens in memory; here they lie in a
scratch file, so that memory holds the model, one sequence and one layer's statistics. A layer is
called with what the model's own forward pass hands to it (masks, positions, rotary embeddings),
caught once: all sequences have the same length.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Generator, Iterator
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from . import trace
from .anatomy import first
from .model import Model

SEQUENCE = 2048  # tokens of a calibration sequence, at most


def sequences(model: Model, texts: list[str], length: int = SEQUENCE) -> Tensor:
    """Token ids `(sequence, token)` of the texts one after the other, cut into equal lengths.

    As few sequences as `length` allows; fewer tokens than there are sequences are left over.
    """
    ids: list[int] = []
    for text in texts:
        ids += model.tokenizer(text)["input_ids"]
    if not ids:
        raise ValueError("the calibration texts hold no token")
    count = -(-len(ids) // min(length, model.context))
    length = len(ids) // count
    return torch.tensor(ids[: count * length], device=model.device).view(count, length)


class Layer:
    """One decoder layer, its inputs, and the means to run it."""

    def __init__(
        self, index: int, block: nn.Module, call: Callable[[Tensor], Tensor], states: _States
    ):
        self.index, self.block = index, block
        self._call, self._states = call, states

    def watch(self, hooks: dict[nn.Module, Callable[[Tensor], None]]) -> None:
        """One pass, handing what each module reads to its hook, `(token, feature)`.

        From the second sequence on it ends where the last of the modules has read.
        """
        order: list[nn.Module] = []
        last: list[nn.Module] = []
        with contextlib.ExitStack() as stack:
            for module, hook in hooks.items():
                handle = module.register_forward_pre_hook(_reader(hook, order, last))
                stack.callback(handle.remove)
            for index, hidden in enumerate(self._states):
                with contextlib.suppress(_ReadError):
                    self._call(hidden)
                if index == 0 and len(order) == len(set(order)) == len(hooks):
                    last.append(order[-1])

    def advance(self) -> None:
        """Replace every state by what comes out of the layer as it is now."""
        self._states.replace(self._call)


class _ReadError(Exception):
    """All that was to be read of this sequence has been read."""


def _reader(
    hook: Callable[[Tensor], None], order: list[nn.Module], last: list[nn.Module]
) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def read(module: nn.Module, args: tuple[Any, ...]) -> None:
        hook(args[0].detach().flatten(0, -2))
        if module in last:
            raise _ReadError
        if not last:
            order.append(module)

    return read


@torch.no_grad()
def walk(model: Model, tokens: Tensor) -> Generator[Layer]:
    """Every layer of `model` in order; change its weights before asking for the next.

    Args:
        model: whose layers are walked and may change on the way.
        tokens: `(sequence, token)` ids of equal length.
    """
    blocks = model.anatomy.blocks(model.module)
    calls = layer_calls(model, tokens[:1])
    with tempfile.TemporaryFile(prefix="prunescope-") as file:
        states = _States(file, model, tokens)
        for index, (block, call) in enumerate(zip(blocks, calls, strict=True)):
            layer = Layer(index, block, call, states)
            yield layer
            if index + 1 < len(blocks):
                layer.advance()


def layer_calls(model: Model, tokens: Tensor) -> list[Callable[[Tensor], Tensor]]:
    """For each layer, hidden state in -> hidden state out, in the surroundings of `tokens`."""
    blocks = model.anatomy.blocks(model.module)
    caught: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def catcher(index: int) -> Callable[..., None]:
        def catch(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            caught[index] = args, kwargs

        return catch

    with contextlib.ExitStack() as stack, torch.no_grad():
        for index, block in enumerate(blocks):
            handle = block.register_forward_pre_hook(catcher(index), with_kwargs=True)
            stack.callback(handle.remove)
        model.module(input_ids=tokens, use_cache=False, logits_to_keep=1)
    return [_bind(block, *caught[index]) for index, block in enumerate(blocks)]


def _bind(
    block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Callable[[Tensor], Tensor]:
    named = "hidden_states" in kwargs

    @torch.no_grad()
    def call(hidden: Tensor) -> Tensor:
        if named:
            return first(block(*args, **{**kwargs, "hidden_states": hidden}))
        return first(block(hidden, *args[1:], **kwargs))

    return call


class _States:
    """Hidden states of every sequence, in a file, `(1, token, d_model)` at a time."""

    def __init__(self, file: BinaryIO, model: Model, tokens: Tensor) -> None:
        self.file, self.count, self.device = file, len(tokens), tokens.device
        for index in range(len(tokens)):
            row = tokens[index : index + 1]
            batch = {"input_ids": row, "attention_mask": torch.ones_like(row)}
            state = trace.entry(model.module, model.anatomy, batch)
            self.shape, self.dtype = state.shape, state.dtype
            self._write(index, state)

    def _write(self, index: int, state: Tensor) -> None:
        data = state.detach().cpu().contiguous().view(torch.uint8).numpy()
        self.size = data.nbytes
        self.file.seek(index * self.size)
        self.file.write(data.tobytes())

    def _read(self, index: int) -> Tensor:
        self.file.seek(index * self.size)
        data = bytearray(self.file.read(self.size))
        return torch.frombuffer(data, dtype=self.dtype).view(self.shape).to(self.device)

    def __iter__(self) -> Iterator[Tensor]:
        return (self._read(index) for index in range(self.count))

    def replace(self, change: Callable[[Tensor], Tensor]) -> None:
        """Put `change(state)` in the place of each state."""
        for index in range(self.count):
            self._write(index, change(self._read(index)))
