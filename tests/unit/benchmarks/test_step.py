"""The training step beside its peers: contenders share a type; only equal kinds are compared."""

import re
from importlib.util import find_spec

import pytest

from benchmarks.machine import describe_machine, kind_of
from benchmarks.step import Ours, Peer, base_of, contenders_in, verdict, whole_of

AMX = {
    "device": "cpu",
    "num_gpus": 0,
    "cpu": "Xeon",
    "cpu_features": ["avx2", "amx_bf16"],
    "isa_limits": {},
}
AVX2 = {**AMX, "cpu": "Core", "cpu_features": ["avx2"]}
LIMITED = {**AMX, "isa_limits": {"ATEN_CPU_CAPABILITY": "avx2"}}
OLD = {"device": "cpu", "num_gpus": 0, "cpu": "EPYC"}
H100 = {**AMX, "device": "NVIDIA H100", "num_gpus": 1}


def committed(machine: dict, dtype: str, lead: float) -> dict:
    """Result as committed to the repository, of this program alone."""
    whole = whole_of(contenders_in(dtype))
    return {
        "machine": machine,
        "settings": {"dtype": dtype},
        "contenders": {whole: {"times_trl": lead}},
    }


def test_in_bfloat16_all_are_as_trl_is_by_default() -> None:
    """The base is TRL at its defaults, and no peer computes in another type."""
    contenders = contenders_in("bfloat16")
    assert next(iter(contenders)) == base_of("bfloat16") == "TRL, defaults"
    assert {one.dtype for one in contenders.values() if isinstance(one, Peer)} == {"bfloat16"}
    assert [one for one in contenders.values() if isinstance(one, Ours)].count(Ours()) == 1


def test_in_float32_peers_are_too_and_trls_defaults_are_one_more() -> None:
    """The base is TRL in float32 with its default recomputation; only one peer keeps bfloat16.

    No two contenders are equal: float32 takes no attention in blocks, so that step is left out.
    """
    contenders = contenders_in("float32")
    assert next(iter(contenders)) == base_of("float32")
    assert contenders[base_of("float32")] == Peer("TRL", "float32", is_recomputing=True)
    others = [
        name for name, one in contenders.items() if isinstance(one, Peer) and one.dtype != "float32"
    ]
    assert others == ["TRL, defaults"]
    assert len(set(contenders.values())) == len(contenders)
    assert Ours(attention="sdpa") not in contenders.values()


def test_a_lead_is_compared_with_one_of_the_same_kind() -> None:
    """In equal type, features and limits, a loss of up to 15 % of the lead passes."""
    before = committed(AMX, "bfloat16", 2.0)
    assert verdict(1.8, before, AMX, "bfloat16").startswith(
        "as quick as before: 1.8 times TRL, defaults;"
    )
    with pytest.raises(
        SystemExit,
        match=r"slower: 1\.6 times TRL, defaults; the committed result says 2, and 15% less",
    ):
        verdict(1.6, before, AMX, "bfloat16")


@pytest.mark.parametrize(
    ("before", "machine", "dtype", "why"),
    [
        (
            committed(AMX, "bfloat16", 9.0),
            AVX2,
            "float32",
            "from a CPU with avx2, amx_bf16 in bfloat16, this is a CPU",
        ),
        (committed(AMX, "bfloat16", 9.0), AMX, "float32", "amx_bf16 in bfloat16, this is"),
        (
            committed(AMX, "bfloat16", 9.0),
            LIMITED,
            "bfloat16",
            "ATEN_CPU_CAPABILITY=avx2 in bfloat16)",
        ),
        (
            committed(OLD, "bfloat16", 9.0),
            AMX,
            "bfloat16",
            "from a CPU of unknown features (EPYC) in bfloat16",
        ),
        (
            committed(H100, "bfloat16", 9.0),
            {**H100, "device": "NVIDIA L4"},
            "bfloat16",
            "this is NVIDIA L4 in bfloat16",
        ),
        (None, AMX, "bfloat16", "no result is committed"),
    ],
)
def test_elsewhere_it_need_only_be_a_lead(
    before: dict | None, machine: dict, dtype: str, why: str
) -> None:
    """With a committed result of another kind, both are named; being slower than TRL fails."""
    with pytest.raises(
        SystemExit, match=rf"slower than TRL in {dtype}: 0\.9 times .*{re.escape(why)}"
    ):
        verdict(0.9, before, machine, dtype)
    found = verdict(1.1, before, machine, dtype)
    assert found.startswith("not slower than TRL: 1.1 times")
    assert why in found


def test_the_machine_says_what_it_can_and_may_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits of the environment are part of a result, so limited and free runs are not compared."""
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    free = describe_machine()
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    limited = describe_machine()
    assert "ATEN_CPU_CAPABILITY" not in free["isa_limits"]
    assert limited["isa_limits"]["ATEN_CPU_CAPABILITY"] == "avx2"
    if not free["num_gpus"]:
        assert kind_of(free, "float32") != kind_of(limited, "float32")


@pytest.mark.skipif(find_spec("trl") is None, reason="TRL comes with the extra `bench`")
def test_trl_computes_in_bfloat16_unasked(tmp_path) -> None:
    """TRL's default compute type is bfloat16, as the benchmark assumes."""
    from trl import SFTConfig

    assert SFTConfig(output_dir=str(tmp_path), use_cpu=True).bf16
