"""The benchmark of one GPU: its plan, repeated calls, and cases that crash or cannot run."""

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import run_all
from benchmarks.gpu_carry import size_of, strip
from benchmarks.gpu_parts import attention
from benchmarks.gpu_parts.gather import foreach_copies, num_different
from benchmarks.gpu_parts.norms import _numbers, _ways, distances
from benchmarks.gpu_parts.plan import MOST_SECONDS, Case, Part, all_parts, total_seconds
from benchmarks.gpu_parts.report import plan_table, table
from benchmarks.gpu_parts.results import MACHINE, ROOT, Results
from benchmarks.gpu_parts.rows import padded_batch
from benchmarks.gpu_parts.steps import union_length
from benchmarks.gpu_parts.suite import outcome
from benchmarks.gpu_parts.worker import Workers, attempt
from benchmarks.gpu_rehearsal import check_environment, is_for_want_of_gpu

HERE = dict.fromkeys(MACHINE, "1")
PROBE = f"""
import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
from benchmarks.gpu_parts.worker import serve

def run(case, seconds):
    if case.function == "die":
        os._exit(3)
    if case.function == "hang":
        time.sleep(60)
    return {{"answer": case.arguments.get("answer", 1), "process": os.getpid()}}

serve({{"device": "probe"}}, run)
"""
"""Worker like those of the benchmark, for cases that need no torch."""


@pytest.fixture
def workers() -> Iterator[Workers]:
    with Workers([sys.executable, "-c", PROBE]) as made:
        yield made


def opened(file: Path, device: str = "1", is_small: bool = True) -> Results:
    results = Results(file)
    results.begin({**HERE, "device": device}, is_small)
    return results


def rows_of(file: Path, part: str) -> dict[str, dict]:
    return json.loads(file.read_text())["parts"][part]


def test_the_plan_stays_under_nine_minutes() -> None:
    """Planned seconds stay below nine minutes, and case names are unique and printed by `--plan`.

    Tiny shapes have the same names.
    """
    parts = all_parts(is_small=False)
    assert total_seconds(parts) < MOST_SECONDS == 9 * 60
    names = [(part.name, case.name) for part in parts for case in part.cases]
    assert len(set(names)) == len(names)
    assert names == [
        (part.name, case.name) for part in all_parts(is_small=True) for case in part.cases
    ]
    said = plan_table(parts)
    assert f"{total_seconds(parts)} of 540 seconds" in said
    assert all(f"{name} (" in said for _, name in names)


def test_a_case_that_dies_or_hangs_leaves_the_others(workers: Workers, tmp_path: Path) -> None:
    """Later cases run in a new process, the reason is recorded, only a timeout is retried."""
    part = Part(
        "one",
        60,
        [
            Case("first", "answer"),
            Case("dies", "die"),
            Case("second", "answer"),
            Case("third", "answer"),
            Case("hangs", "hang", limit_seconds=3),
            Case("last", "answer"),
            Case("apart", "answer", own_process=True),
        ],
    )
    results = opened(tmp_path / "out.json")
    run_all(results, results.left_of([part], []), workers, time.monotonic() + 60)
    rows = rows_of(results.file, "one")
    assert [name for name, row in rows.items() if "not measured" in row] == ["dies", "hangs"]
    assert "ended with 3" in rows["dies"]["not measured"]
    assert "took longer than 3 seconds" in rows["hangs"]["not measured"]
    assert rows["second"]["process"] == rows["third"]["process"] != rows["first"]["process"]
    assert len({rows[name]["process"] for name in ("third", "last", "apart")}) == 3
    assert [case.name for _, cases in results.left_of([part], []) for case in cases] == ["hangs"]


def test_processes_that_cannot_start_are_a_reason_and_no_wait(tmp_path: Path) -> None:
    """The last line of their output is recorded at once, and another call may try."""
    part = Part("one", 60, [Case("a", "answer"), Case("b", "answer")])
    results = opened(tmp_path / "out.json")
    started = time.monotonic()
    with Workers([sys.executable, "-c", "import sys; sys.exit('no libcuda here')"]) as broken:
        run_all(results, results.left_of([part], []), broken, started + 60)
    assert time.monotonic() - started < 30
    for row in rows_of(results.file, "one").values():
        assert "did not start" in row["not measured"]
        assert "no libcuda here" in row["not measured"]
        assert row["unfinished"]


def test_results_are_on_disk_after_every_case(workers: Workers, tmp_path: Path, capsys) -> None:
    """The file holds a case's whole row before its line is printed, and no partial file is left."""
    file = tmp_path / "results" / "out.json"
    results = opened(file)
    seen: list[list[str]] = []
    add = results.add

    def watched(part: str, case: str, row: dict) -> None:
        add(part, case, row)
        seen.append(list(rows_of(file, part)))

    results.add = watched  # type: ignore[method-assign]
    part = Part("one", 60, [Case("a", "answer"), Case("b", "answer")])
    run_all(results, results.left_of([part], []), workers, time.monotonic() + 60)
    assert seen == [["a"], ["a", "b"]]
    assert [path.name for path in file.parent.iterdir()] == ["out.json"]
    assert capsys.readouterr().out.count("one | ") == 2


def test_a_second_call_goes_on_where_the_first_ended(workers: Workers, tmp_path: Path) -> None:
    """A second call keeps results and reasons, and runs missing cases and parts asked for again."""
    file = tmp_path / "out.json"
    parts = [
        Part("one", 60, [Case(name, "answer") for name in ("done", "refused", "late", "new")]),
        Part("two", 60, [Case("done", "answer", {"answer": 2})]),
    ]
    first = opened(file)
    first.add("one", "done", {"answer": 0})
    first.add("one", "refused", {"not measured": "out of memory"})
    first.add("one", "late", {"not measured": "the time was used up", "unfinished": True})
    first.add("two", "done", {"answer": 0})
    second = opened(file)
    run_all(second, second.left_of(parts, ["two"]), workers, time.monotonic() + 60)
    one = rows_of(file, "one")
    assert one["done"]["answer"] == 0
    assert one["refused"]["not measured"] == "out of memory"
    assert one["late"]["answer"] == one["new"]["answer"] == 1
    assert rows_of(file, "two")["done"]["answer"] == 2
    assert opened(file).left_of(parts, []) == []


def test_without_time_nothing_begins_and_results_stay(workers: Workers, tmp_path: Path) -> None:
    """Cases without time are recorded as unfinished; a repeated case keeps its earlier result.

    With less time than the plan has, the first parts get it.
    """
    file = tmp_path / "out.json"
    results = opened(file)
    results.add("one", "done", {"answer": 0})
    part = Part("one", 60, [Case("done", "answer"), Case("other", "answer")])
    run_all(results, results.left_of([part], ["one"]), workers, time.monotonic())
    rows = rows_of(file, "one")
    assert rows["done"]["answer"] == 0
    assert rows["other"]["unfinished"]
    short = [Part("first", 60, [Case("a", "answer")]), Part("last", 3600, [Case("b", "answer")])]
    run_all(results, results.left_of(short, []), workers, time.monotonic() + 30)
    assert rows_of(file, "first")["a"]["answer"] == 1


def test_results_of_another_machine_are_not_mixed_in(tmp_path: Path) -> None:
    """Results of other machines, versions or tiny shapes are refused; the file stays as it was."""
    file = tmp_path / "out.json"
    opened(file).add("one", "a", {"answer": 1})
    before = file.read_bytes()
    with pytest.raises(SystemExit, match=r"device 1 there, H100 here.*--out"):
        opened(file, device="H100")
    with pytest.raises(SystemExit, match="is_small True there, False here"):
        opened(file, is_small=False)
    assert file.read_bytes() == before


def test_one_case_that_runs_and_one_that_cannot() -> None:
    """A step is reported with its rate and share of the bound; an unknown setting is named."""
    cases = {
        case.name: case
        for part in all_parts(is_small=True)
        for case in part.cases
        if part.name == "7B"
    }
    case = cases["1x2048, none"]
    row = attempt(replace(case, arguments={**case.arguments, "num_steps": 1, "saves": "write"}))
    assert row["tokens_per_second"] > 0
    assert 0 < row["share_of_bound"] < 1
    assert len(row["seconds_of_each_step"]) == 1
    assert 0 < row["busy"]["share"] <= 1
    assert row["save"]["checkpoint_gib"] > row["save"]["optimizer_state_host_gib"] > 0
    refused = attempt(replace(case, arguments={**case.arguments, "memory": {"never": True}}))
    assert refused.keys() == {"not measured"}
    assert "unknown key memory.never" in refused["not measured"]
    report = table(
        {"parts": {"7B": {"one": row, "other": refused, "third": {**row, "bytes_that_differ": 7}}}}
    )
    assert report.count("| 7B |") == 5  # steps and what else they found, and the refusal
    assert '"bytes_that_differ": 7' in report
    assert attempt(Case("x", "nowhere.function")) == {
        "not measured": "benchmarks.gpu_parts.nowhere is not installed"
    }


def test_attention_that_returns_no_numbers_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Non-finite results are named by kernel and length; a refusal of masks is recorded."""
    plain = attention._results

    def faulty(backend, q, *others):
        found = plain(backend, q, *others)
        if backend == attention.BACKENDS["flash"] and q.shape[2] == 8:
            found["dq"][0, 0, 3] = float("nan")
        return found

    monkeypatch.setattr(attention, "_results", faulty)
    row = attention.not_numbers([8, 16])
    assert row["wrong"] == ["flash, 8, ordinary", "flash, 8, massive"]
    assert row["flash, 8, massive"] == {
        "out": 0,
        "dq": 128,
        "dk": 0,
        "dv": 0,
        "distance": "not a number",
    }
    assert row["math, 16, massive"]["distance"] < 0.01
    assert row["cuDNN, 8, ordinary"].startswith("refused: ")


def test_kernels_that_run_at_once_are_counted_once() -> None:
    """Busy time is the length of the union of the kernels' spans."""
    assert union_length([(0, 10), (2, 5), (8, 12), (20, 21)]) == 13
    assert union_length([]) == 0


def test_padded_rows_have_targets_in_their_samples_only() -> None:
    """Padding is masked and holds no targets; rows differ in length, so there is a mask."""
    batch = padded_batch(100, 4, 40)
    assert batch.attention_mask.sum(1).tolist() == [40, 32, 22, 12]
    assert (batch.labels[batch.attention_mask == 0] == -100).all()
    assert batch.num_targets == (batch.labels[:, 1:] != -100).sum()
    assert batch.num_tokens == 106


def test_one_changed_bit_is_one_byte_that_differs() -> None:
    """Bytes are compared, also in NaNs, which compare as unequal; copies here change none."""
    weights = torch.tensor([float("nan"), 1.0, 2.0], dtype=torch.bfloat16)
    other = weights.clone()
    assert num_different(weights, other) == 0
    other.view(torch.int16)[0] ^= 1
    assert num_different(weights, other) == 1
    assert {foreach_copies()[name] for name in ("uint8", "bfloat16")} == {0}


def test_the_norm_is_compared_with_exact_results() -> None:
    """Each norm's error is one bfloat16 rounding and not zero; a wrong norm is far off."""
    x, grad, weight = _numbers(8, 64, torch.device("cpu"))
    for norm in _ways(weight).values():
        found = distances(norm, x, grad, weight)
        assert all(1e-4 < distance < 2**-8 for distance in found.values())
        wrong = distances(lambda x, norm=norm: norm(1.1 * x) + 0.1 * x, x, grad, weight)
        assert all(distance > 0.05 for distance in wrong.values())


def test_outcomes_of_tests_are_counted() -> None:
    """Outcomes are counted; all tests skipped is no result, and a timeout leaves it unfinished."""
    said = (
        "tests/gpu/test_a.py::test_b[x y] PASSED [ 5%]\ntests/gpu/test_a.py::test_c FAILED [10%]\n"
    )
    row = outcome(said, 1, None)
    assert row["outcome"] == {"failed": 1, "passed": 1}
    assert row["failed"] == ["tests/gpu/test_a.py::test_c"]
    assert outcome(said, -1, 30.0)["unfinished"]
    skipped = (
        "tests/gpu/test_a.py::test_b SKIPPED (x) [50%]\n"
        "SKIPPED [1] tests/gpu/test_a.py:3: needs a CUDA device\n"
    )
    assert outcome(skipped, 0, None) == {
        "not measured": "all 1 tests were skipped: needs a CUDA device"
    }
    assert "ended with 4" in outcome("no such file", 4, None)["not measured"]


def test_only_what_a_cpu_lacks_excuses_a_rehearsed_case() -> None:
    """A missing package, an error or lack of time excuses no case."""
    assert is_for_want_of_gpu("needs a GPU: no such kernel")
    assert is_for_want_of_gpu("all 2 tests were skipped: needs a CUDA device; copies need a GPU")
    assert not is_for_want_of_gpu(
        "all 2 tests were skipped: needs a CUDA device; flash-attn is not installed"
    )
    for reason in ("trl is not installed", "RuntimeError: no GPU", "the time was used up"):
        assert not is_for_want_of_gpu(reason)


def test_a_rehearsal_wants_the_listed_packages_and_no_others() -> None:
    """This environment has other packages, and the message names them."""
    with pytest.raises(
        SystemExit, match=r"is not as gpu_machine.txt says: .*bitsandbytes: none there"
    ):
        check_environment(sys.executable)


def test_carried_packages_are_stripped_to_what_a_run_reads(tmp_path: Path) -> None:
    """Libraries of other CUDA versions, caches, scripts and tests go; metadata stays."""
    kept = [
        "bitsandbytes/__init__.py",
        "bitsandbytes/libbitsandbytes_cuda130.so",
        "bitsandbytes/libbitsandbytes_cpu.so",
        "trl-1.dist-info/METADATA",
        "peft/tuners/tests.py",
    ]
    gone = [
        "bitsandbytes/libbitsandbytes_cuda128.so",
        "dill/tests/test_x.py",
        "peft/tuners/__pycache__/x.pyc",
        "bin/trl",
    ]
    for name in (*kept, *gone):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("12345678")
    strip(tmp_path)
    found = {str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if file.is_file()}
    assert found == set(kept)
    assert size_of(tmp_path) == 8 * len(kept)
