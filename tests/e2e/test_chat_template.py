"""A run with a chat template of its own choice, from the file to the answer."""

from pathlib import Path

from transformers import AutoTokenizer

from qlora_dist.data.chat_template import end_of_turn_id
from qlora_dist.generation import chat_ids, prompt_ids
from qlora_dist.run.adapter_folder import read_adapter_record
from tests.support.command import run_forked, write_config


def test_the_chosen_template_goes_with_the_adapter(
    tmp_path: Path, tiny_llama: Path, chat_file: Path
) -> None:
    """The template of the run is the template of the adapter's tokenizer, and formats prompts."""
    template = "{% for m in messages %}{{ m.role + '>' + m.content + '<|endoftext|>' }}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ 'assistant>' }}{% endif %}"
    (tmp_path / "own.jinja").write_text(template)
    settings = {
        "output_dir": str(tmp_path / "out"),
        "model": {"path": str(tiny_llama)},
        "data": {"train": str(chat_file), "chat_template": str(tmp_path / "own.jinja")},
        "optim": {"max_steps": 1},
        "logging": {"tensorboard": False},
    }
    done = run_forked("train", write_config(tmp_path / "config.yaml", **settings))
    assert done.returncode == 0, done.stderr
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "adapter")
    assert tokenizer.chat_template == template
    prompt = chat_ids([{"role": "user", "content": "fox"}], tokenizer)[0]
    assert tokenizer.decode(prompt) == "user>fox<|endoftext|>assistant>"
    assert (
        end_of_turn_id(tokenizer)
        == tokenizer.convert_tokens_to_ids("<|endoftext|>")
        != tokenizer.eos_token_id
    )
    answer = run_forked(
        "generate",
        "--adapter",
        str(tmp_path / "out" / "adapter"),
        "--prompt",
        "fox",
        "--max-new-tokens",
        "2",
    )
    assert answer.returncode == 0, answer.stderr


def test_variables_of_the_template_go_with_the_adapter(
    tmp_path: Path, tiny_llama: Path, chat_file: Path
) -> None:
    """Training, the adapter's record and prompts have the same variables.

    The log names the unused one once. Other variables make another run.
    """
    template = "{{ mood }}{% for m in messages %}{{ m.role + '>' + m.content + '<|endoftext|>' }}"
    template += "{% endfor %}{% if add_generation_prompt %}{{ 'assistant>' }}{% endif %}"
    (tmp_path / "own.jinja").write_text(template)
    variables = {"mood": "kind ", "unheard": 1}
    data = {"train": str(chat_file), "chat_template": str(tmp_path / "own.jinja")}
    settings = {
        "output_dir": str(tmp_path / "out"),
        "model": {"path": str(tiny_llama)},
        "data": {**data, "template_kwargs": variables},
        "optim": {"max_steps": 1},
        "logging": {"tensorboard": False},
    }
    config = write_config(tmp_path / "config.yaml", **settings)
    done = run_forked("train", config)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("data.template_kwargs sets unheard, which") == 1
    adapter = tmp_path / "out" / "adapter"
    record = read_adapter_record(adapter)
    assert record.template_kwargs == variables
    prompt = prompt_ids(
        "fox", AutoTokenizer.from_pretrained(adapter), record.layout, record.template_kwargs
    )
    text = AutoTokenizer.from_pretrained(adapter).decode(prompt[0])
    assert text == "kind user>fox<|endoftext|>assistant>"
    other = run_forked("train", config, "--data.template_kwargs", "{mood: rude}")
    assert other.returncode != 0
    assert "holds a different run (data.template_kwargs: " in other.stderr
