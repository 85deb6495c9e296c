"""A real result: SmolLM2-135M on E2E NLG, fully fine-tuned, with LoRA, QLoRA and DoRA.

`python -m benchmarks.e2e` takes equal steps with each, from three seeds, and writes the loss and
BLEU on held-out data, memory and tokens a second into a page. Each run is a process and, when it
is done, a file; one that is there already is not run again, so that what was interrupted goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from benchmarks import machine, peers
from benchmarks.e2e_run import METHODS, Run
from benchmarks.errors import MissingInputError
from benchmarks.plot import COLOURS, load_pyplot

ROOT = Path(__file__).parent.parent
NAMES = {"full": "full fine-tuning", "lora": "LoRA", "qlora": "QLoRA, NF4", "dora": "DoRA"}
PAGE = """\
# A real result: E2E NLG

SmolLM2-135M-Instruct (from GGUF: its weights have gone through Q4_1) learns to write a sentence
about a restaurant from a list of facts. Each method takes {steps} steps of {batch} pairs in
float32 from {seeds} seeds, which choose the pairs, their order and the adapters' first values.
Adapters are r=16, alpha 32, on every linear layer; a cosine schedule falls from 2e-4, for full
fine-tuning from 5e-5. Held out are {held_out} pairs for the loss (mean per token of the
sentence), and {meanings} meanings for BLEU (sacrebleu over all sentences that people wrote for
one; the data set's own tokens), written greedily. Memory is the peak of training above that of a
process with `import torch` done. Mean over seeds ± standard deviation.{apart}

{table}

Before training the held-out loss is {before}.

{noise}

![loss and BLEU]({picture})

`python -m benchmarks.e2e --page docs/e2e.md` makes this page; what is done already is not run
again. {machine}
"""
APART = """
Tokens a second are those of short runs with nothing beside them (`--steps {steps} --seeds 0
--output FOLDER`, then `--speeds FOLDER`)."""


def main(argv: list[str] | None = None) -> int:
    given = parser().parse_args(argv)
    try:
        alone = None if given.speeds is None else _alone(given.speeds, given.methods)
        gguf, data = _inputs()
    except MissingInputError as error:
        print(f"python -m benchmarks.e2e: {error}", file=sys.stderr)
        return 2
    numbers = {name: getattr(given, name) for name in ("steps", "batch", "meanings", "held_out")}
    # a seed of every method first: a table of all of them comes early
    runs = [
        Run(method, seed, **numbers, gguf=gguf, data=data)
        for seed in given.seeds
        for method in given.methods
    ]
    given.output.mkdir(parents=True, exist_ok=True)
    done = []
    for number, run in enumerate(runs, 1):
        path = given.output / f"{run.method}-{run.seed}.json"
        found = _read(path, run)
        if found is None:
            print(f"{number}/{len(runs)}: {run.method}, seed {run.seed} ...", flush=True)
            found = _run(run)
            partial = path.with_suffix(".part")
            partial.write_text(json.dumps(found, indent=1))
            os.replace(partial, path)
        print(
            f"{number}/{len(runs)}: {run.method}, seed {run.seed}: held-out loss "
            f"{found['loss_after']:.4f}, BLEU {found['bleu']:.1f}, "
            f"{found['tokens_per_second']:.0f} tokens/s, {found['peak_bytes'] / 1e6:.0f} MB",
            flush=True,
        )
        done.append(found)
    alone = alone or done
    print("\n" + table(done, alone))
    if given.page is not None:
        picture = given.page.with_suffix(".png")
        given.page.write_text(page(done, alone, picture.name), encoding="utf-8")
        draw(done, picture)
    return 0


def parser() -> argparse.ArgumentParser:
    """The options; what they mean is in their help."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.e2e", description=__doc__)
    made.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    made.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    made.add_argument("--steps", type=int, default=150, help="of each run (%(default)s)")
    made.add_argument("--batch", type=int, default=8, help="pairs in a step (%(default)s)")
    made.add_argument(
        "--meanings", type=int, default=100, help="written out for BLEU (%(default)s)"
    )
    made.add_argument("--held-out", type=int, default=256, help="pairs for the loss (%(default)s)")
    made.add_argument(
        "--output",
        type=Path,
        default=ROOT / "benchmarks" / "results" / "e2e",
        help="folder of a JSON file for each run (%(default)s)",
    )
    made.add_argument(
        "--speeds",
        type=Path,
        default=None,
        metavar="FOLDER",
        help="take tokens/s from the runs there, which had the machine for themselves",
    )
    made.add_argument("--page", type=Path, default=None, help="write the page there: docs/e2e.md")
    return made


def table(done: list[dict], alone: list[dict]) -> str:
    """A row for each method, as Markdown; tokens/s are those of the runs that were `alone`."""
    speeds = _by_method(alone)
    lines = [
        "| | trained | held-out loss | BLEU | peak MB | tokens/s |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for method, runs in _by_method(done).items():
        cells = [
            NAMES[method],
            f"{runs[0]['trainable'] / 1e6:.1f} M",
            _spread([run["loss_after"] for run in runs], 4),
            _spread([run["bleu"] for run in runs], 1),
            f"{statistics.mean(run['peak_bytes'] for run in runs) / 1e6:.0f}",
            f"{statistics.median(run['tokens_per_second'] for run in speeds[method]):.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def page(done: list[dict], alone: list[dict], picture: str) -> str:
    """docs/e2e.md, with the file of `draw` beside it."""
    first = done[0]
    here = machine.describe()
    before = {NAMES[m]: runs[0]["loss_before"] for m, runs in _by_method(done).items()}
    versions = ", ".join(f"{name} {version}" for name, version in here["versions"].items())
    return PAGE.format(
        **{name: first[name] for name in ("steps", "batch", "held_out", "meanings")},
        seeds=len({run["seed"] for run in done}),
        apart="" if alone is done else APART.format(steps=alone[0]["steps"]),
        table=table(done, alone),
        before=", ".join(f"{loss:.4f} ({name})" for name, loss in before.items()),
        noise=noise(done),
        picture=picture,
        machine=f"Run on {here['cpu']}, {here['threads']} threads, {versions}.",
    )


def noise(done: list[dict]) -> str:
    """Whether QLoRA differs from LoRA by more than the seeds do, and from where it began."""
    methods = _by_method(done)
    if not {"lora", "qlora"} <= set(methods):
        return ""
    parts = []
    for name, key, digits in (("held-out loss", "loss_after", 4), ("BLEU", "bleu", 1)):
        lora, qlora = ({run["seed"]: run[key] for run in methods[m]} for m in ("lora", "qlora"))
        gaps = [qlora[seed] - lora[seed] for seed in lora if seed in qlora]
        spread = statistics.stdev(lora.values()) if len(lora) > 1 else 0.0
        parts.append(
            f"{name} by {statistics.mean(gaps):+.{digits}f} (LoRA's seeds: ± {spread:.{digits}f})"
        )
    before, after = (
        statistics.mean(run[key] for run in methods["qlora"])
        - statistics.mean(run[key] for run in methods["lora"])
        for key in ("loss_before", "loss_after")
    )
    return (
        f"With the same seeds QLoRA differs from LoRA in {' and in '.join(parts)}. Rounding the "
        f"weights to 4 bits changes the loss by {before:+.4f} before training, and training leaves "
        f"{after:+.4f} of that."
    )


def draw(done: list[dict], path: Path) -> None:
    """Loss over steps, and each run's held-out loss against its BLEU."""
    pyplot = load_pyplot("--page")
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4))
    for colour, (method, runs) in zip(COLOURS, _by_method(done).items(), strict=False):
        steps = zip(*(run["losses"] for run in runs), strict=True)
        means = [statistics.mean(values) for values in steps]
        smooth = [statistics.mean(means[max(0, i - 9) : i + 1]) for i in range(len(means))]
        left.plot(range(1, len(smooth) + 1), smooth, color=colour, label=NAMES[method])
        points = [(run["loss_after"], run["bleu"]) for run in runs]
        right.plot(*zip(*points, strict=True), "o", color=colour, label=NAMES[method])
    left.set(xlabel="step", ylabel="training loss, mean of seeds and of 10 steps")
    right.set(xlabel="held-out loss", ylabel="BLEU, a marker a seed")
    left.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def _spread(values: list[float], digits: int) -> str:
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def _by_method(done: list[dict]) -> dict[str, list[dict]]:
    found: dict[str, list[dict]] = {}
    for run in done:
        found.setdefault(run["method"], []).append(run)
    return found


def _read(path: Path, run: Run) -> dict | None:
    """What an earlier run of the same settings came to."""
    if not path.exists():
        return None
    found = json.loads(path.read_text())
    same = all(found.get(name) == value for name, value in run.settings().items())
    return found if same else None


def _alone(folder: Path, methods: list[str]) -> list[dict]:
    """The runs in the folder, at least one of each method."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    if without := set(methods) - {run["method"] for run in found}:
        raise MissingInputError(f"{folder}: expected a run of each method; none of {without}")
    return found


def _run(run: Run) -> dict:
    command = [sys.executable, "-m", "benchmarks.e2e_run", json.dumps(asdict(run))]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise RuntimeError(f"e2e: {run.method}, seed {run.seed} ended with {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def _inputs() -> tuple[str, str]:
    gguf = Path(
        os.environ.get("LOWRANK_SMOLLM2", ROOT / ".cache" / "SmolLM2-135M-Instruct.Q4_1.gguf")
    )
    data = Path(os.environ.get("LOWRANK_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not gguf.is_file():
        raise MissingInputError(
            f"{gguf} is missing: `make smollm2` gets it, or set LOWRANK_SMOLLM2"
        )
    for file in ("e2e_train.jsonl.gz", "e2e_valid.txt"):
        if not (data / file).is_file():
            raise MissingInputError(f"{data / file} is missing: LOWRANK_TEST_DATA names its folder")
    if peers.missing("sacrebleu") is not None:
        raise MissingInputError(f"{peers.missing('sacrebleu')}; it measures BLEU")
    return str(gguf.resolve()), str(data.resolve())


if __name__ == "__main__":
    sys.exit(main())
