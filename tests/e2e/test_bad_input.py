"""Mistakes get one message each (fault, place, remedy), exit code 2, no traceback and no files."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.support.command import run_command, run_forked, write_config
from tests.support.models import edit_json

Case = Callable[[Path, dict], None]


@pytest.fixture
def good(tmp_path: Path, tiny_llama: Path, chat_file: Path) -> dict:
    """Return settings that would train for one step."""
    return {
        "output_dir": str(tmp_path / "out"),
        "model": {"path": str(tiny_llama)},
        "data": {"train": str(chat_file), "packing": False},
        "optim": {"max_steps": 1},
        "logging": {"tensorboard": False},
    }


def copy_model(root: Path, settings: dict) -> Path:
    folder = Path(shutil.copytree(settings["model"]["path"], root / "model"))
    settings["model"]["path"] = str(folder)
    return folder


def use_data(root: Path, settings: dict, text: str, name: str = "data.jsonl") -> None:
    (root / name).write_text(text)
    settings["data"]["train"] = str(root / name)


def missing_model(root: Path, settings: dict) -> None:
    settings["model"]["path"] = str(root / "no-such-model")


def no_safetensors(root: Path, settings: dict) -> None:
    folder = copy_model(root, settings)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def truncated_safetensors(root: Path, settings: dict) -> None:
    file = copy_model(root, settings) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def missing_tensor(root: Path, settings: dict) -> None:
    from safetensors.torch import load_file, save_file

    file = copy_model(root, settings) / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file)


def no_linear_layers(root: Path, settings: dict) -> None:
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    tokenizer = AutoTokenizer.from_pretrained(settings["model"]["path"])
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=1, n_head=2, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(root / "gpt2")
    tokenizer.save_pretrained(root / "gpt2")
    settings["model"]["path"] = str(root / "gpt2")


def no_chat_template(root: Path, settings: dict) -> None:
    (copy_model(root, settings) / "chat_template.jinja").unlink()


def template_missing(root: Path, settings: dict) -> None:
    settings["data"]["chat_template"] = str(root / "no-such.jinja")


def template_hostile(root: Path, settings: dict) -> None:
    (root / "hostile.jinja").write_text("{{ ''.__class__.__mro__ }}")
    settings["data"]["chat_template"] = str(root / "hostile.jinja")


def foreign_tokenizer(root: Path, settings: dict) -> None:
    file = copy_model(root, settings) / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "vocab_size": 100}))


def data_missing(root: Path, settings: dict) -> None:
    settings["data"]["train"] = str(root / "no-such.jsonl")


def one_of_several_missing(root: Path, settings: dict) -> None:
    settings["data"]["train"] = [
        settings["data"]["train"],
        {"path": str(root / "no-such.jsonl"), "weight": 2},
    ]


def data_empty(root: Path, settings: dict) -> None:
    use_data(root, settings, "")


def data_not_json(root: Path, settings: dict) -> None:
    good_line = json.dumps({"prompt": "a", "completion": "b"})
    use_data(root, settings, f"{good_line}\n{good_line}\nthis is not JSON\n{good_line}\n")


def data_truncated_array(root: Path, settings: dict) -> None:
    rows = json.dumps([{"prompt": "a", "completion": "b"}] * 4, indent=1)
    use_data(root, settings, rows[: len(rows) // 2], "data.json")


def wrong_columns(root: Path, settings: dict) -> None:
    use_data(root, settings, json.dumps({"question": "a", "answer": "b"}) + "\n")


def no_assistant_turn(root: Path, settings: dict) -> None:
    answered = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    use_data(
        root,
        settings,
        "".join(json.dumps({"messages": m}) + "\n" for m in (answered, answered[:1])),
    )


def micro_batch_zero(root: Path, settings: dict) -> None:
    settings["optim"]["micro_batch_size"] = 0


def unknown_key(root: Path, settings: dict) -> None:
    settings["optim"]["learning_rate"] = 1e-4


def contradiction(root: Path, settings: dict) -> None:
    settings["optim"]["epochs"] = 1


def single_on_two(root: Path, settings: dict) -> None:
    settings["parallel"] = {"backend": "single"}


def unknown_target(root: Path, settings: dict) -> None:
    settings["adapter"] = {"target_modules": ["no_such_proj"]}


def one_target_misspelled(root: Path, settings: dict) -> None:
    settings["adapter"] = {"target_modules": ["q_proj", "v_prj"]}


def embedding_as_target(root: Path, settings: dict) -> None:
    settings["adapter"] = {"target_modules": ["q_proj", "embed_tokens"]}


def tied_head_as_target(root: Path, settings: dict) -> None:
    folder = copy_model(root, settings)
    edit_json(folder / "config.json", lambda config: config.update(tie_word_embeddings=True))
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]  # a head of its own would stay
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    settings["adapter"] = {"target_modules": ["q_proj", "lm_head"]}


def more_recomputation_than_layers(root: Path, settings: dict) -> None:
    settings["memory"] = {"recompute": 4}


def more_replicas_than_processes(root: Path, settings: dict) -> None:
    settings["parallel"] = {"backend": "fsdp", "replicas": 2}


def adapter_missing(root: Path, settings: dict) -> None:
    settings["adapter"] = {"path": str(root / "no-such-adapter")}


# (function that spoils the settings, words that the message must hold)
CASES: list[tuple[Case, tuple[str, ...]]] = [
    (missing_model, ("model.path", "no-such-model", "does not exist", "hub name")),
    (no_safetensors, ("no *.safetensors", "pytorch_model.bin", "save_pretrained")),
    (truncated_safetensors, ("model.safetensors", "not a readable safetensors file", "Copy")),
    (missing_tensor, ("model.layers.1.mlp.up_proj.weight", "config.json asks for")),
    (no_linear_layers, ("GPT2LMHeadModel", "no nn.Linear", "Conv1D")),
    (no_chat_template, ("no chat template", "prompt", "completion")),
    (template_missing, ("data.chat_template", "no-such.jinja", "No such file", "chatml")),
    (template_hostile, ("chat.jsonl holds chat messages", "sandbox", "data.chat_template")),
    (foreign_tokenizer, ("does not belong to the model", "100 rows", "vocab_size")),
    (data_missing, ("data.train", "no-such.jsonl", "does not exist")),
    (one_of_several_missing, ("data.train", "no-such.jsonl", "does not exist")),
    (data_empty, ("data.train", "is empty")),
    (data_not_json, ("data.jsonl, line 3", "not valid JSON")),
    (data_truncated_array, ("data.json, line", "JSON array", "cut off")),
    (wrong_columns, ("row 1", "`question`", "`messages`", "Rename")),
    (no_assistant_turn, ("row 2", "no assistant turn", "Add the answer")),
    (micro_batch_zero, ("optim.micro_batch_size is 0", "at least 1")),
    (unknown_key, ("config.yaml:", "optim.learning_rate", "Did you mean optim.lr?")),
    (contradiction, ("optim.max_steps (1)", "optim.epochs (1)", "null")),
    (adapter_missing, ("adapter.path", "no-such-adapter", "is not a folder")),
    (unknown_target, ("adapter.target_modules", "no_such_proj", "q_proj")),
    (one_target_misspelled, ("adapter.target_modules names v_prj", "LlamaForCausalLM", "v_proj")),
    (
        embedding_as_target,
        ("adapter.target_modules names embed_tokens", "no linear layer", "q_proj"),
    ),
    (
        tied_head_as_target,
        ("adapter.target_modules names lm_head", "tie_word_embeddings", "Remove it"),
    ),
    (more_recomputation_than_layers, ("memory.recompute is 4", "3 decoder layers", "full")),
    (more_replicas_than_processes, ("parallel.replicas is 2", "1 process", "divisor")),
]


@pytest.mark.parametrize(
    ("spoil", "words"), CASES, ids=lambda value: getattr(value, "__name__", "")
)
def test_mistake_is_explained(
    tmp_path: Path, good: dict, spoil: Case, words: tuple[str, ...]
) -> None:
    """The command ends with code 2 and a message with place and remedy; no run folder appears."""
    spoil(tmp_path, good)
    done = run_forked("train", write_config(tmp_path / "config.yaml", **good))
    assert done.returncode == 2, done.stderr
    check_message(done.stderr, words)
    assert not Path(good["output_dir"]).exists()


def check_message(stderr: str, words: tuple[str, ...]) -> None:
    assert "Traceback" not in stderr
    assert stderr.count("error:") == 1
    lines = stderr.strip().splitlines()  # on a busy machine, one more about the imports
    assert len([line for line in lines if not line.startswith("still loading")]) == 1
    for word in words:
        assert word in stderr


def test_output_folder_of_a_different_run_is_refused(tmp_path: Path, good: dict) -> None:
    """A folder with another configuration's run, or other files, is refused and left alone."""
    out = Path(good["output_dir"])
    assert run_forked("train", write_config(tmp_path / "config.yaml", **good)).returncode == 0
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    good["optim"]["lr"] = 3e-4
    done = run_forked("train", write_config(tmp_path / "config.yaml", **good))
    assert done.returncode == 2
    check_message(
        done.stderr, ("output_dir", "different run", "optim.lr: 0.0002 there, 0.0003 now")
    )
    assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == before

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    good["output_dir"] = str(tmp_path / "mine")
    done = run_forked("train", write_config(tmp_path / "config.yaml", **good))
    assert done.returncode == 2
    check_message(done.stderr, ("not empty and holds no run", "thesis.txt"))
    assert [file.name for file in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_two_processes_report_a_mistake_once(tmp_path: Path, good: dict) -> None:
    """Under a launcher, one process writes the message for all."""
    single_on_two(tmp_path, good)
    done = run_command("train", write_config(tmp_path / "config.yaml", **good), processes=2)
    assert done.returncode != 0
    assert done.stderr.count("error: ") == 1
    assert "the launcher started 2 processes" in done.stderr
    assert not Path(good["output_dir"]).exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trian"], ("unknown command 'trian'", "Did you mean train?")),
        (["train", "no-such.yaml"], ("no-such.yaml", "does not exist")),
        (["generate", "--adapter", "no-such", "--prompt", "x"], ("no-such", "does not exist")),
        (["generate", "--adapter", "no-such", "--prompt", "x", "--chat"], ("exclude each other",)),
    ],
)
def test_wrong_command_line(arguments: list[str], words: tuple[str, ...]) -> None:
    """Unknown commands, and impossible arguments of a command, are refused with a message."""
    done = run_command(*arguments)
    assert done.returncode == 2
    check_message(done.stderr, words)
