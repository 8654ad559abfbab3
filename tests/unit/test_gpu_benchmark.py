"""The benchmark of one GPU on this machine's CPU: what it reports, what it leaves out and why."""

from dataclasses import replace

from benchmarks.gpu import Case, all_parts, attempt, table


def test_one_case_that_runs_and_one_that_cannot() -> None:
    """A step is reported with its rate and its share of the bound; a setting that is not there, by its name."""
    cases = {case.name: case for case in all_parts(is_small=True)["7B"]}
    case = cases["1x2048, none"]
    row = attempt(replace(case, arguments={**case.arguments, "num_steps": 1}))
    assert row["tokens_per_second"] > 0
    assert 0 < row["share_of_bound"] < 1
    assert len(row["seconds_of_each_step"]) == 1
    refused = attempt(replace(case, arguments={**case.arguments, "memory": {"never": True}}))
    assert refused.keys() == {"not measured"}
    assert "unknown key memory.never" in refused["not measured"]
    report = table({"parts": {"7B": {"one": row, "other": refused}}})
    assert report.count("| 7B |") == 2


def test_a_package_that_is_missing_is_named() -> None:
    """The case is left out; nothing else is."""
    assert attempt(Case("x", "nowhere.function")) == {"not measured": "benchmarks.gpu_parts.nowhere is not installed"}
