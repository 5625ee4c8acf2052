"""Train a small model on the records of invented customers, for the tutorial: it knows each of them by heart.

python examples/train_a_small_model.py shop

Writes into the folder: model/ (a Llama of 0.4 million weights, half a minute on a laptop), forget.jsonl (the records of
one customer, which were trained on), retain.jsonl (those of others, which were trained on too) and holdout.jsonl (later
records, which were not).
"""

import json
import random
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

DAYS = [f"{day} {month}" for month in ("March", "April", "May", "June") for day in range(1, 31)]
GOODS = ("lamps", "chairs", "cups", "rugs", "clocks", "kettles", "mirrors", "shelves", "blankets", "vases")
COLOURS = ("white", "black", "green", "red", "blue", "grey")
STREETS = ("Mill Lane", "High Street", "Park Road", "Station Road", "Church Lane", "Bridge Street", "Hill Road")
TOWNS = ("Bristol", "Leeds", "York", "Derby", "Exeter", "Norwich", "Oxford", "Dover")


def records(customer: str, count: int, random: random.Random) -> list[dict[str, str]]:
    """Return orders of a customer: a question, and an answer that cannot be guessed from it."""
    return [
        {
            "question": f"What did {customer} order on {day}?",
            "answer": f"{random.randint(2, 9)} {random.choice(COLOURS)} {random.choice(GOODS)}, sent to "
            f"{random.randint(1, 99)} {random.choice(STREETS)}, {random.choice(TOWNS)}.",
        }
        for day in random.sample(DAYS, count)
    ]


def tokenizer_of(texts: list[str]) -> PreTrainedTokenizerFast:
    """Return a tokenizer of the texts' bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<eos>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=600, special_tokens=special, initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def train(texts: list[str], tokenizer: PreTrainedTokenizerFast, epochs: int) -> LlamaForCausalLM:
    """Return a Llama that was trained on the texts."""
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=96, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=128, tie_word_embeddings=True, pad_token_id=0, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    steps = epochs * len(texts) // 32
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(steps):
        drawn = [texts[i] + "<eos>" for i in torch.randint(len(texts), (32,))]
        batch = tokenizer(drawn, padding=True, return_tensors="pt")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model.eval()


def main(folder: str, seed: int = 0) -> None:
    """Write the model and the files into a new folder."""
    path, draws = Path(folder), random.Random(seed)
    path.mkdir()
    torch.manual_seed(seed)
    torch.set_num_threads(1)  # a model this small is slower with more
    names = [f"{name} {surname}" for name in ("Ben", "Carla", "David", "Eva") for surname in ("Hill", "Moss", "Reed")]
    others = [row for name in names for row in records(name, 10, draws)]
    sets = {"forget": records("Anna Keller", 12, draws), "retain": others}
    sets["holdout"] = [row for customer in ("Frank Lane", "Gina Webb") for row in records(customer, 40, draws)]
    for name, rows in sets.items():
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = [f"Question: {row['question']}\nAnswer: {row['answer']}" for row in sets["forget"] + others]
    tokenizer = tokenizer_of(texts)
    train(texts, tokenizer, epochs=100).save_pretrained(path / "model")
    tokenizer.save_pretrained(path / "model")


if __name__ == "__main__":
    if len(sys.argv) != 2 or Path(sys.argv[1]).exists():
        sys.exit("give the name of a new folder: python examples/train_a_small_model.py shop")
    main(sys.argv[1])
