"""`LM`: a causal language model with its tokenizer, its token bytes and its adapters."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import os
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch

from langppl.lm import adapters, fingerprints, products
from langppl.lm.comparing import check_padded
from langppl.lm.files import write_folder
from langppl.lm.filters import Watched
from langppl.lm.kinds import check_kind, check_ordinary, check_parts
from langppl.lm.loading import read_parts
from langppl.lm.memo import Memo
from langppl.lm.packed import Packing, lean_of, probe
from langppl.lm.prompts import KnownPrompts, Prompt, PromptWarning, encode_chat, is_chat, special_in
from langppl.lm.requests import alone, undone_after, weights_changed, when_orphaned
from langppl.lm.rules import BoundRules, StringRules
from langppl.lm.spelling import appended, check_spelling
from langppl.lm.tally import Tally
from langppl.lm.texts import plain_text
from langppl.lm.trainable import TrainableLM, get_trainable
from langppl.lm.vocabulary import Vocabulary
from langppl.lm.weights import resolve
from langppl.warn import warn

if TYPE_CHECKING:
    from peft import PeftConfig

    from langppl.lm.captured import Steps
    from langppl.lm.lean import Lean

DEFAULT_TOKEN_BUDGET = 4096
DEFAULT_NODE_BUDGET = 1024
MOST_GRAMMARS = 32
MOST_RULES = 256
"""String rules with a grammar that an LM keeps, each with steps (`langppl.lm.rules.STEP_BYTES`)."""


class LM:
    """A causal language model; its weights are loaded once and shared by all that use it.

    Args:
        name_or_path: a known name (`"smollm2-135m-instruct"`, the only one: 4-bit weights, Q4_1,
            taken back to floats, so its figures are not those of the hub's own weights), a hub id
            (`"org/name"`) or a local folder in transformers' format. Weights are read from
            safetensors only, and no code of the model's author is run.
        device: where the weights live; cuda if there is one, else the CPU.
        dtype: float type of the weights, or its name (`"bfloat16"`); float32 on the CPU, the
            checkpoint's own elsewhere.
        revision: branch, tag or commit of a hub id; its main branch if not given.
        token: for a hub id that asks who you are: an access token, or True for the one that
            `hf auth login` stored (which is used anyway where there is one).
        token_budget: most tokens (padding included) in one forward pass; bounds memory. By default
            4096, and on cuda up to 8 times as many, by how much memory the device has.
        progress: whether to show a progress bar while the weights of a known name are fetched.

    Attributes:
        name: what it was made from, or was called.
        revision: of a hub id, as it was given; PEFT folders name it beside the LM.
        model: transformers' model, in evaluation mode, its weights frozen.
        tokenizer: transformers' tokenizer.
        vocabulary: the tokens as bytes.
        window: most tokens the model can read, from its config.
        token_budget: as above; may be changed at any time.
        node_budget: most tokens of one row of a packed pass (see `langppl.lm.trie`).
        gradient_node_budget: most tokens of one row of a packed pass with gradients, besides what
            all its strings begin with; never more than `node_budget`. Fewer take less memory and
            more work: all rows but one are run twice.
        memo: the scores it remembers (see `langppl.lm.memo`).
        tally: how many tokens went through the model (see `langppl.lm.tally`).
        splits_head: whether logits are the output layer's product with the model's last states,
            nothing more, so that they can be taken from some states at a time. Found out when
            the LM is made.
        captures: whether strings may be drawn in steps captured as CUDA graphs (see
            `langppl.lm.captured`); switched off by itself where that fails.
        packs: how the model takes packed rows; None if it is scored in padded batches. Found
            out, by comparing logits, when the LM is made.
        lean: the layers of a model of Llama's form on the CPU, taken apart (`langppl.lm.lean`).

    Raises:
        ValueError: if the name is not known, the folder holds no safetensors or not all of the
            model's tensors, the tokenizer is not a fast one or a text is not what its tokens spell
            (WordPiece), the model has an encoder or recurrent layers, or a revision or a token is
            given for what is not on the hub.
        OSError: if a hub id is not known there, or cannot be had: no connection, no permission.
        FetchError: if a known name is to be fetched and cannot be (see `langppl.lm.weights.fetch`).
        TypeError: for a model that is in memory already; see `from_parts`.

    Example:
        >>> lm = LM("smollm2-135m-instruct")  # doctest: +SKIP
        >>> lm.encode_text(" Hello")  # doctest: +SKIP
        (15162,)
    """

    # What is made in inference mode can take no adapter that learns.
    @torch.inference_mode(False)
    def __init__(
        self,
        name_or_path: str | os.PathLike[str],
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        token_budget: int | None = None,
        progress: bool = True,
    ) -> None:
        if isinstance(name_or_path, torch.nn.Module):
            raise TypeError(
                f"LM takes a name or a folder, got a {type(name_or_path).__name__}; of a model in "
                "memory make LM.from_parts(model, tokenizer, name)"
            )
        source = resolve(name_or_path, progress=progress)
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if dtype is None and torch.device(device).type == "cpu":
            dtype = torch.float32
        model, tokenizer = read_parts(
            source, device=device, dtype=dtype, revision=revision, token=token
        )
        self._setup(model, tokenizer, str(name_or_path), token_budget, revision)

    @classmethod
    @torch.inference_mode(False)
    def from_parts(
        cls, model: Any, tokenizer: Any, name: str, *, token_budget: int | None = None
    ) -> LM:
        """An LM from a model and a fast tokenizer that are already in memory.

        The model is not copied: from here on it belongs to the LM, which changes it. It is put
        into evaluation mode and its weights are frozen (`requires_grad` False); on the CPU its
        larger `torch.nn.Linear` layers are replaced by frozen ones, which share their weights and
        keep a second copy, laid out for products; and whatever learns here (guides, trainable
        views) puts LoRA layers of PEFT's into it. To use or train it elsewhere as it was, give a
        copy (`copy.deepcopy(model)`).

        Args:
            model: a causal language model of transformers'.
            tokenizer: its tokenizer, a fast one.
            name: what the LM is called in messages and in saved guides.
            token_budget: as for `LM`.

        Returns:
            The LM; `.model` is the model that was given.

        Raises:
            ValueError: if the tokenizer is not a fast one or a text is not what its tokens spell
                (WordPiece), the model has an encoder or recurrent layers or was made under
                `torch.inference_mode`, or the token budget is below one.
        """
        self = cls.__new__(cls)
        self._setup(model, tokenizer, name, token_budget)
        return self

    def _setup(
        self,
        model: Any,
        tokenizer: Any,
        name: str,
        token_budget: int | None,
        revision: str | None = None,
    ) -> None:
        if token_budget is not None and token_budget < 1:
            raise ValueError(f"token_budget must be at least 1, got {token_budget}")
        self.name = name
        self.revision = revision
        check_parts(model, tokenizer, name)
        self.model = model.eval().requires_grad_(False)
        check_kind(model, name)
        products.freeze(self.model)
        self.tokenizer = tokenizer
        wide = _times_wider(model.device)
        self.token_budget = token_budget or DEFAULT_TOKEN_BUDGET * wide
        config = model.config.get_text_config()
        self.window: int | None = _window(config)
        ends = _ids(config.eos_token_id) | _ids(tokenizer.eos_token_id)
        if getattr(model, "generation_config", None) is not None:
            ends |= _ids(model.generation_config.eos_token_id)
        size = model.get_output_embeddings().weight.shape[0]
        # Configs say -1 for none.
        ends = {i for i in ends if 0 <= i < size}
        self.vocabulary = Vocabulary(tokenizer, size, ends)
        check_ordinary(self.vocabulary, self)
        try:
            check_spelling(tokenizer, self.vocabulary)
        except ValueError as error:
            raise ValueError(f"{self!r} cannot be read: {error}") from error
        self._appended = appended(tokenizer, self.vocabulary)
        if self._appended:
            shown = "".join(tokenizer.convert_ids_to_tokens(list(self._appended)))
            warn(
                f"the tokenizer of {self!r} puts {shown!r} after every text (add_eos_token, for "
                "instance); prompts are read without it, for strings go on after them",
                PromptWarning,
            )
        begins = [*_ids(tokenizer.bos_token_id), *_ids(config.bos_token_id), *sorted(ends)]
        begins = [i for i in begins if 0 <= i < size]
        self._begin: int | None = begins[0] if begins else None
        self.takes_keep = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.splits_head = self._splits_head()
        self.node_budget = self.gradient_node_budget = DEFAULT_NODE_BUDGET * wide
        self.memo = Memo()
        self.tally = Tally()
        self.captures = True
        self.captured: OrderedDict[tuple[object, ...], Steps] = OrderedDict()
        self._blocks: list[_Block] = []
        self._is_switched = True
        self._rules: OrderedDict[StringRules, Watched] = OrderedDict()
        self._masked: OrderedDict[StringRules, Watched] = OrderedDict()
        self._prompts = KnownPrompts()
        self._trainables: dict[str, TrainableLM] = {}
        self._abandoned: deque[str] = deque()
        _every[id(self)] = self
        self.lean: Lean | None = None
        self.packs: Packing | None = probe(self)
        # What is not asked for its attention may do more than a mask tells (Doge).
        if self.packs is None or not self.packs.in_blocks:
            check_padded(self)
        self.lean = lean_of(self)
        self.tally = Tally()  # the probe's own tokens are nobody's

    def __repr__(self) -> str:
        """Short, for prompts and error messages."""
        return f"LM({self.name!r})"

    @property
    def device(self) -> torch.device:
        """Where the weights live."""
        device: torch.device = self.model.device
        return device

    @property
    def fingerprint(self) -> str:
        """Names the tokenizer: values drawn under it keep their token ids under its equals."""
        return self.vocabulary.fingerprint

    @property
    def weights_fingerprint(self) -> str:
        """Names the weights: a guide is trained for one set of them.

        Taken over each base tensor's name, shape and a sample of it in bfloat16, so that an LM in
        float32 and the same one in bfloat16 agree.
        """
        return fingerprints.by_sample(self.fingerprint, adapters.base_tensors(self.model))

    def has_weights(self, fingerprint: object) -> bool:
        """Whether a `weights_fingerprint`, of this version of langppl or an older, is its own."""
        is_new = str(fingerprint).startswith(fingerprints.MARK)
        make = fingerprints.by_sample if is_new else fingerprints.by_means
        return fingerprint == make(self.fingerprint, adapters.base_tensors(self.model))

    # -- text and tokens ----------------------------------------------------------------------

    def encode_prompt(self, prompt: Prompt) -> tuple[int, ...]:
        """Token ids of a prompt; the empty one starts at the LM's begin token.

        Args:
            prompt: a string, or a chat as a list of role/content messages, which goes through the
                tokenizer's chat template.

        Raises:
            ValueError: if a chat is given and the tokenizer has no template.
        """
        if is_chat(prompt):
            return encode_chat(self.tokenizer, prompt)
        text = plain_text(prompt)
        found = self._prompts.get(text)
        if found is None:
            try:
                ids = self.tokenizer(text, split_special_tokens=True)["input_ids"] if text else []
            except TypeError as error:  # what tokenizers says of what is no UTF-8
                raise ValueError(f"a prompt must be valid Unicode, got {text!r}") from error
            if self._appended and tuple(ids[-len(self._appended) :]) == self._appended:
                ids = ids[: -len(self._appended)]
            spelled = special_in(self.tokenizer, text)
            if spelled is not None:
                warn(
                    f"a prompt spells the special token {spelled!r}, which is read as plain text; "
                    "give a chat as a list of messages, {'role': ..., 'content': ...}",
                    PromptWarning,
                )
            unknown = [i for i in ids if i >= self.vocabulary.size]
            if unknown:
                raise ValueError(
                    f"the tokenizer makes token {unknown[0]} of the prompt {text!r}, and "
                    f"{self!r} has embeddings of {self.vocabulary.size} tokens"
                )
            if not ids:
                if self._begin is None:
                    raise ValueError(f"{self!r} has no begin token, so a prompt must not be empty")
                ids = [self._begin]
            found = tuple(ids)
            self._prompts.keep(text, found)
        return found

    def encode_text(self, text: str) -> tuple[int, ...]:
        """Canonical token ids of a continuation: no special tokens, apart from any prompt.

        What the tokenizer cannot write gives ids that spell another text.
        """
        options = {"add_special_tokens": False, "split_special_tokens": True}
        ids = self.tokenizer(text, **options)["input_ids"]
        if any(i >= self.vocabulary.size for i in ids):
            return tuple(ids)
        if text and self.vocabulary.join(ids) != text.encode("utf-8", "replace"):
            # Some tokenizers put a space before the first word of whatever they are given.
            mark = self.tokenizer("\n", **options)["input_ids"]
            marked = self.tokenizer("\n" + text, **options)["input_ids"]
            if marked[: len(mark)] == mark:
                rest = marked[len(mark) :]
                if self.vocabulary.join(rest) == text.encode("utf-8", "replace"):
                    return tuple(rest)
        return tuple(ids)

    def bind(self, rules: StringRules) -> BoundRules:
        """A string's rules over this LM's tokens, made once unless a predicate has changed."""
        # Rules may be made from latents, so there is no end of them: the latest are kept.
        kept, most = self._rules, MOST_RULES
        if rules.grammar is not None:
            kept, most = self._masked, MOST_GRAMMARS
        watched = kept.pop(rules, None)
        if watched is None or not watched.holds(rules):
            free = None if rules.grammar is None else self.bind(rules.without_grammar)
            watched = Watched(BoundRules(rules, self.vocabulary, free))
            # Under a grammar the rules without it have told of them.
            for stop in rules.stop if free is None else ():
                if (spelled := special_in(self.tokenizer, stop)) is not None:
                    warn(
                        f"the stop {stop!r} spells the special token {spelled!r}, which is looked "
                        "for as plain text; a string ends by itself where the LM ends its text",
                        PromptWarning,
                    )
        kept[rules] = watched
        if len(kept) > most:
            kept.popitem(last=False)
        return watched.bound

    # -- the transformer ----------------------------------------------------------------------

    def states(
        self,
        ids: torch.Tensor,
        keep: torch.Tensor | None = None,
        *,
        padding: int = 0,
        **options: Any,
    ) -> tuple[torch.Tensor, Any]:
        """What the logits at some positions are made from, see `logits_of`.

        Args:
            ids: token ids, shape [rows, length].
            keep: positions, shape [kept]; the last by default.
            padding: how many of the ids are padding, which `tally` does not count.
            **options: what else the model's forward pass takes.

        Returns:
            Shape [rows, kept, width] in the model's float type (width is the vocabulary's where
            the head is not split off), and the KV cache.
        """
        # The last one is found without its number, which would have to go to the device first.
        places: Any = slice(-1, None) if keep is None else keep.to(self.device)
        ids = ids.to(self.device)
        self.tally.add(ids.numel() - padding)
        if self.splits_head:
            out = self.model.base_model(input_ids=ids, **options)
            return out.last_hidden_state[:, places], out.past_key_values
        if self.takes_keep:
            options["logits_to_keep"] = 1 if keep is None else places
        out = self.model(input_ids=ids, **options)
        return out.logits if self.takes_keep else out.logits[:, places], out.past_key_values

    @property
    def state_width(self) -> int:
        """How many numbers a state has, see `states`."""
        rows, columns = self.model.get_output_embeddings().weight.shape
        return int(columns if self.splits_head else rows)

    def logits_of(self, states: torch.Tensor) -> torch.Tensor:
        """Logits [..., vocabulary] of states [..., width]."""
        if not self.splits_head:
            return states
        head = self.model.get_output_embeddings()
        # Compiled layers of a bfloat16 LM give float32, which not every head takes.
        if states.dtype == torch.float32 and head.weight.dtype == torch.bfloat16:
            takes = type(head) is products.FrozenLinear and head.takes(states)
            states = states if takes else states.bfloat16()
        logits: torch.Tensor = head(states)
        return logits

    def _splits_head(self) -> bool:
        base = self.model.base_model
        # A cap hardly shows where logits are small.
        cap = getattr(self.model.config.get_text_config(), "final_logit_softcapping", None)
        if base is self.model or cap:
            return False
        ids = torch.arange(self.vocabulary.size, device=self.device)[None, :5]
        try:
            with torch.no_grad():
                whole = self.model(input_ids=ids, use_cache=False).logits
                last = base(input_ids=ids, use_cache=False).last_hidden_state
                own = self.model.get_output_embeddings()(last)
        except Exception:  # an architecture whose parts cannot be called like this
            return False
        most = float(whole.abs().max())
        return own.shape == whole.shape and float((own - whole).abs().max()) <= 1e-3 * most

    def padded_states(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor,
        keep: torch.Tensor,
        prefix: Sequence[int] = (),
    ) -> torch.Tensor:
        """States at some positions of a batch padded on the right.

        Args:
            ids: token ids, shape [rows, length].
            mask: 1 for tokens, 0 for padding, shape [rows, length].
            keep: positions whose states are wanted, shape [kept].
            prefix: ids that stand before every row; read once, its KV cache shared by the rows.

        Returns:
            Shape [rows, kept, width].
        """
        rows, length = ids.shape
        padding = mask.numel() - int(mask.sum())
        mask = torch.cat([mask.new_ones(rows, len(prefix)), mask], dim=1)
        cache = None
        if prefix:
            cache = self.states(torch.tensor([prefix]), use_cache=True)[1]
            cache.batch_repeat_interleave(rows)
        found, _ = self.states(
            ids,
            keep,
            attention_mask=mask.to(self.device),
            position_ids=torch.arange(len(prefix), len(prefix) + length, device=self.device)[None],
            past_key_values=cache,
            use_cache=cache is not None,
            padding=padding,
        )
        return found

    # -- adapters -----------------------------------------------------------------------------

    @property
    def active_adapter(self) -> str | None:
        """Name of the adapter that is switched on."""
        return self._blocks[-1].name if self._blocks else None

    @contextlib.contextmanager
    def adapter(self, name: str | None) -> Iterator[None]:
        """Within the block the LM answers with one adapter, or with none.

        Raises:
            KeyError: if there is no adapter of that name.
        """
        self._remove_abandoned()
        if name is not None:
            self._check_adapter(name)
        block = _Block(name, threading.get_ident(), next(_numbers))
        try:
            try:
                self._blocks.append(block)
                self._switch()
                yield
            finally:
                self._leave(block)
        finally:
            # The first time may have been interrupted.
            self._leave(block)

    def _leave(self, block: _Block) -> None:
        """Ends a block, if it is not ended; one that an interrupt has left may end late."""
        if block in self._blocks:
            self._is_switched = False
            self._blocks.remove(block)
        if not self._is_switched:
            self._switch()

    def _switch(self) -> None:
        """Has the model's layers take the adapter that the innermost block says."""
        self._is_switched = False
        adapters.activate(self.model, self.active_adapter)
        self._is_switched = True

    def trainable(
        self,
        name: str,
        *,
        rank: int | None = None,
        alpha: int | None = None,
        seed: int | None = None,
    ) -> TrainableLM:
        """A view of this LM with an adapter of its own, which `langppl.em` fits.

        It may stand in a model's `LMString` or `LMChoice`. Asked for again, it is the same view,
        with what it has learned.

        Args:
            name: of letters, digits, "_" and "-".
            rank: of the LoRA adapter; 16 if None.
            alpha: LoRA's scale; the rank if None.
            seed: of the adapter's first weights; 0 if None.

        Raises:
            ValueError: for a name that cannot be one, or if there is a view of that name and it was
                made with another rank, scale or seed.

        Example:
            >>> from langppl.testing import tiny_lm
            >>> lm = tiny_lm()
            >>> classifier = lm.trainable("classifier", rank=4)
            >>> lm.trainable("classifier") is classifier
            True
        """
        return get_trainable(self._trainables, self, name, rank, alpha, seed)

    @property
    def trainables(self) -> tuple[TrainableLM, ...]:
        """The trainable views of this LM, in the order they were made."""
        return tuple(self._trainables.values())

    def _check_adapter(self, name: str) -> None:
        if name not in adapters.names(self.model):
            known = ", ".join(sorted(adapters.names(self.model))) or "none"
            raise KeyError(f"{self!r} has no adapter {name!r}; it has: {known}")

    @alone
    def add_adapter(self, name: str, config: PeftConfig) -> list[torch.nn.Parameter]:
        """Adds a LoRA adapter, switched off, and returns its weights, which take gradients."""
        self._remove_abandoned()
        self._is_switched = False
        parameters = adapters.add(self.model, name, config)
        weights_changed()
        self._switch()
        return parameters

    @alone
    def remove_adapter(self, name: str) -> None:
        """Removes an adapter and its weights; KeyError if there is none of that name."""
        self._check_adapter(name)
        self._is_switched = False
        adapters.remove(self.model, name)
        # Others of its name may lie where its weights lay.
        weights_changed()
        self._switch()

    def abandon_adapter(self, name: str) -> None:
        """Says that nobody will use an adapter again; it is removed before the next pass.

        What a garbage collection calls may come at any moment, in the middle of a walk through the
        model's modules too, where `remove_adapter` would change what is walked through.
        """
        self._abandoned.append(name)

    def _remove_abandoned(self) -> None:
        while self._abandoned:
            name = self._abandoned.popleft()
            if name in adapters.names(self.model):
                self.remove_adapter(name)

    @alone
    def adapter_files(self, name: str) -> dict[str, bytes]:
        """What the files of a plain PEFT folder of an adapter hold; KeyError if there is none."""
        self._check_adapter(name)
        return adapters.files(self.model, name)

    def save_adapter(self, name: str, folder: str | os.PathLike[str]) -> None:
        """Writes an adapter as a plain PEFT folder (safetensors).

        Raises:
            KeyError: if there is none of that name.
            OSError: if the folder cannot be written to; names it. What was there stays then.
        """
        write_folder(Path(folder).expanduser(), self.adapter_files(name), "adapter")

    @alone
    def load_adapter(self, name: str, folder: str | os.PathLike[str]) -> None:
        """Reads a PEFT folder as an adapter; a folder that fails to load leaves nothing behind.

        Raises:
            ValueError: if files are missing or corrupt, or tensors are missing, unknown or of
                another shape.
        """
        self._is_switched = False
        try:
            adapters.load(self.model, name, folder)
        finally:
            weights_changed()
            self._switch()


@dataclass(frozen=True, eq=False)
class _Block:
    """A block within which an LM answers with an adapter.

    Attributes:
        name: of the adapter, None for none.
        thread: that is in the block.
        number: higher than those of earlier blocks.
    """

    name: str | None
    thread: int
    number: int


_numbers = itertools.count()
_every: WeakValueDictionary[int, LM] = WeakValueDictionary()


def _lms() -> list[LM]:
    # At once, as other threads may be making LMs.
    return [lm for ref in _every.valuerefs() if (lm := ref()) is not None]


@undone_after
def _leave_blocks() -> Callable[[], None]:
    thread, number = threading.get_ident(), next(_numbers)

    def leave() -> None:
        for lm in _lms():
            for block in list(lm._blocks):
                if block.thread == thread and block.number > number:
                    lm._leave(block)
            if not lm._is_switched:
                lm._switch()

    return leave


@when_orphaned
def _switch_off_adapters() -> None:
    for lm in _lms():
        lm._blocks.clear()
        lm._switch()


def _times_wider(device: torch.device) -> int:
    """How many times the CPU's tokens a pass takes: small ones leave an accelerator idle."""
    if device.type != "cuda":
        return 1
    memory = torch.cuda.get_device_properties(device).total_memory
    return max(1, min(8, memory // (8 * 2**30)))


def _window(config: Any) -> int | None:
    """How many tokens an LM reads."""
    found: int | None = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        # Beyond it the whole pass is turned by other angles, short strings in it too.
        own = rope.get("original_max_position_embeddings")
        found = own or getattr(config, "original_max_position_embeddings", None) or found
    return found


def _ids(value: int | Sequence[int] | None) -> set[int]:
    if value is None:
        return set()
    return {value} if isinstance(value, int) else set(value)
