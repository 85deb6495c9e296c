"""The numbers of docs/choosing.md: sweeps of rank, rate, alpha, layers, dropout and epochs.

  python -m benchmarks.choosing --model stories260K --data ../shared/data --output choosing
  python -m benchmarks.choosing --model SmolLM2.gguf --data ../shared/data --output choosing-smollm2

E2E NLG: a meaning to its sentence, the loss on the sentence alone; held out are pairs of the
challenge's own validation set. What is finished is not run again; the tables are of what there is,
and `--json` writes what they are made of: results/choosing has the page's.
"""

from __future__ import annotations

import argparse
import datetime
import gzip
import itertools
import json
import statistics
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lowrank
from benchmarks import results
from lowrank.data import tokenize
from lowrank.train import TrainConfig, sweep

HELD_OUT = 100
LAST = 20  # steps whose mean is the training loss
Example = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A grid over some of the training examples; `train` and `lora` are what it is tried with."""

    name: str
    grid: dict[str, list]
    examples: int = 4000
    train: dict[str, Any] = field(default_factory=dict)
    lora: dict[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> str:
        return self.name.replace(", ", "-").replace(" ", "-")


def cases(steps: int, rate: float, few: int) -> list[Case]:
    """What is tried, at `steps` steps and a learning rate of `rate` unless that is the question.

    few: examples of the smallest data set, of which those of the others are multiples.
    """
    train = {"max_steps": steps, "learning_rate": rate}
    lora = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}

    def case(name: str, grid: dict[str, list], examples: int = 4000, **other: Any) -> Case:
        return Case(name, grid, examples, {**train, **other}, lora)

    rates = [rate * factor for factor in (0.1, 0.3, 1.0, 3.0, 10.0)]
    found = [
        case("rank", {"r": [4, 8, 16, 32, 64]}),
        case("learning_rate", {"learning_rate": rates}),
        case("modules", {"target_modules": ["minimal", "attention", "all-linear"]}),
        case("alpha", {"lora_alpha": [8.0, 16.0, 32.0, 64.0, 128.0]}),
    ]
    for examples in (few, 8 * few, 64 * few):
        dropout = {"lora_dropout": [0.0, 0.05, 0.1, 0.2]}
        found.append(case(f"dropout, {examples} examples", dropout, examples))
    for examples in (few, 4 * few):
        epochs = {"num_train_epochs": [1.0, 2.0, 4.0, 8.0]}
        found.append(case(f"epochs, {examples} examples", epochs, examples, max_steps=-1))
    return found


class Words:
    """llama2.c's tokenizer: a file of scores and pieces; pairs merge by the highest score."""

    bos_token_id, eos_token_id, pad_token_id = 1, 2, 0

    def __init__(self, path: Path) -> None:
        raw, at = path.read_bytes(), 4
        self.pieces: dict[bytes, int] = {}
        self.scores: list[float] = []
        while at < len(raw):
            score, length = struct.unpack_from("<fi", raw, at)
            self.pieces.setdefault(raw[at + 8 : at + 8 + length], len(self.scores))
            self.scores.append(score)
            at += 8 + length

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        parts = [c.encode() for c in text]
        while True:
            pairs = [
                (self.scores[self.pieces[a + b]], -i)
                for i, (a, b) in enumerate(zip(parts, parts[1:], strict=False))
                if a + b in self.pieces
            ]
            if not pairs:
                break
            i = -max(pairs)[1]
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        # a byte that is no piece is token 3 + byte
        ids = [[self.pieces[p]] if p in self.pieces else [3 + b for b in p] for p in parts]
        return [self.bos_token_id] * add_special_tokens + [i for part in ids for i in part]


def pairs(data: Path) -> tuple[list[Example], list[Example]]:
    """Training and held-out pairs; the latter evenly spaced."""
    with gzip.open(data / "e2e_train.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    train = [(row["mr"], row["ref"]) for row in rows]
    lines = (data / "e2e_valid.txt").read_text(encoding="utf-8").splitlines()
    held_out = [tuple(line.split("||")[:2]) for line in lines[:: len(lines) // HELD_OUT]]
    return tuple(
        [{"prompt": f"{mr.strip()}\n", "completion": ref.strip()} for mr, ref in part]
        for part in (train, held_out[:HELD_OUT])
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--only", nargs="+", help="cases whose names begin with one of these")
    parser.add_argument("--quantizer")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--few", type=int, default=64)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--json", metavar="FILE", help="write every trial's losses")
    args = parser.parse_args()
    wanted = [
        case
        for case in cases(args.steps, args.rate, args.few)
        if args.only is None or case.name.startswith(tuple(args.only))
    ]
    own = args.model / "tok512.bin"
    tokenizer = Words(own) if own.is_file() else lowrank.load_tokenizer(args.model)
    most = max(case.examples for case in wanted)
    train, held_out = pairs(args.data)
    train = train[:: len(train) // most][:most]
    train, held_out = (
        [tokenize(pair, tokenizer, 512) for pair in part] for part in (train, held_out)
    )
    for seed, case in itertools.product(args.seeds, wanted):
        folder = args.output / case.folder / str(seed)
        if (folder / "sweep.json").exists():
            continue
        step = len(train) // case.examples
        config = TrainConfig(
            folder, overwrite_output_dir=True, seed=seed, lr_scheduler_type="linear",
            per_device_train_batch_size=args.batch, per_device_eval_batch_size=10, **case.train,
        )  # fmt: skip
        model = lowrank.load_model(args.model, quantizer=args.quantizer)
        examples = train[seed % step :: step][: case.examples]
        lora = lowrank.LoRAConfig(**case.lora)
        sweep(model, lora, config, examples, held_out, grid=case.grid, refine=False, longer=1)
    done = {case.name: trials(args.output, case) for case in wanted}
    for name, rows in done.items():
        print("\n".join(table(name, rows)), flush=True)
    if args.json:
        written = ("quantizer", "steps", "batch", "rate", "few", "seeds")
        run = {"date": datetime.date.today().isoformat(), "model": args.model.name}
        run |= {name: getattr(args, name) for name in written}
        made = sorted(args.output.glob("*/*/sweep.json"))
        versions = json.loads(made[0].read_text())["versions"] if made else {}
        rows = [{"case": name, **row} for name, rows in done.items() for row in rows]
        results.write({"versions": versions, "run": run, "rows": rows}, args.json, "choosing")


def trials(output: Path, case: Case) -> list[dict[str, Any]]:
    """What each setting of each seed's sweep came to; a loss is None where it failed."""
    rows = []
    for path in sorted((output / case.folder).glob("*/sweep.json")):
        for trial in json.loads(path.read_text())["trials"]:
            done = trial["eval_loss"] is not None
            rows.append(
                {
                    "seed": int(path.parent.name),
                    "settings": {name: trial["settings"][name] for name in case.grid},
                    "parameters": trial["parameters"],
                    "before": trial["eval_losses"][0][1] if done else None,
                    "train_loss": statistics.mean(trial["losses"][-LAST:]) if done else None,
                    "eval_loss": trial["eval_loss"],
                    "failure": trial["failure"],
                }
            )
    return rows


def table(name: str, rows: list[dict[str, Any]]) -> Iterator[str]:
    """A line for each setting: its losses at the end, mean and range over the seeds."""
    settings: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        settings.setdefault(", ".join(map(str, row["settings"].values())), []).append(row)
    yield f"\n{name}: {len({row['seed'] for row in rows})} seeds"
    yield "| setting | training loss | held-out loss | range |"
    yield "|---|---:|---:|---:|"
    for setting, seeds in settings.items():
        done = [row for row in seeds if row["eval_loss"] is not None]
        if not done:
            yield f"| {setting} | – | – | {seeds[0]['failure']} |"
            continue
        losses = [row["eval_loss"] for row in done]
        train = statistics.mean(row["train_loss"] for row in done)
        spread = f"{min(losses):.4f} to {max(losses):.4f}"
        yield f"| {setting} | {train:.4f} | {statistics.mean(losses):.4f} | {spread} |"


if __name__ == "__main__":
    main()
