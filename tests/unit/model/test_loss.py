"""The loss of target tokens in chunks: the plain loss and gradients, in far less memory."""

import copy
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.memory import StorageCounter
from qlora_dist.config.schema import IGNORE_INDEX
from qlora_dist.model import logits as logits_module
from qlora_dist.model import loss as loss_module
from qlora_dist.model.cpu import loss as cpu_loss
from qlora_dist.model.logits import LogitsTransform, logits_transform
from qlora_dist.model.loss import loss_bytes, loss_note, target_loss_sum
from qlora_dist.model.parts import decoder_layers
from tests.support.processes import run_on_processes
from tests.support.training import train_here

VOCAB = 160
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**COMMON, "num_key_value_heads": 2}

# name: (config class, its arguments, the form of its logits)
FAMILIES = {
    "llama": ("LlamaConfig", GROUPED, LogitsTransform()),
    "llama-tied": ("LlamaConfig", {**GROUPED, "tie_word_embeddings": True}, LogitsTransform()),
    "gemma2": (
        "Gemma2Config",
        {**GROUPED, "head_dim": 8, "query_pre_attn_scalar": 8},
        LogitsTransform(cap=30.0),
    ),
    "cohere": ("CohereConfig", GROUPED, LogitsTransform(scale=0.0625)),
    "granite": ("GraniteConfig", {**GROUPED, "logits_scaling": 8.0}, LogitsTransform(scale=0.125)),
    "granite, by six": (
        "GraniteConfig",
        {**GROUPED, "logits_scaling": 6.0},
        LogitsTransform(scale=pytest.approx(1 / 6)),
    ),
    "phi, with a bias": ("PhiConfig", GROUPED, LogitsTransform()),
    "gpt_neox": ("GPTNeoXConfig", COMMON, LogitsTransform()),
    "falcon_h1": (
        "FalconH1Config",
        {
            **GROUPED,
            "lm_head_multiplier": 0.03,
            "mamba_d_ssm": 32,
            "mamba_n_heads": 4,
            "mamba_d_head": 8,
            "mamba_d_state": 8,
            "mamba_n_groups": 1,
        },
        LogitsTransform(scale=pytest.approx(0.03)),
    ),
    "recurrent_gemma": (
        "RecurrentGemmaConfig",
        {**GROUPED, "lru_width": 32, "num_hidden_layers": 3},
        LogitsTransform(cap=30.0),
    ),
}


def build(family: str) -> nn.Module:
    """Build a tiny random float32 model with frozen ends, whose decoder layers learn."""
    torch.manual_seed(0)
    config_class, arguments, _ = FAMILIES[family]
    model = transformers.AutoModelForCausalLM.from_config(
        getattr(transformers, config_class)(**arguments)
    )
    for param in model.parameters():
        nn.init.normal_(param, std=0.2)
    model.requires_grad_(False)
    for layer in decoder_layers(model):
        layer.requires_grad_(True)
    with torch.no_grad():  # logits far beyond the cap, or it would hardly matter
        model.get_output_embeddings().weight.mul_(10)
    return model


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    """Models by family."""
    return {family: build(family) for family in FAMILIES}


def batch(*, num_targets: int | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return input ids, mask and labels, (2, 12): a padded row, and targets in part of both."""
    ids = torch.randint(3, VOCAB, (2, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    labels = ids.masked_fill((mask == 0) | (torch.arange(12) < 4), IGNORE_INDEX)
    if num_targets is not None:
        flat = labels.flatten()
        flat[(flat != IGNORE_INDEX).nonzero()[num_targets:]] = IGNORE_INDEX
    return ids, mask, labels


def plain_loss(
    model: nn.Module, ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """Return the cross-entropy of all logits in float32, as every textbook has it."""
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
    return nn.functional.cross_entropy(
        logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
    )


def gradient(model: nn.Module, loss: torch.Tensor) -> torch.Tensor:
    """Return the gradient of all that learns, in one float64 vector."""
    params = [param for param in model.parameters() if param.requires_grad]
    found = torch.autograd.grad(loss, params, allow_unused=True)
    return torch.cat([torch.zeros(0), *(g.flatten() for g in found if g is not None)]).double()


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return the distance of two vectors relative to the second's norm."""
    return ((one - other).norm() / other.norm()).item()


@pytest.fixture
def tiny_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let three rows of float32 logits fill a chunk, and two rows a piece of it."""
    monkeypatch.setattr(loss_module, "_CHUNK_BYTES", 3 * VOCAB * 12)
    monkeypatch.setattr(cpu_loss, "_PIECE", 2 * VOCAB)


@pytest.fixture(params=["as on a CPU", "as on a GPU"])
def device_of_loss(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute the loss as on a CPU or as on a GPU, both on the CPU."""
    monkeypatch.setattr(loss_module, "is_on_cpu", lambda _: request.param == "as on a CPU")


@pytest.mark.usefixtures("tiny_chunks", "device_of_loss")
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_the_plain_ones(models: dict[str, nn.Module], family: str) -> None:
    """Loss and gradients in float32 agree within 1e-5 in every family, and its transform is found.

    Families have scaled and capped logits, tied heads and heads with a bias; batches have many
    targets, one and none.
    """
    model = models[family].train()
    assert logits_transform(model) == FAMILIES[family][2]
    assert model.training
    for num_targets in (None, 1, 0):
        inputs = batch(num_targets=num_targets)
        expected, found = plain_loss(model, *inputs), target_loss_sum(model, *inputs)
        assert found.dtype == torch.float32
        assert found.shape == ()
        assert found.item() == pytest.approx(expected.item(), rel=1e-5)
        plain, mine = gradient(model, expected), gradient(model, found)
        if num_targets == 0:
            assert mine.numel() == plain.numel()
            assert not mine.any()
        else:
            assert distance(mine, plain) <= 1e-5
    assert "forward" not in model.get_output_embeddings().__dict__


def test_the_cap_matters_here(models: dict[str, nn.Module]) -> None:
    """Without its cap the Gemma of these tests has a loss that differs by more than 1 %."""
    model, inputs = models["gemma2"], batch()
    uncapped = copy.copy(model.config)
    uncapped.final_logit_softcapping = None
    capped, model.config = model.config, uncapped
    without = plain_loss(model, *inputs)
    model.config = capped
    assert abs(without / plain_loss(model, *inputs) - 1) > 0.01


@pytest.mark.usefixtures("device_of_loss")
@pytest.mark.parametrize("family", ["llama-tied", "gemma2", "granite", "phi, with a bias"])
def test_bfloat16_loses_no_more_than_the_plain_way(
    models: dict[str, nn.Module], family: str
) -> None:
    """Loss and gradients are as near to those of float32 logits as in the plain way.

    All are computed from bfloat16 hidden states.
    """
    head = copy.deepcopy(models[family].get_output_embeddings()).bfloat16()
    form = FAMILIES[family][2]
    generator = torch.Generator().manual_seed(2)
    hidden = (torch.randn(64, 32, generator=generator) / 4).bfloat16().requires_grad_()
    targets = torch.randint(VOCAB, (64,), generator=generator)

    def cross_entropy(hidden: torch.Tensor, head: nn.Module, form: Callable) -> list[torch.Tensor]:
        loss = nn.functional.cross_entropy(form(head(hidden)).float(), targets, reduction="sum")
        return [loss.detach(), torch.autograd.grad(loss, hidden)[0].double()]

    def as_models_do(raw: torch.Tensor) -> torch.Tensor:
        scaled = raw * form.scale
        return scaled if form.cap is None else torch.tanh(scaled / form.cap) * form.cap

    exact = cross_entropy(
        hidden.detach().float().requires_grad_(), copy.deepcopy(head).float(), form
    )
    plain = cross_entropy(hidden, head, as_models_do)
    loss = loss_module._HeadLoss(head, torch.arange(64), targets, form, VOCAB)(hidden.unsqueeze(0))
    mine = [loss.detach(), torch.autograd.grad(loss, hidden)[0].double()]
    assert distance(mine[1], exact[1]) <= 1.02 * distance(plain[1], exact[1])
    assert distance(mine[0], exact[0]) <= max(1e-3, 1.02 * distance(plain[0], exact[0]))


@settings(max_examples=40, deadline=None)
@given(
    num_rows=st.integers(0, 9),
    chunk_rows=st.integers(1, 10),
    piece_rows=st.integers(1, 10),
    is_on_cpu=st.booleans(),
    seed=st.integers(0, 99),
    capped=st.booleans(),
)
def test_the_size_of_chunks_does_not_matter(
    num_rows: int, chunk_rows: int, piece_rows: int, is_on_cpu: bool, seed: int, capped: bool
) -> None:
    """Chunks and pieces of any size give the loss and gradient of one chunk, up to rounding."""
    generator = torch.Generator().manual_seed(seed)
    head = nn.Linear(8, 11).requires_grad_(False)
    hidden = torch.randn(1, 12, 8, generator=generator, requires_grad=True)
    rows = torch.randperm(12, generator=generator)[:num_rows]
    targets = torch.randint(11, (num_rows,), generator=generator)
    form = LogitsTransform(scale=2.0, cap=1.5) if capped else LogitsTransform()
    results = []
    for size, piece in ((chunk_rows, piece_rows), (12, 12)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loss_module, "_CHUNK_BYTES", size * 11 * 12)
            patch.setattr(cpu_loss, "_PIECE", piece * 11)
            patch.setattr(loss_module, "is_on_cpu", lambda _: is_on_cpu)
            loss = loss_module._HeadLoss(head, rows, targets, form, 11)(hidden)
        results.append((loss.detach(), torch.autograd.grad(3 * loss, hidden)[0]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("tiny_chunks")
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_head_that_learns_gets_its_gradients(models: dict[str, nn.Module], family: str) -> None:
    """With an adapter on the head, and with a trained head, loss and gradients are plain."""
    base = copy.deepcopy(models[family])
    adapted = get_peft_model(
        base, LoraConfig(r=4, target_modules=["lm_head", "q_proj"], init_lora_weights=False)
    )
    trained = copy.deepcopy(models[family])
    trained.get_output_embeddings().weight.requires_grad_(True)
    for model in (adapted.train(), trained.train()):
        for num_targets in (None, 0):
            inputs = batch(num_targets=num_targets)
            expected, found = plain_loss(model, *inputs), target_loss_sum(model, *inputs)
            assert found.item() == pytest.approx(expected.item(), rel=1e-5)
            plain, mine = gradient(model, expected), gradient(model, found)
            assert mine.numel() == plain.numel()
            assert (mine - plain).norm() <= 1e-5 * plain.norm()


@pytest.mark.usefixtures("tiny_chunks")
def test_evaluation_computes_the_same_loss_and_no_gradient(models: dict[str, nn.Module]) -> None:
    """Evaluation gives the loss's bits from the head's forward products only."""
    products = []
    for family, model in models.items():
        inputs = batch()
        expected = target_loss_sum(model.eval(), *inputs)
        with torch.no_grad(), torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
            assert torch.equal(target_loss_sum(model, *inputs, num_targets=13), expected), family
            products.append(counter.get_flop_counts()["Global"])
        with torch.no_grad(), torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
            model(input_ids=inputs[0], attention_mask=inputs[1], use_cache=False, logits_to_keep=1)
        layers = sum(counter.get_flop_counts()["Global"].values()) - 2 * 2 * 32 * VOCAB
        assert sum(products[-1].values()) - layers == 13 * 2 * 32 * VOCAB, family


def of_its_own(model: nn.Module) -> None:
    """Let the model's logits depend on their places in the vocabulary."""
    forward = model.forward

    def shifted(*arguments: object, **keywords: object) -> object:
        output = forward(*arguments, **keywords)
        output.logits = output.logits + torch.arange(output.logits.shape[-1]) / 100
        return output

    model.forward = shifted


def test_logits_of_another_form_are_left_to_the_model(models: dict[str, nn.Module]) -> None:
    """Logits that are neither scaled nor capped are left to the model's own code.

    The user is told why the loss takes memory.
    """
    model = copy.deepcopy(models["llama"]).train()
    assert loss_note(model) is None
    other = copy.deepcopy(model)
    of_its_own(other)
    assert logits_transform(other) is None
    assert "LlamaForCausalLM" in (loss_note(other) or "")
    inputs = batch()
    expected, found = plain_loss(other, *inputs), target_loss_sum(other, *inputs)
    assert abs(found.item() / target_loss_sum(model, *inputs).item() - 1) > 1e-3
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    assert distance(gradient(other, found), gradient(other, expected)) <= 1e-6


def train_a_model_of_its_own(folder: Path, model: Path, data: Path) -> None:
    run = {
        "model": {"path": str(model), "dtype": "float32"},
        "data": {"train": str(data), "max_seq_len": 32},
        "optim": {"max_steps": 1},
        "logging": {"tensorboard": False},
        "parallel": {"backend": "single"},
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, is_said in (("known", False), ("other", True)):
            said: list[str] = []
            patch.setattr(
                "qlora_dist.metrics.console.Reporter.log",
                lambda _, text, said=said: said.append(text),
            )
            patch.setattr(
                logits_module,
                "_transform_between",
                lambda *_, none=is_said: None if none else LogitsTransform(),
            )
            assert train_here(folder / name, run)
            assert sum("of its own of the logits" in text for text in said) == is_said


def test_a_run_says_once_that_the_model_computes_its_own_logits(
    tmp_path: Path, tiny_llama: Path, chat_file: Path
) -> None:
    """The log has one line about a model that computes its own logits, and none otherwise."""
    run_on_processes(train_a_model_of_its_own, 1, tmp_path, tiny_llama, chat_file)


def test_asking_changes_nothing(models: dict[str, nn.Module]) -> None:
    """A model is asked once, draws no random numbers for it, and stays in its mode."""
    model = copy.deepcopy(models["granite"]).train()
    torch.manual_seed(5)
    logits_transform(model)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), drawn)
    assert model.training
    model.forward = None  # asking again would fail
    assert logits_transform(model) == LogitsTransform(scale=0.125)


def peak_bytes(
    loss: Callable[[torch.Tensor, torch.Tensor, nn.Linear], torch.Tensor], num_tokens: int
) -> int:
    """Return the peak of a loss and its backward over V = 131,072 and d = 4,096 in bfloat16.

    It follows from shapes alone. The head's weight and input are left out: any loss has them.
    """
    with FakeTensorMode():
        head = nn.Linear(4096, 131072, bias=False, dtype=torch.bfloat16).requires_grad_(False)
        hidden = torch.empty(1, num_tokens, 4096, dtype=torch.bfloat16, requires_grad=True)
        targets = torch.zeros(num_tokens, dtype=torch.int64)
        with StorageCounter() as counter:
            loss(hidden, targets, head).backward()
    return counter.peak - head.weight.nbytes - hidden.nbytes


@pytest.mark.parametrize("is_gpu", [True, False])
def test_the_loss_takes_a_twentieth_of_full_logits(
    is_gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss takes at most 5 % of the peak of full logits, for 4,096 targets and V = 131,072.

    On a GPU that is the number of `loss_bytes`; on a CPU it is less than half of it.
    """
    num_tokens, vocab = 4096, 131072
    monkeypatch.setattr(loss_module, "is_on_cpu", lambda _: not is_gpu)

    def plain(hidden: torch.Tensor, targets: torch.Tensor, head: nn.Linear) -> torch.Tensor:
        return nn.functional.cross_entropy(
            head(hidden).flatten(0, 1).float(), targets, reduction="sum"
        )

    def chunked(hidden: torch.Tensor, targets: torch.Tensor, head: nn.Linear) -> torch.Tensor:
        return loss_module._HeadLoss(
            head, torch.arange(num_tokens), targets, LogitsTransform(), vocab
        )(hidden)

    full, mine = peak_bytes(plain, num_tokens), peak_bytes(chunked, num_tokens)
    assert full / (num_tokens * vocab) == pytest.approx(12, rel=0.01)  # bytes per token and entry
    assert mine <= 0.05 * full
    assert mine <= 0.15 * 4 * num_tokens * vocab  # the float32 logits alone
    assert mine <= 0.30 * 2 * num_tokens * vocab  # the bfloat16 logits alone
    said = loss_bytes(num_tokens, vocab, 4096, 2)
    assert mine == pytest.approx(said, rel=0.01) if is_gpu else mine < said / 2


def test_a_cpu_makes_few_logits_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk has at most `MAX_ROWS` rows on a CPU."""
    monkeypatch.setattr(loss_module, "MAX_ROWS", 5)
    head = nn.Linear(8, 11).requires_grad_(False)
    loss = loss_module._HeadLoss(
        head, torch.arange(12), torch.zeros(12, dtype=torch.int64), LogitsTransform(), 11
    )
    with mock.patch.object(nn.functional, "linear", side_effect=nn.functional.linear) as product:
        loss(torch.randn(1, 12, 8))
    assert [len(call.args[0]) for call in product.call_args_list] == [5, 5, 2]
