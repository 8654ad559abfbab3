"""The demo: a small real chat model learns to write docstrings, from download to comparison.

The model is SmolLM2-135M-Instruct (Apache-2.0), which a package on the Python index carries as a
GGUF file; it is converted once. The data are functions of Python's own standard library with their
docstrings, split by module, so that the held-out functions come from modules that the model has not
been trained on.
"""

from __future__ import annotations

import json
import shlex
import shutil
import signal
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from rich.table import Table
from rich.text import Text

from qlora_dist.commands.demo_data import PROMPT, write_docstring_rows
from qlora_dist.commands.demo_model import MODEL_NAME, prepare_model
from qlora_dist.config.load import load_config
from qlora_dist.errors import LaunchError
from qlora_dist.metrics import streams
from qlora_dist.metrics.console import Reporter, duration
from qlora_dist.run.child_process import run_child

MIN_STEPS, MAX_STEPS = 8, 40
NUM_MEASURED = 4
_FORWARD_SHARE = 0.4
"""Time of a token in evaluation over its time in training, where backward follows at twice the cost
of forward."""

CONFIG = """\
# Written by `qlora-dist demo`.
output_dir: {output_dir}
model:
  path: {training.model}
adapter:
  rank: 16
  alpha: 32
data:
  train: {training.files[0]}
  eval: {training.files[1]}
  max_seq_len: 384
optim:
  optimizer: paged_adamw_8bit
  lr: 1.0e-3
  schedule: cosine
  warmup_steps: {warmup_steps}
  max_steps: {max_steps}
  micro_batch_size: 2
  grad_accum_steps: {grad_accum_steps}
parallel:
  backend: {training.backend}
memory:
  recompute: none
checkpoint:
  resume: never
"""


@dataclass(frozen=True)
class DemoResult:
    """Figures that the demo leaves in demo.json."""

    base_eval_loss: float
    adapter_eval_loss: float
    prepare_seconds: float
    train_seconds: float
    """Wall time of the training command, from its start to its exit."""
    tokens_per_second: float
    """Non-padding tokens of all processes over time, in all optimizer steps but the first."""
    world_size: int
    backend: str
    model: str


def demo(output_dir: str, model: str | None, minutes: float, max_steps: int | None) -> None:
    """Prepare, train and compare; leave a run in `output_dir`, with demo.json in it.

    Args:
        minutes: time for training; 8 to 40 steps are taken, as many as fit.
        max_steps: number of steps, whatever time they take.

    Raises:
        QloraDistError: the model cannot be obtained, or training failed (its own message is above).
    """
    reporter, run = Reporter(is_main=True), Path(output_dir)
    prepared = run.parent / "prepared"
    started = time.perf_counter()
    reporter.log(f"1/4  model: {model or MODEL_NAME}")
    model_path = model or str(prepare_model(prepared, reporter))
    reporter.log("2/4  data: functions of the Python standard library and their docstrings")
    with reporter.working("reading the standard library"):
        files = write_docstring_rows(prepared)
    prepare_seconds = time.perf_counter() - started

    import torch  # not earlier: it takes seconds, and the lines above come at once

    num_gpus = torch.cuda.device_count()
    world_size = num_gpus or 2  # two on a CPU, to show sharding there as well
    backend = "fsdp" if world_size > 1 else "single"
    devices = f"{world_size} {'GPU' if num_gpus else 'CPU'} process{'es' if world_size > 1 else ''}"
    reporter.log(f"3/4  training: {devices}, {backend}")
    training = Training(prepared, model_path, files, world_size, backend)
    if max_steps is None:
        pace = training.measure(reporter)
        max_steps = steps_within(60 * minutes, pace)
        reporter.log(
            f"     {max_steps} steps: {pace.step_seconds:.1f} s each, and "
            f"{pace.other_seconds:.0f} s for all else, make about "
            f"{duration(pace.other_seconds + max_steps * pace.step_seconds)} "
            f"of --minutes {minutes:g}"
        )
    command = training.command(output_dir, max_steps)
    reporter.log(f"     {shlex.join(command)}")
    train_seconds = _run(command)

    name = model or MODEL_NAME
    result = summarize(run, prepare_seconds, train_seconds, world_size, backend, name)
    text = json.dumps(asdict(result), indent=2)
    (run / "demo.json").write_text(text + "\n", encoding="utf-8")
    reporter.log("4/4  the same question before and after, on a function from a held-out module")
    _show_answers(run, files[1], reporter)
    _show_result(run, result, training.config_file, reporter)


@dataclass(frozen=True)
class Pace:
    """Speed of this machine with the demo's model."""

    step_seconds: float
    other_seconds: float
    """Time to start, to load and for both evaluations."""


def steps_within(seconds: float, pace: Pace) -> int:
    """Return how many optimizer steps fit into `seconds`, but at least 8 and at most 40."""
    fitting = int((seconds - pace.other_seconds) / pace.step_seconds)
    return min(MAX_STEPS, max(MIN_STEPS, fitting))  # fewer than 8 would show no effect


@dataclass(frozen=True)
class Training:
    """Training run of the demo, started as a command of its own."""

    prepared: Path
    model: str
    files: tuple[Path, Path]
    """Data for training and for evaluation."""
    world_size: int
    backend: str

    @property
    def config_file(self) -> Path:
        """YAML file that :meth:`command` writes."""
        return self.prepared / "demo.yaml"

    def command(self, output_dir: str, max_steps: int) -> list[str]:
        """Write the configuration, and return the words of the command that trains with it."""
        text = CONFIG.format(
            training=self,
            output_dir=output_dir,
            max_steps=max_steps,
            warmup_steps=max(1, max_steps * 3 // MAX_STEPS),
            grad_accum_steps=max(1, 2 // self.world_size),
        )
        self.config_file.write_text(text, encoding="utf-8")
        load_config(self.config_file)  # refuses a path that YAML does not take for text
        return [*launch_command(self.world_size), "train", str(self.config_file)]

    def measure(self, reporter: Reporter) -> Pace:
        """Time the first steps of a run in a folder that is removed again.

        Raises:
            LaunchError: the steps failed.
        """
        reporter.log(f"     measuring the first {NUM_MEASURED} steps")
        folder = self.prepared / ".measured"
        shutil.rmtree(folder, ignore_errors=True)
        try:
            # Both evaluations are only estimated, below: they take as long as many steps.
            without = ["--data.eval", "null", "--logging.tensorboard", "false"]
            with reporter.working("measuring"):
                seconds = _run([*self.command(str(folder), NUM_MEASURED), *without], is_quiet=True)
            steps = _rows_of_steps(folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        timed = steps[1:]  # the first step includes warm-up
        step_seconds = min(row["step_seconds"] for row in timed)
        tokens_per_second = max(row["tokens_per_second"] for row in timed)
        num_tokens = self.files[1].stat().st_size // 4  # about four characters each
        evaluation_seconds = num_tokens / tokens_per_second * _FORWARD_SHARE
        start_seconds = seconds - sum(row["step_seconds"] for row in steps)
        return Pace(step_seconds, start_seconds + 2 * evaluation_seconds)


def launch_command(world_size: int) -> list[str]:
    """Return the words that start `qlora_dist` on `world_size` processes of this machine."""
    if world_size == 1:
        return [sys.executable, "-m", "qlora_dist"]
    # Accelerate starts several CPU processes only when told to treat them as it treats GPUs.
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
    sizes = ["--num_machines", "1", "--num_processes", str(world_size)]
    # Values that accelerate would otherwise warn that it assumes.
    defaults = ["--mixed_precision", "no", "--dynamo_backend", "no"]
    return [*launcher, *sizes, *defaults, "-m", "qlora_dist"]


def summarize(
    run: Path,
    prepare_seconds: float,
    train_seconds: float,
    world_size: int,
    backend: str,
    model: str,
) -> DemoResult:
    """Read the figures of a finished run from its metrics.jsonl."""
    rows = _json_lines(run / "metrics.jsonl")
    eval_losses = [row["eval_loss"] for row in rows if "eval_loss" in row]
    steps = _rows_of_steps(run)
    timed = steps[1:] or steps  # the first step includes warm-up
    tokens, seconds = (sum(row[key] for row in timed) for key in ("num_tokens", "step_seconds"))
    return DemoResult(
        base_eval_loss=eval_losses[0],
        adapter_eval_loss=eval_losses[-1],
        prepare_seconds=round(prepare_seconds, 1),
        train_seconds=round(train_seconds, 1),
        tokens_per_second=round(tokens / seconds, 1),
        world_size=world_size,
        backend=backend,
        model=model,
    )


def _json_lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def _rows_of_steps(run: Path) -> list[dict[str, Any]]:
    return [row for row in _json_lines(run / "metrics.jsonl") if "loss" in row]


def _run(command: list[str], is_quiet: bool = False) -> float:
    """Train, and return the seconds that it took.

    Args:
        is_quiet: show the output of the command only if it fails.

    Raises:
        LaunchError: training failed.
        SystemExit: this process was sent SIGINT, SIGTERM or SIGHUP, and passed it on to training.
    """
    started = time.perf_counter()
    with TemporaryFile("w+", encoding="utf-8") as output:
        code, signal_number = run_child(command, output=output if is_quiet else None)
        if signal_number is not None:
            streams.write(sys.stderr, f"stopped ({signal.Signals(signal_number).name})\n")
            # As a shell has it, not 75: the demo never goes on from a checkpoint.
            raise SystemExit(128 + signal_number)
        if code:
            output.seek(0)
            streams.write(sys.stderr, output.read())
            raise LaunchError(f"training ended with exit code {code}; its messages are above.")
    return time.perf_counter() - started


def _show_answers(run: Path, eval_file: Path, reporter: Reporter) -> None:
    """Print one held-out question with the answers of base model, adapted model and author."""
    from qlora_dist.build import load_trained
    from qlora_dist.generation import Sampling, answer, prompt_ids
    from qlora_dist.run.adapter_folder import read_adapter_record
    from qlora_dist.runtime.processes import start_runtime

    recipe = read_adapter_record(run / "adapter")
    runtime = start_runtime(seed=0, dtype="auto")
    with reporter.working("loading the model"):
        model, tokenizer = load_trained(run / "adapter", recipe, runtime=runtime, reporter=reporter)
    turns = [[turn["content"] for turn in row["messages"]] for row in _json_lines(eval_file)]
    # About 420 characters are a function of a dozen lines.
    question, authors_answer = min(turns, key=lambda turn: abs(len(turn[0]) - 420))
    ids = prompt_ids(question, tokenizer, "messages", recipe.template_kwargs)
    with reporter.working("answering"):
        with model.disable_adapter():
            before = answer(model, tokenizer, ids, Sampling(max_new_tokens=80), runtime)
        after = answer(model, tokenizer, ids, Sampling(max_new_tokens=80), runtime)
    reporter.log("\n" + question.removeprefix(PROMPT).strip() + "\n")
    table = Table(show_lines=True)
    for heading in ("base model", "with the adapter", "written by its author"):
        table.add_column(heading, ratio=1)
    # Text, not str: brackets in code are no markup.
    table.add_row(Text(before), Text(after), Text(authors_answer))
    reporter.console.print(table)


def _show_result(run: Path, result: DemoResult, config_file: Path, reporter: Reporter) -> None:
    """Print figures, files and the next commands, in a form that can be copied into the shell."""
    folder = Path(sys.executable).parent
    if folder.is_relative_to(Path.cwd()):
        folder = folder.relative_to(Path.cwd())
    # Outside an activated environment the shell finds the programs only beside this Python.
    programs = "" if shutil.which("qlora-dist") else shlex.quote(f"{folder}/")

    def quote(path: Path) -> str:
        return shlex.quote(str(path))

    reporter.log(
        f"held-out loss {result.base_eval_loss:.4f} -> {result.adapter_eval_loss:.4f} | "
        f"{result.tokens_per_second:,.0f} tokens/s | "
        f"prepared in {duration(result.prepare_seconds)}, "
        f"trained in {duration(result.train_seconds)}\n\n"
        f"run       {run}  (config.yaml, metrics.jsonl, demo.json)\n"
        f"adapter   {run / 'adapter'}  (PEFT format)\n"
        f"config    {config_file}\n\n"
        "next:\n"
        f"  {programs}qlora-dist generate --adapter {quote(run / 'adapter')} --chat\n"
        f"  {programs}tensorboard --logdir {quote(run / 'tensorboard')}\n"
        f"  {programs}qlora-dist train {quote(config_file)} "
        f"--output_dir {quote(run.parent / 'mine')} --data.train YOUR.jsonl --data.eval null"
    )
