"""Products and layers compiled for the machine they run on: float32 on the CPU.

A pass over a few tokens is bound by how fast its weights come from memory, and by what lies
between the products. `native.cpp` has both for layers of Llama's form: weights in panels that are
read in one stream, and everything between them in one go. It is compiled at first use, in a second,
by the GCC of the machine (`$CXX`, or `g++`) for the machine's own instructions, AVX2 or AVX-512,
and kept in the cache folder. Where that fails, or where `LANGPPL_NATIVE=0` says so, torch's own
products run.

A row's numbers do not depend on the other rows: products go through their terms in one order.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from langppl.lm.weights import cache_dir

SOURCE = Path(__file__).with_name("native.cpp")

OPTIONS = ("-O3", "-std=c++17", "-march=native", "-fPIC", "-fno-math-errno")

PATIENCE = 120
"""Seconds that the compiler may take."""

_TOLERANCE = 1e-5
"""How far its product may be from torch's, relative."""


class _Product(ctypes.Structure):
    _fields_ = (
        ("laid", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("inputs", ctypes.c_long),
        ("outputs", ctypes.c_long),
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
        """Float type of what it is multiplied with."""
        return self.numbers.dtype

    def product(self, bias: Tensor | None) -> _Product:
        """With a bias, as compiled functions take it."""
        at = 0 if bias is None else bias.data_ptr()
        found = self._products.get(at)
        if found is None or found[0] is not bias:
            self._products.clear()
            own = _Product(self.numbers.data_ptr(), at or None, self.inputs, self.outputs)
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
    try:
        found = _declared(ctypes.CDLL(str(_built(OPTIONS))))
        return (found, "") if _agrees(found) else (None, "its products are not torch's")
    except subprocess.CalledProcessError as error:
        said = (error.stderr or b"").decode(errors="replace").strip()
        return None, f"the compiler failed: {said[:500]}"
    except (OSError, RuntimeError, subprocess.SubprocessError, AttributeError) as error:
        return None, f"{type(error).__name__}: {error}"


def _built(options: tuple[str, ...]) -> Path:
    """The library's file, compiled unless it is there."""
    compiler = shutil.which(os.environ.get("CXX") or "g++")
    if compiler is None:
        raise OSError("no g++ was found")
    # A second pool of OpenMP's threads would fight with torch's, so its own is linked.
    threads = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*"))
    if not threads:
        raise OSError("torch brings no libgomp")
    version = subprocess.run(
        [compiler, "--version"], capture_output=True, check=True, timeout=PATIENCE
    ).stdout
    digest = hashlib.sha256(SOURCE.read_bytes())
    digest.update(version)
    for part in (*options, str(threads[0]), _processor()):
        digest.update(part.encode() + b"\n")
    name = f"{digest.hexdigest()[:32]}.so"
    folder = _folder()
    target = folder / name
    if target.is_file():
        return target
    with tempfile.TemporaryDirectory(dir=folder) as room:
        code, whole = Path(room, "native.o"), Path(room, name)
        own = [compiler, *options, "-fopenmp", "-c", str(SOURCE), "-o", str(code)]
        linked = [compiler, "-shared", str(code), str(threads[0]), "-o", str(whole)]
        linked += [f"-Wl,-rpath,{threads[0].parent}"]
        for command in (own, linked):
            subprocess.run(command, capture_output=True, check=True, timeout=PATIENCE)
        os.replace(whole, target)
    return target


def _folder() -> Path:
    """Where the library is kept: nobody else may write there what this process then runs."""
    try:
        folder = cache_dir() / "native"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
        if found.st_uid == os.getuid() and not found.st_mode & 0o022:
            with tempfile.TemporaryFile(dir=folder):
                return folder
    except (OSError, RuntimeError):  # of a user without a home
        pass
    return _own_folder()


@functools.cache
def _own_folder() -> Path:
    """A folder of this process alone."""
    folder = tempfile.TemporaryDirectory(prefix="langppl-native-")
    _held.append(folder)
    return Path(folder.name)


_held: list[Any] = []
"""Folders that are removed when the process ends."""


def _processor() -> str:
    """What tells machines apart whose instructions differ."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            return line
    raise OSError("/proc/cpuinfo names no instructions")


def _declared(found: Any) -> Any:
    pointer, number, threads = ctypes.c_void_p, ctypes.c_long, ctypes.c_int
    product, layer = ctypes.POINTER(_Product), ctypes.POINTER(_Layer)
    for name, types in {
        "lay_out": (pointer, number, number, pointer, threads),
        "multiply": (product, pointer, number, pointer, threads),
        "before": (layer, pointer, number, *[pointer] * 5, threads),
        "attend": (
            *[pointer] * 3,
            *[number] * 6,
            ctypes.c_float,
            *[pointer] * 3,
            threads,
        ),
        "after": (layer, pointer, pointer, number, *[pointer] * 4, threads),
        "multiply_back": (
            *(pointer, number, number, pointer, pointer, pointer),
            *(number, number, pointer, threads, threads),
        ),
        "norm": (pointer, number, number, pointer, ctypes.c_float, pointer, threads),
        "norm_back": (
            *(pointer, number, number, pointer, ctypes.c_float),
            *(pointer, pointer, threads),
        ),
        "gated_back": (*[pointer] * 3, number, *[pointer] * 3, threads),
        "turn_back": (*[number] * 4, *[pointer] * 5, threads),
        "run": (
            *(pointer, number, pointer, number),
            *[pointer] * 4,
            *(number, number, ctypes.c_float),
            *[pointer] * 3,
            threads,
        ),
    }.items():
        function = getattr(found, f"langppl_{name}")
        function.argtypes, function.restype = types, None
    for name in ("panel", "most_seen", "most_groups", "lanes"):
        function = getattr(found, f"langppl_{name}")
        function.argtypes, function.restype = (), number
    return found


def _agrees(found: Any) -> bool:
    rng = np.random.default_rng(0)
    weight, bias, x = (
        torch.from_numpy(rng.normal(size=size).astype(np.float32))
        for size in ((70, 33), (70,), (19, 33))
    )
    expected = x.double() @ weight.double().T + bias.double()
    own = _multiplied(found, x, _laid_out(found, weight), bias)
    return bool((own - expected).abs().max() <= _TOLERANCE * expected.abs().max())


def _check(*tensors: Tensor | None) -> None:
    """Raises TypeError for what compiled functions would read as something that it is not."""
    for own in tensors:
        if own is not None and (own.dtype != torch.float32 or own.device.type != "cpu"):
            raise TypeError(
                f"compiled functions take float32 on the CPU, got {own.dtype} on {own.device}"
            )


def lay_out(weight: Tensor) -> Weight:
    """A copy of a weight [outputs, inputs] in panels."""
    return _laid_out(library(), weight)


def _laid_out(found: Any, weight: Tensor) -> Weight:
    _check(weight)
    own = weight.detach().contiguous()
    outputs, inputs = own.shape
    panel = found.langppl_panel()
    numbers = own.new_empty(-(-outputs // panel) * panel * inputs)
    threads = torch.get_num_threads()
    found.langppl_lay_out(own.data_ptr(), outputs, inputs, numbers.data_ptr(), threads)
    return Weight(numbers, outputs, inputs)


def multiply(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """The product x Wᵀ + b, of x [..., inputs]."""
    return _multiplied(library(), x, weight, bias)


def _multiplied(found: Any, x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    if x.shape[-1] != weight.inputs:
        raise RuntimeError(f"{weight.inputs} inputs are needed, got {tuple(x.shape)}")
    _check(x, bias)
    own = x.detach().contiguous()
    y = own.new_empty(*x.shape[:-1], weight.outputs)
    found.langppl_multiply(
        weight.product(bias),
        own.data_ptr(),
        own.numel() // weight.inputs,
        y.data_ptr(),
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
        gradients: of the product, shape [..., outputs].
        weight: as it is, shape [outputs, inputs].
        low: gradients of what an adapter's first weight gave, shape [..., rank].
        down: that weight, shape [rank, inputs].
        into: other gradients, in one piece, which these are added to.

    Returns:
        Shape [..., inputs].
    """
    _check(gradients, weight, low, down, into)
    outputs, inputs = weight.shape
    own, weight = gradients.contiguous(), weight.contiguous()
    found = own.new_empty(*own.shape[:-1], inputs) if into is None else into
    rank = 0
    if low is not None and down is not None:
        low, down, rank = low.contiguous(), down.contiguous(), len(down)
    library().langppl_multiply_back(
        weight.data_ptr(),
        outputs,
        inputs,
        own.data_ptr(),
        None if low is None else low.data_ptr(),
        None if down is None else down.data_ptr(),
        rank,
        own.numel() // outputs,
        found.data_ptr(),
        into is not None,
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
        norms: the weights of its two norms, and their epsilons.
        width: numbers of a head.
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
        return rows * (self.inputs + max(own, self.inner) + 4 * self.rank)

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
        queries: shape [heads, rows, width].
        keys: shape [shared, keys, width], a head of them in one piece.
        values: likewise.
        starts: where each row's keys begin among `places`, and their end, int64 [rows + 1].
        places: numbers of keys, int64.
        scaling: of the scores.

    Returns:
        Shape [rows, heads · width].
    """
    _check(queries, keys, values)
    heads, rows, width = queries.shape
    found = queries.new_empty(rows, heads * width)
    library().langppl_attend(
        queries.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
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
            one piece; those of the rows are written behind what they hold.
        held: how many tokens they hold.
        starts: see `attend`.
        places: numbers of keys, those of the rows among them.
        scaling: of the scores.
    """
    rows, own = len(x), layers[0]
    of_attention = 2 * (own.heads + own.shared) * own.width * rows
    _check(x, cosines, sines)
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
        held,
        rooms[0][0].stride(1),
        scaling,
        starts.data_ptr(),
        places.data_ptr(),
        room.data_ptr(),
        torch.get_num_threads(),
    )
