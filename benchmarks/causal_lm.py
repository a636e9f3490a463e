"""Federated LoRA of small random language models on real text, and the perplexity of what it exports; prints JSON.

Each sentence as it is (`plain`), and as a pair of an instruction and its response (`instruction`). Exported adapters
and exported models are read by PyTorch and PEFT, to which the held-out texts are given anew.
"""

import argparse
import json
import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import common
import peft
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers.utils import logging

from fedjax_lora.app import cli
from fedjax_lora.io.run_files import read_metrics

FAMILIES = ("gpt2", "llama")
FORMS = ("plain", "instruction")
EXPORTS = {"peft": peft.AutoPeftModelForCausalLM, "merged": transformers.AutoModelForCausalLM}
QUESTION = "Is this review positive or negative?"
WORDS = ("negative", "positive")
HEADS, VOCABULARY, LENGTH, EVAL_BATCH = 4, 2000, 128, 64
DEVIATION = 0.1
"""Of the random weights: a table of words that is frozen at 0.02 leaves the logits little room."""

HELD_OUT = 10
"""Every so many-th sentence is held out."""

TOLERANCE = 1e-4
START, END = "<s>", "</s>"


class Example(NamedTuple):
    """A sentence and its label, 0 or 1."""

    sentence: str
    label: int

    @property
    def instruction(self) -> dict[str, str]:
        """What is asked and what is to be answered, as a line of the data holds it."""
        return {"prompt": f"{QUESTION} {self.sentence}", "response": WORDS[self.label], "label": WORDS[self.label]}

    def parts(self, form: str) -> tuple[str, str]:
        """The text that is given and the one that continues it."""
        if form == "plain":
            return "", self.sentence
        told = self.instruction
        return f"### Instruction:\n{told['prompt']}\n\n### Response:\n", told["response"]


def read(path: Path) -> tuple[list[Example], list[Example]]:
    """The sentences to train on, and those that are held out, of `sentence<TAB>label` lines."""
    lines = [line.rsplit("\t", 1) for line in path.read_text(encoding="utf-8").splitlines()]
    examples = [Example(sentence.strip(), int(label)) for sentence, label in lines]
    held_out = examples[::HELD_OUT]
    return [example for place, example in enumerate(examples) if place % HELD_OUT], held_out


def save_model(family: str, folder: Path, sentences: Sequence[str], layers: int, width: int) -> None:
    """A model of random weights, with a tokenizer of bytes and of pairs that are frequent in the sentences.

    That of GPT-2 begins a text with no special token and has none for padding, as is its own; that of Llama has both.
    """
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = [END, *([START] if family == "llama" else [])]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        sentences, trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet)
    )
    named: dict[str, Any] = {"eos_token": END}
    if family == "llama":
        core.post_processor = processors.TemplateProcessing(single=f"{START} $A", special_tokens=[(START, 1)])
        named |= {"bos_token": START, "pad_token": END}
    transformers.PreTrainedTokenizerFast(tokenizer_object=core, **named).save_pretrained(folder)
    ids = {"eos_token_id": 0, "bos_token_id": int(family == "llama"), "vocab_size": core.get_vocab_size()}
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(shape(family, layers, width, ids)).save_pretrained(folder)


def shape(family: str, layers: int, width: int, ids: dict[str, Any]) -> Any:
    """The configuration of a model; Llama's heads of keys and values are half as many as those of queries."""
    if family == "gpt2":
        return transformers.GPT2Config(
            n_layer=layers, n_embd=width, n_head=HEADS, n_positions=2 * LENGTH, initializer_range=DEVIATION, **ids
        )
    return transformers.LlamaConfig(
        num_hidden_layers=layers, hidden_size=width, intermediate_size=2 * width + 64, num_attention_heads=HEADS,
        num_key_value_heads=HEADS // 2, max_position_embeddings=2 * LENGTH, initializer_range=DEVIATION, **ids,
    )  # fmt: skip


def write_data(form: str, folder: Path, parts: dict[str, list[Example]]) -> list[str]:
    """Files of the parts, and the overrides that name them."""
    suffix = "tsv" if form == "plain" else "jsonl"
    for part, examples in parts.items():
        if form == "plain":
            lines = [f"{example.sentence}\t{example.label}" for example in examples]
        else:
            lines = [json.dumps(example.instruction) for example in examples]
        (folder / f"{part}.{suffix}").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return [f"data.source={suffix}", *(f"data.{part}={folder / part}.{suffix}" for part in parts)]


def command(*words: Any) -> None:
    """A command of the command line."""
    if code := cli.main([*map(str, words)]):
        raise RuntimeError(f"fedjax-lora {words[0]} must end with 0, got {code}")


def encoded(tokenizer: Any, form: str, examples: Sequence[Example]) -> Iterator[tuple[list[int], list[int]]]:
    """Tokens of each example, and the same where they count, else -100."""
    for given, continued in (example.parts(form) for example in examples):
        first = tokenizer(given)["input_ids"] if given else []
        rest = tokenizer(continued, add_special_tokens=not given)["input_ids"]
        ids = [*first, *rest, tokenizer.eos_token_id][:LENGTH]
        yield ids, ([-100] * len(first) + ids[len(first) :])[:LENGTH]


def perplexity(model: Any, tokenizer: Any, form: str, examples: Sequence[Example]) -> tuple[float, int]:
    """Of a model of PyTorch over all tokens that count, and how many they are."""
    total, number = 0.0, 0
    rows = list(encoded(tokenizer, form, examples))
    for start in range(0, len(rows), EVAL_BATCH):
        batch = rows[start : start + EVAL_BATCH]
        longest = max(len(ids) for ids, _ in batch)
        ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in batch])
        mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in batch])
        labels = torch.tensor([labels + [-100] * (longest - len(labels)) for _, labels in batch])[:, 1:]
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        total, number = total + losses.item(), number + int((labels >= 0).sum())
    return math.exp(total / number), number


def measure(family: str, form: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One run, its exports, and what PyTorch makes of them."""
    train, held_out = read(options.text)
    base = folder / "model"
    save_model(family, base, [example.sentence for example in train], options.layers, options.width)
    settings = [
        *write_data(form, folder, {"train": train, "test": held_out}),
        f"data.max_length={LENGTH}",
        f"model.pretrained={base}",
        "task=causal_lm",
        f"rounds={options.rounds}",
        f"clients.count={options.clients}",
        f"local={{steps: {options.steps}, batch_size: {options.batch}, optimizer: {{learning_rate: 5e-3}}}}",
        "lora.targets=[all-linear]",
        "control.keep_ratio=0.5",
        f"engine={{eval_every: {options.eval_every}, eval_batch_size: {EVAL_BATCH}}}",
    ]
    started = time.perf_counter()
    command("run", "--quiet", "--out", folder / "run", "--set", *settings)
    seconds = time.perf_counter() - started
    log, found = read_metrics(folder / "run"), {}
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    tokens = 0
    for name, auto in EXPORTS.items():
        command("export", folder / "run", folder / name, "--format", name, "--quiet")
        found[name], tokens = perplexity(auto.from_pretrained(folder / name).eval(), tokenizer, form, held_out)
    run, evaluated = log[-1]["task/perplexity"], [line for line in log if line["eval_loss"] is not None]
    return {
        "settings": [setting for setting in settings if str(folder) not in setting],
        "train_loss": [line["train_loss"] for line in log],
        "perplexity_by_round": {line["round"]: line["task/perplexity"] for line in evaluated},
        "held_out_tokens": tokens,
        "perplexity": {"run": run, **found},
        "relative_difference": {name: abs(value - run) / run for name, value in found.items()},
        "uplink_bits": sum(line["uplink_bits"] for line in log),
        "run_s": seconds,
    }


def check(runs: dict[str, Any]) -> dict[str, Any]:
    """Whether all losses have fallen and PyTorch says the same."""
    largest = max(value for run in runs.values() for value in run["relative_difference"].values())
    fell = all(run["train_loss"][-1] < run["train_loss"][0] for run in runs.values())
    return {
        "largest_relative_difference": largest,
        "tolerance": TOLERANCE,
        "agrees": largest <= TOLERANCE,
        "loss_fell": fell,
    }


def main() -> None:
    """Run each family on each form of the text."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", metavar="FILE", type=Path, required=True, help="sentences, sentence<TAB>label a line")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=FAMILIES)
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=FORMS)
    sizes = {"clients": 20, "rounds": 20, "steps": 2, "batch": 8, "layers": 4, "width": 128, "eval_every": 10}
    for name, size in sizes.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=size, help=f"({size})")
    parser.add_argument("--out", metavar="FILE", type=Path, help="write the JSON there too")
    options = parser.parse_args()
    environment = common.environment()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    runs = {}
    for family in options.families:
        for form in options.forms:
            common.note(f"{family}, {form}")
            with tempfile.TemporaryDirectory() as folder:
                runs[f"{family} {form}"] = measure(family, form, options, Path(folder))
    chosen = {name: getattr(options, name) for name in sizes}
    common.emit({"environment": environment, "sizes": chosen, "check": check(runs), "runs": runs}, options.out)


if __name__ == "__main__":
    main()
