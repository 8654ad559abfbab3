"""`memory.recompute: auto`: as little recomputation as the memory allows.

The first choice follows a formula, the later ones follow measured steps. Before the first optimizer
step the peak is estimated: the memory that is held already, plus optimizer state, gathered layers
and activations by their dimensions (`memory/activations.py`). In that step the last layer's saved
tensors are counted under each policy, and the true peak is read. The part of the peak that is not
counted activations stays under any policy, and so does the optimizer state that the update makes;
the rest follows from the counts. Steps 2 and 4 are measured in the same way, and later ones to see
whether they take too much. All ranks follow the rank with the least room.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch

from qlora_dist.config.schema import TrainConfig
from qlora_dist.data.batch import MicroBatch
from qlora_dist.memory.activations import LayerBytes, Widths, activations_of, layer_bytes
from qlora_dist.memory.policy import Recompute, fixed_recompute
from qlora_dist.memory.recompute import KeptBytesProbe, is_compiled, recompute_of, set_recompute
from qlora_dist.model.attention import mask_elements
from qlora_dist.model.cpu.heap import trim_heap
from qlora_dist.model.loss import is_chunked
from qlora_dist.model.parts import ModelParts
from qlora_dist.optim.optimizers import OPTIMIZERS
from qlora_dist.runtime.memory import GIB, MemoryMeter, memory_limit
from qlora_dist.runtime.processes import Runtime
from qlora_dist.runtime.shards import local_bytes, local_part, whole_bytes, whole_shape

_RESERVE = 0.05
"""Share of the budget that stays free: allocators lose memory between their blocks."""
_EARLY_RESERVE = 0.1
"""Share on the host until two steps were measured. Layers that begin to keep everything take 10 to
30 % more than they keep (SmolLM2-135M), because the C library's heap has gaps."""
_FRAGMENTED_RESERVE = 0.1
"""Share on a GPU once its allocator had to give cached memory back because of gaps."""


class RecomputeBudget:
    """Chooses the layers' policies, once the model is loaded, and again after the first steps.

    All ranks call every method alike. With a setting other than `auto` nothing is chosen.
    """

    def __init__(
        self, config: TrainConfig, parts: ModelParts, runtime: Runtime, log: Callable[[str], None]
    ) -> None:
        self._config, self._parts, self._runtime, self._log = config, parts, runtime, log
        # Offloaded activations do not fill the device: recomputing all layers leaves the least to
        # copy.
        self._is_auto = config.memory.recompute == "auto" and not config.memory.offload_activations
        self._meter = MemoryMeter(runtime.device)
        self._allowed = self._room = self._state_bytes = 0
        self._num_steps = 0
        self._layer = LayerBytes(0, 0, 0)
        self._probe: KeptBytesProbe | None = None

    def choose(self) -> None:
        """Choose by the formula, with all but optimizer state and activations in memory."""
        config, parts, runtime = self._config, self._parts, self._runtime
        if not self._is_auto:
            if config.memory.recompute == "auto":
                self._log(
                    "recompute: all layers fully, which leaves memory.offload_activations the "
                    "least to copy"
                )
            return
        optim, adapters = config.optim, parts.adapters.values()
        trim_heap(runtime.device)  # gives the host memory of loading back
        self._allowed = memory_limit(config.memory.budget_gib, self._meter, runtime)
        num_adapted = sum(local_part(param).numel() for param in adapters)
        self._state_bytes = later = num_adapted * OPTIMIZERS[optim.optimizer].state_bytes
        is_cut = local_bytes(parts.model) < whole_bytes(parts.model)
        if is_cut or config.parallel.cpu_offload:
            # Gradients of the shards in float32, the layer at work and the next one.
            later += num_adapted * 4 + 2 * max(map(whole_bytes, parts.layers))
            if optim.grad_accum_steps > 1:  # whole gradients, until the last micro-batch
                later += sum(4 * whole_shape(param).numel() for param in adapters)
        with runtime.autocast():
            is_loss_chunked = is_chunked(parts.model)
        rows, length = optim.micro_batch_size, config.data.max_seq_len
        packs, is_on_gpu = config.data.packing, runtime.device.type == "cuda"
        mask = mask_elements(parts.model, rows, length, is_packed=packs, is_on_gpu=is_on_gpu)
        model, adapter = Widths.of(parts), config.adapter
        size, num_tokens = runtime.compute_dtype.itemsize, rows * length
        nothing = Recompute(len(parts.layers))
        # Every token may be a target.
        activations = activations_of(
            model, num_tokens, num_tokens, nothing, size, adapter, is_loss_chunked=is_loss_chunked
        )
        later += max(activations.working, activations.loss)
        self._room = self._limit - self._meter.held() - later
        self._layer = layer_bytes(model, num_tokens, size, adapter, size * mask)
        self._agree()
        choice = self._least_recompute(again=self._layer.none)
        set_recompute(parts.layers, choice)
        self._log(f"recompute: {self._described(choice)} (chosen by memory.recompute: auto)")

    def measuring(self) -> ExitStack:
        """Return a context for an optimizer step, which measures its memory where needed."""
        stack = ExitStack()
        if self._is_auto:
            self._num_steps += 1
            if self._is_measured_step:
                self._meter.restart()
            if self._num_steps == 1:
                self._probe = stack.enter_context(KeptBytesProbe(self._parts.layers))
        return stack

    def after_step(self, batches: Sequence[MicroBatch]) -> None:
        """Choose again by the memory of a measured step.

        After step 4 the choice changes only when a step took more than the limit.

        Args:
            batches: micro-batches of the step on this rank.
        """
        if not self._is_auto or not self._is_measured_step:
            return
        runtime, parts = self._runtime, self._parts
        if runtime.device.type == "cuda":
            # Other programs, and libraries beside the allocator, may take more by now.
            self._allowed = memory_limit(self._config.memory.budget_gib, self._meter, runtime)
        now = recompute_of(parts.layers)
        seen = max(batch.input_ids.numel() for batch in batches)
        if self._probe is not None and self._probe.result is not None:
            found, scale = self._probe.result, self._largest_micro_batch / seen
            sizes = (found.none, found.selective, found.full)
            self._layer = LayerBytes(*(int(size * scale) for size in sizes))
        peak = self._meter.peak()
        if self._probe is not None and now.policy(now.num_layers - 1) == "selective":
            peak -= self._layer.none - self._layer.selective  # the surveyed layer kept everything
        self._probe = None
        beside = peak - int(self._layer.kept(now) * seen / self._largest_micro_batch)
        if self._num_steps == 1:
            # The first update makes it, after the peak. State that was there before (DeepSpeed's,
            # or a resumed run's) counts twice until step 2 is measured.
            beside += self._state_bytes
        # If a layer recomputed fully, its tensors in backward are in that peak already.
        self._room, again = self._limit - beside, 0 if now.num_full else self._layer.none
        self._agree()
        choice = self._least_recompute(again)
        if choice != now and (self._num_steps <= 4 or self._layer.kept(now) > self._room):
            set_recompute(parts.layers, choice)
            if self._layer.kept(choice) < self._layer.kept(now):
                trim_heap(runtime.device)
            self._log(
                f"recompute: {self._described(choice)}, from the next step on "
                f"(by what step {self._num_steps} took)"
            )

    @property
    def can_make_room(self) -> bool:
        """True if a step that does not fit may be taken again with more recomputation."""
        # Steps 1 and 2 follow an estimate. Of several ranks, others wait in a collective by then.
        is_possible = self._is_auto and self._num_steps <= 2 and self._runtime.world_size == 1
        return is_possible and recompute_of(self._parts.layers) != self._all_full

    def make_room(self) -> None:
        """Have all layers recompute fully, because this step did not fit."""
        set_recompute(self._parts.layers, self._all_full)
        gc.collect()  # cycles may hold activations of the failed attempt
        if self._runtime.device.type == "cuda":
            torch.cuda.empty_cache()
        self._meter.restart()
        self._log(
            f"the memory was full in step {self._num_steps}, which was estimated to fit "
            "(memory.recompute: auto): all layers recompute fully now, and the step is taken again"
        )

    @property
    def _all_full(self) -> Recompute:
        return fixed_recompute("full", len(self._parts.layers))

    @property
    def _is_measured_step(self) -> bool:
        """True if this step is measured: steps 1, 2, 4, 8 and so on."""
        return self._num_steps & (self._num_steps - 1) == 0  # a power of two

    @property
    def _limit(self) -> int:
        """Bytes that may be taken, without the reserve."""
        return int(self._allowed * (1 - self._reserve))

    @property
    def _reserve(self) -> float:
        if self._meter.num_retries() > 0:
            return _FRAGMENTED_RESERVE
        is_early = self._runtime.device.type == "cpu" and self._num_steps < 2
        return _EARLY_RESERVE if is_early else _RESERVE

    @property
    def _largest_micro_batch(self) -> int:
        """Tokens of the largest micro-batch that may come, padding included."""
        return self._config.optim.micro_batch_size * self._config.data.max_seq_len

    def _least_recompute(self, again: int) -> Recompute:
        """Find the least recomputation that fits into this run's room."""
        num_layers = len(self._parts.layers)
        return self._layer.least_recompute(self._room, num_layers, again, self._selective_frees)

    @property
    def _selective_frees(self) -> bool:
        """True if recomputing selectively frees memory."""
        # On the CPU freed tensors do not leave the C library's heap: the resident peak is that of
        # keeping everything (`benchmarks/recompute.py`). Compiled layers do it already.
        return self._runtime.device.type != "cpu" and not is_compiled(self._parts.layers)

    def _agree(self) -> None:
        """Take the least room and the largest layer of all ranks, so that they decide alike."""
        mine = [-self._room, self._layer.none, self._layer.selective, self._layer.full]
        sizes = torch.tensor(mine, dtype=torch.int64, device=self._runtime.device)  # (4,)
        room, *layer = self._runtime.max_of_each(sizes).tolist()
        self._room, self._layer = -room, LayerBytes(*layer)

    def _described(self, choice: Recompute) -> str:
        total = self._limit - self._room + self._layer.kept(choice)
        text = f"{choice}: about {total / GIB:.2f} of {self._limit / GIB:.2f} GiB"
        return text + (", which may be too little" if total > self._limit else "")
