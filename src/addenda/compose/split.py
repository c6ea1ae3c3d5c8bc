"""Other adapters for other tokens or other examples, and the batch repeated for each of several.

    Split("a", "b", sizes=(3, None))          the first 3 tokens through a, the rest through b
    Split("q", "d", sizes=torch.tensor([4, 7]))   in row 0 the first 4 tokens through q, in row 1 the first 7
    Split("q", "d", by=numbers)               token j of row i through part numbers[i, j]; (batch, tokens)
    Split("q", "d", by="separator:102")       a pair in one sequence: up to the first token 102 through q, then d
    Split("q", "d", by="types")               by the model's token_type_ids, 0: q, 1: d
    Split("q", "d", by=function)              function(inputs) -> numbers, of the model's tensors by name, each forward

Parts run on their own tokens alone, in any layer that works token by token: products, norms, changes of activations.
What is behind the pooling sees no tokens any more. `pooled` says which part acts there; without it a head belongs to
the one part that has one, and anything else is refused.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from addenda.compose.stack import Composition, Cut, Held, Part, Way, plain_in, same
from addenda.core.base.errors import AddendaError
from addenda.core.forward.tensors import SiteTensors

By = str | Tensor | Callable[[Mapping[str, Any]], Tensor]
SEPARATOR, TYPES = "separator:", "types"
READ = ("input_ids", "inputs_embeds", "pixel_values", "input_features", "input_values", "decoder_input_ids")  # batches
PLACES = ("cache_position", "logits_to_keep")  # tensors of places in a row, which are no batch


class _Ranges(Composition):
    """A composition with other parts for other ranges of one dimension."""

    spreads = True
    dim, what = 0, ""

    def __init__(self, *parts: Part, sizes: Sequence[int | None]):
        super().__init__(*parts)
        if not isinstance(sizes, Sequence) or isinstance(sizes, str | bytes):
            raise AddendaError(f"{type(self).__name__}'s sizes are a list of numbers of {self.what}, got {sizes!r}.")
        self.sizes = tuple(sizes)
        named = [s for s in self.sizes if s is not None]
        valid = all(isinstance(s, int) and s >= 0 for s in named)
        if len(self.sizes) != len(parts) or len(self.sizes) - len(named) > 1 or not valid:
            raise AddendaError(
                f"{type(self).__name__} of {len(parts)} wants as many sizes (numbers of {self.what}, at most one None "
                f"for the rest), got {self.sizes}."
            )

    def ranges(self, length: int) -> Iterator[tuple[int, int]]:
        total = sum(s for s in self.sizes if s is not None)
        if total > length or (None not in self.sizes and total != length):
            raise AddendaError(
                f"{type(self).__name__} gives {total} {self.what} to its parts, and a layer got {length}. The sizes "
                "must sum to that, or leave the rest to one part with None."
            )
        start = 0
        for size in self.sizes:
            end = start + (length - total if size is None else size)
            yield start, end
            start = end

    def act(self, way: Way, v: Tensor, cut: Cut) -> Tensor:
        if v.dim() < way.least + self.dim or (self.dim and way.images):
            raise AddendaError(
                f"A layer got an input of shape {tuple(v.shape)}, which has no dimension of {self.what} for "
                f"{type(self).__name__}. Leave such layers out of the adapters with exclude=."
            )
        outputs = []
        for part, (start, end) in zip(self.parts, self.ranges(v.shape[self.dim]), strict=True):

            def piece(t: Tensor, start: int = start, end: int = end) -> Tensor:
                return t.narrow(self.dim, start, end - start)

            outputs.append(way.at(piece).run(part, piece(v), lambda t, piece=piece: piece(cut(t))))
        return torch.cat(outputs, self.dim)


class Split(_Ranges):
    """A composition with other adapters for other tokens; see the module.

    sizes: how many tokens each takes, None, once, for the rest; or a tensor (batch) of two parts, (batch, parts − 1)
    of more: how many the first ones take in each row, the last one takes the rest. by: which part each token is of.
    pooled: the number of the part that acts in layers which see no tokens.
    """

    dim, what = 1, "tokens"

    def __init__(
        self,
        *parts: Part,
        sizes: Sequence[int | None] | Tensor | None = None,
        by: By | None = None,
        pooled: int | None = None,
    ):
        if (sizes is None) == (by is None):
            raise AddendaError("Split wants to know which tokens are whose: give sizes=, or by=, and not both.")
        if pooled is not None and (type(pooled) is not int or not 0 <= pooled < len(parts)):
            raise AddendaError(f"pooled is the number of a part, 0 to {len(parts) - 1}, got {pooled!r}.")
        self.pooled, self.by = pooled, by
        if isinstance(sizes, Tensor):
            self.by = _by_row(sizes, len(parts))
        if self.by is None:
            super().__init__(*parts, sizes=sizes if sizes is not None and not isinstance(sizes, Tensor) else ())
        else:
            Composition.__init__(self, *parts)
            self.sizes = ()
            _check_by(self.by)

    @property
    def asks(self) -> bool:
        """Whether it must be told of the model's inputs in each forward."""
        return self.by is not None or self.pooled is not None

    def numbers(self, inputs: Mapping[str, Any], shape: tuple[int, int]) -> Tensor | None:
        """Return the part of each token (batch, tokens) in a forward with these inputs; None where sizes say it."""
        if self.by is None:
            return None
        if isinstance(self.by, str):
            found = _types(inputs) if self.by == TYPES else _behind(inputs, int(self.by.removeprefix(SEPARATOR)))
        else:
            found = self.by(inputs) if callable(self.by) else self.by
        if not isinstance(found, Tensor) or tuple(found.shape) != shape or found.is_floating_point():
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise AddendaError(
                f"Split's by= must give a whole number for each token of the batch, {shape}, and gave {got}."
            )
        if found.numel() and not (int(found.min()) >= 0 and int(found.max()) < len(self.parts)):
            raise AddendaError(
                f"Split of {len(self.parts)} parts takes numbers from 0 to {len(self.parts) - 1}, and by= gave "
                f"{int(found.min())} to {int(found.max())}."
            )
        return found.long()

    def plain(self, held: Held) -> tuple[SiteTensors, ...] | None:
        lists = [plain_in(p, held) for p in self.parts]
        if all(same(lists[0], other) for other in lists[1:]):
            return lists[0]
        if not any(_has_head(found) for found in lists):
            return None
        if self.pooled is not None:
            return lists[self.pooled]
        heads = [found for found in lists if found]
        return heads[0] if all(same(heads[0], other) for other in heads[1:]) else None

    def act(self, way: Way, v: Tensor, cut: Cut) -> Tensor:
        which = way.seen.which(self.key) if self.asks else None
        if which is not None and self._is_pooled(way, v, cut(which.blank)):
            return way.at(_none_of).run(self.parts[self.pooled or 0], v, cut)
        if which is None or which.numbers is None:
            return super().act(way, v, cut)
        numbers = cut(which.numbers)
        if v.dim() >= way.least + 1 and len(v) == 1:  # positions, which all rows share
            v = v.expand(len(numbers), *v.shape[1:])
        if v.shape[:2] != numbers.shape or v.dim() < way.least + 1:
            raise AddendaError(
                f"A layer got an input of shape {tuple(v.shape)}, and Split knows the parts of "
                f"{tuple(numbers.shape)} tokens. Where it is behind the pooling, say with pooled= which part acts "
                "there; else leave such layers out of the adapters with exclude=."
            )
        places, back = which.places(numbers)
        flat, outputs = v.flatten(0, 1), []
        for part, at in zip(self.parts, places, strict=True):
            if len(at) == len(flat):
                return way.run(part, v, cut)
            if len(at):

                def piece(t: Tensor, at: Tensor = at) -> Tensor:
                    return t.flatten(0, 1)[at.to(t.device)]

                outputs.append(way.at(piece).run(part, flat[at], lambda t, piece=piece: piece(cut(t))))
        return torch.cat(outputs)[back].unflatten(0, tuple(numbers.shape))

    def _is_pooled(self, way: Way, v: Tensor, blank: Tensor) -> bool:
        """Return whether v is of whole rows, without tokens, where it was said who acts then."""
        return self.pooled is not None and v.dim() == way.least and len(v) == len(blank)


class BatchSplit(_Ranges):
    """A composition with other adapters for other examples. See also `addenda.per_example`."""

    dim, what = 0, "examples"

    def __init__(self, *parts: Part, sizes: Sequence[int]):
        # a layer whose input is flat would take the rest for more examples
        if isinstance(sizes, Sequence) and not isinstance(sizes, str | bytes) and None in sizes:
            raise AddendaError(f"BatchSplit wants every size, so that it can check the batch; got {tuple(sizes)}.")
        super().__init__(*parts, sizes=sizes)


class Parallel(Composition):
    """A composition that repeats the batch for every part: rows i·B to (i+1)·B of the output are those of part i.

    Every tensor among the model's arguments whose first dimension is the batch is repeated, those in tuples and outputs
    of an encoder too. That is not for `generate`, which picks the next token of each row that it was given: repeat the
    inputs, and let `BatchSplit` share them out.
    """

    outside, spreads = True, True

    def act(self, way: Way, v: Tensor, cut: Cut) -> Tensor:
        if len(v) % len(self.parts):
            raise AddendaError(
                f"Parallel of {len(self.parts)} got {len(v)} rows in a layer, which is no multiple of it."
            )
        split = BatchSplit(*self.parts, sizes=[len(v) // len(self.parts)] * len(self.parts))
        return split.act(way, v, cut)

    def repeat(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Return the model's arguments with the batch of each repeated."""
        read = [kwargs[name] for name in READ if name in kwargs]
        batch = next((len(t) for t in [*read, *args, *kwargs.values()] if isinstance(t, Tensor) and t.dim()), None)
        if batch is None:
            raise AddendaError("Parallel found no tensor among the model's arguments to repeat.")

        def repeated(t: Any) -> Any:
            if isinstance(t, Tensor):
                return torch.cat([t] * len(self.parts)) if t.dim() > 0 and len(t) == batch else t
            if isinstance(t, tuple | list):
                return [repeated(v) for v in t] if isinstance(t, list) else tuple(map(repeated, t))
            if hasattr(t, "to_tuple"):  # what an encoder returned
                made: Any = type(t)
                return made(**{k: repeated(v) for k, v in t.items()})
            return t

        return tuple(map(repeated, args)), {k: t if k in PLACES else repeated(t) for k, t in kwargs.items()}


# -- which part a token is of ------------------------------------------------------------------------------------------


def _none_of(t: Tensor) -> Tensor:
    return t


def _has_head(found: tuple[SiteTensors, ...] | None) -> bool:
    """Return whether a trained copy of a head is here, which belongs to its adapter as a whole."""
    return any(not t.method.name for t in found or ())


def _check_by(by: Any) -> None:
    number = by.removeprefix(SEPARATOR) if isinstance(by, str) else ""
    known = isinstance(by, str) and (
        by == TYPES or (by.startswith(SEPARATOR) and number.isascii() and number.isdigit() and len(number) < 10)
    )
    if not (known or isinstance(by, Tensor) or (callable(by) and not isinstance(by, str))):
        raise AddendaError(
            f"Split's by= is a tensor (batch, tokens), a function of the model's inputs, {TYPES!r}, or "
            f"'{SEPARATOR}102' with the id of the token between the parts; got {str(by)[:100]!r}."
        )


def _by_row(sizes: Tensor, parts: int) -> Callable[[Mapping[str, Any]], Tensor]:
    """Return a function that gives the part of each token, from how many the first parts take in each row."""
    table = sizes[:, None] if sizes.dim() == 1 else sizes
    if table.dim() != 2 or table.shape[1] != parts - 1 or table.is_floating_point() or bool((table < 0).any()):
        raise AddendaError(
            f"Split of {parts} wants whole numbers for each row of all parts but the last, (batch"
            f"{'' if parts == 2 else f', {parts - 1}'}), got {tuple(sizes.shape)} of {sizes.dtype}."
        )
    ends = table.cumsum(1)

    def numbers(inputs: Mapping[str, Any]) -> Tensor:
        ids = next(t for t in inputs.values() if isinstance(t, Tensor) and t.dim() > 1)
        if len(ids) != len(ends) or int(ends.max()) > ids.shape[1]:
            raise AddendaError(
                f"Split has sizes for {len(ends)} rows of up to {int(ends.max())} tokens, and the batch is "
                f"{tuple(ids.shape[:2])}."
            )
        at = torch.arange(ids.shape[1], device=ids.device)
        return (at >= ends.to(ids.device)[..., None]).sum(1)

    return numbers


def _types(inputs: Mapping[str, Any]) -> Tensor:
    types = inputs.get("token_type_ids")
    if not isinstance(types, Tensor):
        raise AddendaError("Split(by='types') reads the model's token_type_ids, and got none. Use by='separator:ID'.")
    return types


def _behind(inputs: Mapping[str, Any], separator: int) -> Tensor:
    """Return 0 up to the first separator of each row, and 1 behind it. Padding in front is no separator."""
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        raise AddendaError("Split(by='separator:ID') reads the model's input_ids, (batch, tokens), and got none.")
    at = ids == separator
    if isinstance(mask, Tensor) and mask.shape == ids.shape:
        at = at & mask.bool()
    if not bool(at.any(1).all()):
        row = int((~at.any(1)).nonzero()[0])
        raise AddendaError(
            f"Row {row} of the batch has no token {separator}, which was to stand between its two parts. Encode pairs "
            "with the model's own tokenizer, tokenizer(queries, documents)."
        )
    seen = at.long().cumsum(1)
    return ((seen - at.long()) > 0).long()
