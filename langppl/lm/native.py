"""Products and layers compiled for the machine they run on: float32 and bfloat16 on the CPU.

A pass over a few tokens is bound by how fast its weights come from memory, and by what lies
between the products. `native.cpp` has both for layers of Llama's form: weights in panels that are
read in one stream, and everything between them in one go. It is compiled at first use (see
`langppl.lm.compiling`). Where that fails, or where `LANGPPL_NATIVE=0` says so, torch's own products
run.

A row's numbers do not depend on the other rows: products go through their terms in one order.

Where weights are bfloat16, so are keys and values, and what is multiplied with weights is rounded
to it; states and sums are float32. Processors that multiply bfloat16 (AVX512_BF16) do that twice as
fast as float32; on others weights take half the room, and are widened as they are read.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from langppl.lm.compiling import OPTIONS, built, processor

_TOLERANCE = 1e-5
"""How far its product may be from torch's, relative."""


class _Product(ctypes.Structure):
    _fields_ = (
        ("laid", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("inputs", ctypes.c_long),
        ("outputs", ctypes.c_long),
        ("is_brief", ctypes.c_long),
        ("down", ctypes.c_void_p),
        ("up", ctypes.c_void_p),
        ("rank", ctypes.c_long),
        ("scale", ctypes.c_float),
    )


class _Layer(ctypes.Structure):
    _fields_ = (
        ("first", ctypes.c_void_p),
        ("second", ctypes.c_void_p),
        ("first_epsilon", ctypes.c_float),
        ("second_epsilon", ctypes.c_float),
        ("heads", ctypes.c_long),
        ("shared", ctypes.c_long),
        ("width", ctypes.c_long),
        *((name, _Product) for name in ("query", "key", "value", "out", "gate", "up", "down")),
    )


@dataclass(frozen=True)
class Weight:
    """A weight laid out in panels.

    Attributes:
        numbers: its copy.
        outputs: rows of the weight.
        inputs: columns of the weight.
    """

    numbers: Tensor
    outputs: int
    inputs: int
    _products: dict[int, tuple[Tensor | None, _Product]] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        """Float type of the weight, and of what it is multiplied with."""
        return self.numbers.dtype

    def room(self, rows: int) -> Tensor | None:
        """What a product with so many rows needs for itself."""
        return _room(self.dtype, rows, self.inputs)

    def product(self, bias: Tensor | None) -> _Product:
        """With a bias, as compiled functions take it."""
        at = 0 if bias is None else bias.data_ptr()
        found = self._products.get(at)
        if found is None or found[0] is not bias:
            self._products.clear()
            own = _Product(
                self.numbers.data_ptr(),
                at or None,
                self.inputs,
                self.outputs,
                _is_brief(self.dtype),
            )
            self._products[at] = found = (bias, own)
        return found[1]


@functools.cache
def library() -> Any:
    """The compiled functions; None where there are none."""
    return _loaded()[0]


def reason() -> str:
    """Why there are no compiled functions; empty where there are."""
    return _loaded()[1]


@functools.cache
def _loaded() -> tuple[Any, str]:
    if os.environ.get("LANGPPL_NATIVE") == "0":
        return None, "LANGPPL_NATIVE=0"
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return None, f"not made for {platform.system()} on {platform.machine()}"
    why = ""
    # An assembler may not know the newest instructions.
    for options in (OPTIONS, (*OPTIONS, "-mno-avx512bf16")):
        try:
            found = _declared(ctypes.CDLL(str(built(options))))
            if _agrees(found):
                return found, ""
            why = why or "its products are not torch's"
        except subprocess.CalledProcessError as error:
            said = (error.stderr or b"").decode(errors="replace").strip()
            why = why or f"the compiler failed: {said[:500]}"
        except (OSError, RuntimeError, subprocess.SubprocessError, AttributeError) as error:
            return None, f"{type(error).__name__}: {error}"
    return None, why


def _declared(found: Any) -> Any:
    pointer, number, threads = ctypes.c_void_p, ctypes.c_long, ctypes.c_int
    product, layer = ctypes.POINTER(_Product), ctypes.POINTER(_Layer)
    for name, types in {
        "lay_out": (pointer, number, number, pointer, threads),
        "lay_out_brief": (pointer, number, number, pointer, threads),
        "multiply": (product, pointer, number, pointer, pointer, threads),
        "before": (layer, pointer, number, *[pointer] * 5, threads),
        "attend": (
            *[pointer] * 3,
            *[number] * 7,
            ctypes.c_float,
            *[pointer] * 3,
            threads,
        ),
        "after": (layer, pointer, pointer, number, *[pointer] * 4, threads),
        "multiply_back": (
            *(pointer, number, number, number, pointer, pointer, pointer),
            *(number, number, pointer, threads, pointer, threads),
        ),
        "norm": (*(pointer, number, number, pointer, number, ctypes.c_float), pointer, threads),
        "norm_back": (
            *(pointer, number, number, pointer, number, ctypes.c_float),
            *(pointer, pointer, threads),
        ),
        "gated_back": (*[pointer] * 3, number, *[pointer] * 3, threads),
        "turn_back": (*[number] * 4, *[pointer] * 5, threads),
        "run": (
            *(pointer, number, pointer, number),
            *[pointer] * 4,
            *(number, number, number, ctypes.c_float),
            *[pointer] * 3,
            threads,
        ),
    }.items():
        function = getattr(found, f"langppl_{name}")
        function.argtypes, function.restype = types, None
    for name in ("panel", "most_seen", "most_groups", "lanes", "has_brief"):
        function = getattr(found, f"langppl_{name}")
        function.argtypes, function.restype = (), number
    return found


def _agrees(found: Any) -> bool:
    rng = np.random.default_rng(0)
    weight, bias, x = (
        torch.from_numpy(rng.normal(size=size).astype(np.float32))
        for size in ((70, 33), (70,), (19, 33))
    )
    for dtype in DTYPES:
        # Rounded first, so that every term is exact.
        own = [x.to(dtype) for x in (x, weight, bias)]
        x64, weight64, bias64 = (x.double() for x in own)
        expected = x64 @ weight64.T + bias64
        y = _multiplied(found, own[0].float(), _laid_out(found, own[1]), own[2])
        if not bool((y - expected).abs().max() <= _TOLERANCE * expected.abs().max()):
            return False
    return True


DTYPES = (torch.float32, torch.bfloat16)
"""Float types of weights."""


def takes(dtype: torch.dtype) -> bool:
    """Whether weights of a float type are multiplied by compiled functions here.

    Processors with tiles (AMX) have bfloat16 multiplied by oneDNN, which uses them.
    """
    if library() is None:
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and not _has_tiles())


@functools.cache
def _has_tiles() -> bool:
    return "amx_bf16" in processor()


def _is_brief(dtype: torch.dtype) -> bool:
    """Whether compiled functions take a weight as bfloat16."""
    return dtype == torch.bfloat16


def _room(dtype: torch.dtype, rows: int, width: int) -> Tensor | None:
    """For rows as weights of a float type take them."""
    if not _is_brief(dtype):
        return None
    return torch.empty(rows * (width + width % 2), dtype=torch.float32, device="cpu")


def _check(*tensors: Tensor | None, dtype: torch.dtype = torch.float32) -> None:
    """Raises TypeError for what compiled functions would read as something that it is not."""
    for own in tensors:
        if own is not None and (own.dtype != dtype or own.device.type != "cpu"):
            raise TypeError(
                f"compiled functions take {str(dtype).removeprefix('torch.')} on the CPU here, got "
                f"{own.dtype} on {own.device}"
            )


def _check_weight(weight: Tensor) -> None:
    if weight.dtype not in DTYPES:
        raise TypeError(f"weights are float32 or bfloat16, got {weight.dtype}")
    _check(weight, dtype=weight.dtype)


def lay_out(weight: Tensor) -> Weight:
    """A copy of a weight [outputs, inputs] in panels."""
    return _laid_out(library(), weight)


def _laid_out(found: Any, weight: Tensor) -> Weight:
    _check_weight(weight)
    own = weight.detach().contiguous()
    outputs, inputs = own.shape
    panel, deep = found.langppl_panel(), inputs
    lay = found.langppl_lay_out
    if _is_brief(own.dtype):
        lay, deep = found.langppl_lay_out_brief, inputs + inputs % 2
    numbers = own.new_empty(-(-outputs // panel) * panel * deep)
    lay(own.data_ptr(), outputs, inputs, numbers.data_ptr(), torch.get_num_threads())
    return Weight(numbers, outputs, inputs)


def multiply(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """The product x Wᵀ + b, of x [..., inputs], in the float type of x: the weight's or float32."""
    if x.dtype != torch.float32 and x.dtype == weight.dtype:
        return _multiplied(library(), x.float(), weight, bias).to(x.dtype)
    return _multiplied(library(), x, weight, bias)


def _multiplied(found: Any, x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    if x.shape[-1] != weight.inputs:
        raise RuntimeError(f"{weight.inputs} inputs are needed, got {tuple(x.shape)}")
    _check(x)
    _check(bias, dtype=weight.dtype)
    own = x.detach().contiguous()
    y = own.new_empty(*x.shape[:-1], weight.outputs)
    rows = own.numel() // weight.inputs
    room = weight.room(rows)
    found.langppl_multiply(
        weight.product(bias),
        own.data_ptr(),
        rows,
        y.data_ptr(),
        None if room is None else room.data_ptr(),
        torch.get_num_threads(),
    )
    return y


def multiply_back(
    gradients: Tensor,
    weight: Tensor,
    low: Tensor | None = None,
    down: Tensor | None = None,
    into: Tensor | None = None,
) -> Tensor:
    """Gradients of what was multiplied with a weight.

    Args:
        gradients: of the product, shape [..., outputs]; float32, like all but the weight.
        weight: as it is, shape [outputs, inputs], float32 or bfloat16.
        low: gradients of what an adapter's first weight gave, shape [..., rank].
        down: that weight, shape [rank, inputs].
        into: other gradients, in one piece, which these are added to.

    Returns:
        Shape [..., inputs].
    """
    _check(gradients, low, down, into)
    _check_weight(weight)
    outputs, inputs = weight.shape
    own, weight = gradients.contiguous(), weight.contiguous()
    found = own.new_empty(*own.shape[:-1], inputs) if into is None else into
    rank = 0
    if low is not None and down is not None:
        low, down, rank = low.contiguous(), down.contiguous(), len(down)
    rows = own.numel() // outputs
    room = _room(weight.dtype, rows, outputs)
    library().langppl_multiply_back(
        weight.data_ptr(),
        _is_brief(weight.dtype),
        outputs,
        inputs,
        own.data_ptr(),
        None if low is None else low.data_ptr(),
        None if down is None else down.data_ptr(),
        rank,
        rows,
        found.data_ptr(),
        into is not None,
        None if room is None else room.data_ptr(),
        torch.get_num_threads(),
    )
    return found


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter of one product.

    Attributes:
        down: its first weight, [rank, inputs].
        up: its second one, [outputs, rank].
        scale: what its result is multiplied with.
    """

    down: Weight
    up: Weight
    scale: float


PARTS = ("query", "key", "value", "out", "gate", "up", "down")
"""A layer's products, in the order in which `Layer` takes them."""


class Layer:
    """One decoder layer of Llama's form.

    Args:
        weights: its products' weights, biases and adapters, in the order of `PARTS`.
        norms: the weights of its two norms, of the products' float type, and their epsilons.
        width: numbers of a head.

    Raises:
        TypeError: for weights of several float types.
    """

    def __init__(
        self,
        weights: Sequence[tuple[Weight, Tensor | None, Adapter | None]],
        norms: Sequence[tuple[Tensor, float]],
        width: int,
    ) -> None:
        self.weights, self.norms, self.width = weights, norms, width
        (first, first_epsilon), (second, second_epsilon) = norms
        self.inputs, self.inner = weights[0][0].inputs, weights[4][0].outputs
        self.heads, self.shared = (weights[k][0].outputs // width for k in (0, 1))
        self.dtype = weights[0][0].dtype
        if len({self.dtype, *(w.dtype for w, _, _ in weights), first.dtype, second.dtype}) > 1:
            raise TypeError("a layer's weights must be of one float type")
        self._own = _Layer(
            first.data_ptr(),
            second.data_ptr(),
            first_epsilon,
            second_epsilon,
            self.heads,
            self.shared,
            width,
            *(_adapted(*own) for own in weights),
        )
        self.rank = max(own.down.outputs if own else 0 for _, _, own in weights)
        self.address = ctypes.addressof(self._own)
        self._library = library()

    def room(self, rows: int) -> int:
        """Numbers that its calls need for themselves."""
        own = (self.heads + 2 * self.shared) * self.width
        found = rows * (self.inputs + max(own, self.inner) + 4 * self.rank)
        if _is_brief(self.dtype):
            most = max(self.inputs, self.heads * self.width, self.inner)
            found += rows * (most + most % 2)
        return found

    def before(
        self, x: Tensor, cosines: Tensor, sines: Tensor, room: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What attention reads.

        Args:
            x: shape [rows, inputs].
            cosines: of the positions, shape [rows, width].
            sines: likewise.
            room: at least as many numbers as `room` says.

        Returns:
            Queries and keys, shape [heads + shared, rows, width], and values
            [shared, rows, width].
        """
        _check(x, cosines, sines, room)
        rows = len(x)
        turned = x.new_empty(self.heads + self.shared, rows, self.width)
        values = x.new_empty(self.shared, rows, self.width)
        self._library.langppl_before(
            self._own,
            x.data_ptr(),
            rows,
            cosines.data_ptr(),
            sines.data_ptr(),
            turned.data_ptr(),
            values.data_ptr(),
            room.data_ptr(),
            torch.get_num_threads(),
        )
        return turned, values

    def after(
        self,
        found: Tensor,
        x: Tensor,
        room: Tensor,
        kept: tuple[Tensor, Tensor, Tensor] | None = None,
    ) -> None:
        """The rest of the layer.

        Args:
            found: attention's result, shape [rows, heads · width].
            x: what goes into the layer, and then what comes out, shape [rows, inputs].
            room: at least as many numbers as `room` says.
            kept: for a backward pass: takes x between the layer's halves, [rows, inputs], and what
                gate and up gave, each [rows, inner].
        """
        _check(found, x, room)
        self._library.langppl_after(
            self._own,
            found.data_ptr(),
            x.data_ptr(),
            len(x),
            room.data_ptr(),
            *((None,) * 3 if kept is None else (own.data_ptr() for own in kept)),
            torch.get_num_threads(),
        )

    def ranks(self) -> list[int]:
        """Of its products' adapters, 0 where there is none."""
        return [own.down.outputs if own else 0 for _, _, own in self.weights]

    def normed(self, x: Tensor, which: int) -> Tensor:
        """Its first (0) or second norm of x [rows, inputs]."""
        weight, epsilon = self.norms[which]
        y = torch.empty_like(x)
        rows, width = x.shape
        self._library.langppl_norm(
            x.data_ptr(),
            rows,
            width,
            weight.data_ptr(),
            _is_brief(weight.dtype),
            epsilon,
            y.data_ptr(),
            torch.get_num_threads(),
        )
        return y

    def normed_back(self, x: Tensor, which: int, gradients: Tensor, into: Tensor) -> None:
        """Adds to `into` x's gradients, of those of its norm; each [rows, inputs]."""
        weight, epsilon = self.norms[which]
        rows, width = x.shape
        self._library.langppl_norm_back(
            x.data_ptr(),
            rows,
            width,
            weight.data_ptr(),
            _is_brief(weight.dtype),
            epsilon,
            gradients.data_ptr(),
            into.data_ptr(),
            torch.get_num_threads(),
        )

    def gated_back(
        self, gates: Tensor, ups: Tensor, gradients: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What gate's and up's results make, and their gradients, of those of it; [rows, inner]."""
        made = [torch.empty_like(gates) for _ in range(3)]
        self._library.langppl_gated_back(
            gates.data_ptr(),
            ups.data_ptr(),
            gradients.data_ptr(),
            gates.numel(),
            *(own.data_ptr() for own in made),
            torch.get_num_threads(),
        )
        return made[0], made[1], made[2]

    def turned_back(
        self, cosines: Tensor, sines: Tensor, of_turned: Tensor, of_values: Tensor
    ) -> Tensor:
        """Gradients [rows, outputs] of what three products gave, of those of `before`'s results."""
        rows, own = len(cosines), self.heads + 2 * self.shared
        found = cosines.new_empty(rows, own * self.width)
        self._library.langppl_turn_back(
            self.heads,
            self.shared,
            self.width,
            rows,
            cosines.data_ptr(),
            sines.data_ptr(),
            of_turned.data_ptr(),
            of_values.data_ptr(),
            found.data_ptr(),
            torch.get_num_threads(),
        )
        return found


def _adapted(weight: Weight, bias: Tensor | None, adapter: Adapter | None) -> _Product:
    own = weight.product(bias)
    if adapter is None:
        return own
    down, up = adapter.down.numbers, adapter.up.numbers
    return _Product(
        own.laid,
        own.bias,
        own.inputs,
        own.outputs,
        own.is_brief,
        down.data_ptr(),
        up.data_ptr(),
        adapter.down.outputs,
        adapter.scale,
    )


def attends(width: int, groups: int, most: int) -> bool:
    """Whether `attend` takes heads of such a width, groups of heads, and so many keys of a row."""
    found = library()
    return bool(
        found is not None
        and width % found.langppl_lanes() == 0
        and groups <= found.langppl_most_groups()
        and most <= found.langppl_most_seen()
    )


def attend(
    queries: Tensor, keys: Tensor, values: Tensor, starts: Tensor, places: Tensor, scaling: float
) -> Tensor:
    """Attention in which each row sees keys of its own.

    Args:
        queries: shape [heads, rows, width], float32.
        keys: shape [shared, keys, width], a head of them in one piece; float32 or bfloat16.
        values: likewise.
        starts: where each row's keys begin among `places`, and their end, int64 [rows + 1].
        places: numbers of keys, int64.
        scaling: of the scores.

    Returns:
        Shape [rows, heads · width].
    """
    _check(queries)
    _check_weight(keys)
    _check(values, dtype=keys.dtype)
    heads, rows, width = queries.shape
    found = queries.new_empty(rows, heads * width)
    library().langppl_attend(
        queries.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        _is_brief(keys.dtype),
        keys.stride(0),
        values.stride(0),
        heads,
        len(keys),
        rows,
        width,
        scaling,
        starts.data_ptr(),
        places.data_ptr(),
        found.data_ptr(),
        torch.get_num_threads(),
    )
    return found


def run(
    layers: Sequence[Layer],
    x: Tensor,
    cosines: Tensor,
    sines: Tensor,
    rooms: Sequence[tuple[Tensor, Tensor]],
    held: int,
    starts: Tensor,
    places: Tensor,
    scaling: float,
) -> None:
    """A pass through layers, each with attention as `attend` has it.

    Args:
        layers: layers of one form.
        x: what goes in, and then what comes out, shape [rows, inputs].
        cosines: of the positions, shape [rows, width].
        sines: likewise, the first half with the other sign.
        rooms: of each layer, keys and values [1, shared, room, width], all of one shape and each in
            one piece, float32 or bfloat16; those of the rows are written behind what they hold.
        held: how many tokens they hold.
        starts: see `attend`.
        places: numbers of keys, those of the rows among them.
        scaling: of the scores.
    """
    rows, own = len(x), layers[0]
    of_attention = 2 * (own.heads + own.shared) * own.width * rows
    _check(x, cosines, sines)
    _check_weight(rooms[0][0])
    # Adapters differ between layers, and with them what these need.
    room = x.new_empty(of_attention + max(layer.room(rows) for layer in layers))
    pointers = ctypes.c_void_p * len(layers)
    library().langppl_run(
        pointers(*(layer.address for layer in layers)),
        len(layers),
        x.data_ptr(),
        rows,
        cosines.data_ptr(),
        sines.data_ptr(),
        pointers(*(keys.data_ptr() for keys, _ in rooms)),
        pointers(*(values.data_ptr() for _, values in rooms)),
        _is_brief(rooms[0][0].dtype),
        held,
        rooms[0][0].stride(1),
        scaling,
        starts.data_ptr(),
        places.data_ptr(),
        room.data_ptr(),
        torch.get_num_threads(),
    )
