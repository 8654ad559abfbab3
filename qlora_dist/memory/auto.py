"""`memory.recompute: auto`: as little recomputation as the memory allows, from a formula at first, then from a step.

Before the first optimizer step the peak is estimated: what is held already, plus optimizer state, gathered layers and
activations by their dimensions (`model/activations.py`). In that step the last layer's saved tensors are counted under
each policy and the true peak is read. What the peak exceeds the counted activations by will be there under any policy,
and so will the optimizer state that the update makes; the rest follows from the counts. Steps 2 and 4 are looked at in
the same way, and later ones for whether they take too much. All ranks decide by the one with the least room.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch

from qlora_dist.config.schema import TrainConfig
from qlora_dist.data.batch import MicroBatch
from qlora_dist.memory.activations import LayerBytes, activations_of, layer_bytes
from qlora_dist.memory.policy import Recompute, fixed_recompute
from qlora_dist.memory.recompute import KeptBytesProbe, is_compiled, recompute_of, set_recompute
from qlora_dist.model.attention import mask_elements
from qlora_dist.model.cpu.heap import trim_heap
from qlora_dist.model.loss import is_chunked
from qlora_dist.model.parts import ModelParts
from qlora_dist.optim.adamw import OPTIMIZERS
from qlora_dist.runtime.memory import GIB, MemoryMeter, memory_limit
from qlora_dist.runtime.processes import Runtime
from qlora_dist.runtime.shards import local_bytes, local_part, whole_bytes, whole_shape

_RESERVE = 0.05
"""Share of the budget that is left free: allocators lose some memory between their blocks."""
_EARLY_RESERVE = 0.1
"""The same on the host until two steps were measured: more layers that keep everything take more than what they keep,
because the C library's heap has gaps (10 to 30 % more, SmolLM2-135M)."""
_FRAGMENTED_RESERVE = 0.1
"""The same on a GPU once its allocator had to give memory back and ask anew, for such gaps."""


class RecomputeBudget:
    """Chooses what layers recompute, once the model is loaded, and again after the first steps.

    All ranks call every method alike. With another setting than `auto` nothing is chosen.
    """

    def __init__(
        self, config: TrainConfig, parts: ModelParts, runtime: Runtime, log: Callable[[str], None]
    ) -> None:
        self._config, self._parts, self._runtime, self._say = config, parts, runtime, log
        # Offloaded activations do not fill the device: recomputing all layers leaves the least to copy.
        self._is_auto = config.memory.recompute == "auto" and not config.memory.offload_activations
        self._meter = MemoryMeter(runtime.device)
        self._allowed = self._room = self._state_bytes = 0
        self._num_steps = 0
        self._layer = LayerBytes(0, 0, 0)
        self._probe: KeptBytesProbe | None = None

    def choose(self) -> None:
        """By the formula; called when everything but optimizer state and activations is in memory."""
        if not self._is_auto:
            if self._config.memory.recompute == "auto":
                self._say(
                    "recompute: all layers fully, which leaves memory.offload_activations the least to copy"
                )
            return
        runtime, optim = self._runtime, self._config.optim
        dimensions = self._parts.dimensions
        num_tokens, element_size = self._largest_micro_batch, runtime.compute_dtype.itemsize
        trim_heap(self._runtime.device)  # of loading
        self._allowed = memory_limit(self._config.memory.budget_gib, self._meter, runtime)
        adapters = self._parts.adapters.values()
        num_adapted = sum(local_part(param).numel() for param in adapters)
        self._state_bytes = later = num_adapted * OPTIMIZERS[optim.optimizer].state_bytes
        is_cut = local_bytes(self._parts.model) < whole_bytes(self._parts.model)
        if (
            is_cut or self._config.parallel.cpu_offload
        ):  # gradients of shards; the layer at work and the next
            later += num_adapted * 4 + 2 * max(map(whole_bytes, self._parts.layers))
            if optim.grad_accum_steps > 1:  # whole gradients, until the last micro-batch
                later += sum(4 * whole_shape(param).numel() for param in adapters)
        nothing = Recompute(len(self._parts.layers))
        with runtime.autocast():
            is_loss_chunked = is_chunked(self._parts.model)
        rows, length, is_packed = (
            optim.micro_batch_size,
            self._config.data.max_seq_len,
            self._config.data.packing,
        )
        mask = element_size * mask_elements(
            self._parts.model,
            rows,
            length,
            is_packed=is_packed,
            is_on_gpu=runtime.device.type == "cuda",
        )
        activations = activations_of(
            dimensions,
            num_tokens,
            num_tokens,
            nothing,
            element_size,
            self._config.adapter,
            is_loss_chunked=is_loss_chunked,
            mask_bytes=mask,
        )
        self._room = (
            self._limit - self._meter.held() - later - (activations.total - activations.kept)
        )
        self._layer = layer_bytes(dimensions, num_tokens, element_size, self._config.adapter, mask)
        self._agree()
        choice = self._least_recompute(again=self._layer.none)
        set_recompute(self._parts.layers, choice)
        self._say(f"recompute: {self._described(choice)} (chosen by memory.recompute: auto)")

    def measuring(self) -> ExitStack:
        """A context for an optimizer step."""
        stack = ExitStack()
        if self._is_auto:
            self._num_steps += 1
            if self._is_looking:
                self._meter.restart()
            if self._num_steps == 1:
                self._probe = stack.enter_context(KeptBytesProbe(self._parts.layers))
        return stack

    def after_step(self, batches: Sequence[MicroBatch]) -> None:
        """Choose again by what the step took: after the first ones, and later when it was more than allowed."""
        if not self._is_auto or not self._is_looking:
            return
        if (
            self._runtime.device.type == "cuda"
        ):  # others, and what allocators do not see, may take more by now
            self._allowed = memory_limit(self._config.memory.budget_gib, self._meter, self._runtime)
        now = recompute_of(self._parts.layers)
        seen = max(batch.input_ids.numel() for batch in batches)
        if self._probe is not None and self._probe.result is not None:
            found, scale = self._probe.result, self._largest_micro_batch / seen
            self._layer = LayerBytes(
                *(int(size * scale) for size in (found.none, found.selective, found.full))
            )
        peak = self._meter.peak()
        if self._probe is not None and now.policy(now.num_layers - 1) == "selective":
            peak -= self._layer.none - self._layer.selective  # the surveyed layer kept everything
        self._probe = None
        beside = peak - int(self._layer.kept(now) * seen / self._largest_micro_batch)
        if self._num_steps == 1:
            # Made by its update, as a rule. What was there before (DeepSpeed's, or that of a run that goes on) counts
            # twice until the next look.
            beside += self._state_bytes
        # What one layer makes again is in that peak already, if there was one that did.
        self._room, again = self._limit - beside, 0 if now.num_full else self._layer.none
        self._agree()
        choice = self._least_recompute(again)
        if choice != now and (self._num_steps <= 4 or self._layer.kept(now) > self._room):
            set_recompute(self._parts.layers, choice)
            if self._layer.kept(choice) < self._layer.kept(now):
                trim_heap(self._runtime.device)
            self._say(
                f"recompute: {self._described(choice)}, from the next step on (by what step {self._num_steps} took)"
            )

    @property
    def can_make_room(self) -> bool:
        """Whether a step that does not fit may be taken again with more recomputation.

        In the first two, which follow an estimate; and not with several ranks, of which others wait
        in a collective by then.
        """
        is_early = self._is_auto and self._num_steps <= 2
        return (
            is_early
            and self._runtime.world_size == 1
            and recompute_of(self._parts.layers) != self._everything
        )

    def make_room(self) -> None:
        """Have all layers recompute fully, because this step did not fit."""
        set_recompute(self._parts.layers, self._everything)
        gc.collect()
        if self._runtime.device.type == "cuda":
            torch.cuda.empty_cache()
        self._meter.restart()
        self._say(
            f"the memory was full in step {self._num_steps}, which was estimated to fit (memory.recompute: auto): all "
            "layers recompute fully now, and the step is taken again"
        )

    @property
    def _everything(self) -> Recompute:
        return fixed_recompute("full", len(self._parts.layers))

    @property
    def _is_looking(self) -> bool:
        """Whether this step's memory is looked at: steps 1, 2, 4, 8 and so on."""
        return self._num_steps & (self._num_steps - 1) == 0

    @property
    def _limit(self) -> int:
        """What may be taken, less what is left free."""
        return int(self._allowed * (1 - self._reserve))

    @property
    def _reserve(self) -> float:
        if self._meter.num_retries() > 0:
            return _FRAGMENTED_RESERVE
        return (
            _EARLY_RESERVE
            if self._runtime.device.type == "cpu" and self._num_steps < 2
            else _RESERVE
        )

    @property
    def _largest_micro_batch(self) -> int:
        """Tokens, padding included."""
        return self._config.optim.micro_batch_size * self._config.data.max_seq_len

    def _least_recompute(self, again: int) -> Recompute:
        """What fits into the room there is."""
        num_layers = len(self._parts.layers)
        return self._layer.least_recompute(self._room, num_layers, again, self._selective_frees)

    @property
    def _selective_frees(self) -> bool:
        """Whether recomputing selectively frees anything.

        On the CPU what it frees does not leave the C library's heap: the resident peak is that of keeping everything
        (`benchmarks/recompute.py`). Compiled layers do so already.
        """
        return self._runtime.device.type != "cpu" and not is_compiled(self._parts.layers)

    def _agree(self) -> None:
        """Take the least room and the largest layer of all ranks, so that they decide alike."""
        mine = [-self._room, self._layer.none, self._layer.selective, self._layer.full]
        agreed = self._runtime.max_of_each(
            torch.tensor(mine, dtype=torch.int64, device=self._runtime.device)
        )
        room, *layer = agreed.tolist()
        self._room, self._layer = -room, LayerBytes(*layer)

    def _described(self, choice: Recompute) -> str:
        total = self._limit - self._room + self._layer.kept(choice)
        text = f"{choice}: about {total / GIB:.2f} of {self._limit / GIB:.2f} GiB"
        return text + (", which may be too little" if total > self._limit else "")
