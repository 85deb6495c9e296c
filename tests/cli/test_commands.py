"""The commands on the tiny model: train, generate, merge, env, their help, and Ctrl-C."""

from __future__ import annotations

import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import lowrank
from lowrank import ops

from .conftest import write_pairs

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = (
    "train",
    "sweep",
    "generate",
    "eval",
    "merge",
    "quantize",
    "plan",
    "report",
    "env",
    "demo",
)


def python(*words: object, **options) -> subprocess.Popen:
    """`python *words`, finding this checkout from anywhere."""
    return subprocess.Popen(
        [sys.executable, *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        **options,
    )


@pytest.fixture
def trained(run, tiny, data, tmp_path):
    """The output directory of a short QLoRA run of the tiny model."""
    outcome = run(
        "train", "--model", tiny, "--data", data,
        "--eval-data", write_pairs(tmp_path / "eval.jsonl", 8),
        "--output-dir", tmp_path / "out", "--quantizer", "nf4", "--no-double-quant",
        "--r", 8, "--lora-alpha", 16, "--target-modules", "all-linear",
        "--max-steps", 12, "--learning-rate", 5e-3, "--per-device-train-batch-size", 8,
    )  # fmt: skip
    assert outcome.status == 0, outcome
    return tmp_path / "out", outcome


def test_train_writes_its_results_and_its_settings(trained, run, tiny, data, tmp_path):
    folder, outcome = trained
    assert "trainable params: " in outcome.out
    before, after = map(
        float, re.search(r"held-out loss ([\d.]+) → ([\d.]+)", outcome.out).groups()
    )
    assert after < before
    names = {path.name for path in folder.iterdir()}
    assert {
        "adapter_model.safetensors",
        "adapter_config.json",
        "metrics.jsonl",
        "run.toml",
    } <= names
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [step["loss"] for step in steps if "loss" in step]
    assert len(losses) == 12

    # what it was made with makes it again; a flag beats the file
    again = run("train", "--config", folder / "run.toml", "--output-dir", tmp_path / "again")
    assert again.status == 0, again
    steps = [
        json.loads(line) for line in (tmp_path / "again/metrics.jsonl").read_text().splitlines()
    ]
    assert [step["loss"] for step in steps if "loss" in step] == losses
    shorter = run(
        "train",
        "--config",
        folder / "run.toml",
        "--output_dir",
        tmp_path / "short",
        "--max_steps=3",
    )
    assert shorter.status == 0, shorter
    assert "over 3 steps" in shorter.out


def test_generate(trained, run, tiny, monkeypatch):
    folder, _ = trained
    prompt = "What is 3 plus 4?\n"
    words = ("generate", "--model", tiny, "--quantizer", "nf4", "--no-double-quant")
    words += ("--max-new-tokens", 8)
    adapted = run(*words, "--adapter", folder, "--prompt", prompt)
    assert adapted.status == 0, adapted
    plain = run(*words, "--prompt", prompt)
    assert adapted.out != plain.out

    model = lowrank.load_model(tiny, quantizer=lowrank.quant.get("nf4", double_quant=False))
    lowrank.load_adapter(model, folder)
    expected = lowrank.generate(model, lowrank.load_tokenizer(tiny), prompt, max_new_tokens=8)
    assert adapted.out == expected + "\n"

    monkeypatch.setattr(sys, "stdin", io.StringIO(prompt))
    assert run(*words, "--adapter", folder).out == adapted.out
    assert run(*words, "--chat", "--prompt", prompt).status == 0
    sampled = [
        run(*words, "--prompt", prompt, "--temperature", 1.5, "--seed", s).out for s in (1, 1)
    ]
    assert sampled[0] == sampled[1]


def test_merge_is_what_transformers_loads(trained, run, tiny, tmp_path):
    transformers = pytest.importorskip("transformers")
    folder, _ = trained
    outcome = run(
        "merge", "--model", tiny, "--quantizer", "nf4", "--no-double-quant",
        "--adapter", folder, "--output", tmp_path / "merged",
    )  # fmt: skip
    assert outcome.status == 0, outcome
    assert str(tmp_path / "merged") in outcome.out
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []

    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    ours = lowrank.load_model(tiny, quantizer=lowrank.quant.get("nf4", double_quant=False))
    lowrank.load_adapter(ours, folder)
    text = f"What is {random.randrange(10)} plus {random.randrange(10)}?\n"
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert ids[0].tolist() == lowrank.load_tokenizer(tiny).encode(text)
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, ours(ids), atol=1e-4, rtol=1e-4)

    again = lowrank.load_model(tmp_path / "merged")
    with torch.no_grad():
        torch.testing.assert_close(again(ids), ours(ids), atol=1e-4, rtol=1e-4)


def test_merge_into_quantized_weights(trained, run, tiny, tmp_path):
    folder, _ = trained
    output, words = (
        tmp_path / "merged",
        ("--model", tiny, "--quantizer", "nf4", "--adapter", folder),
    )
    outcome = run("merge", *words, "--no-double-quant", "--output", output, "--quantized")
    assert outcome.status == 0, outcome
    assert "quantized anew" in outcome.out and "its worst layer" in outcome.out
    merged = lowrank.load_adapter(lowrank.load_model(output), output / "residual")
    trained = lowrank.load_model(tiny, quantizer=lowrank.quant.get("nf4", double_quant=False))
    ids = torch.randint(0, 768, (2, 23))
    with torch.no_grad():
        base = trained(ids)
        expected = lowrank.load_adapter(trained, folder)(ids)
        assert (merged(ids) - expected).norm() < 0.5 * (base - expected).norm()

    codes = tmp_path / "codes"
    options = ("--output", codes, "--quantized", "--residual-rank", 0)
    assert run("merge", *words, *options).status == 0
    assert not (codes / "residual").exists() and lowrank.load_model(codes)
    wrong = ("merge", "--model", tiny, "--adapter", folder, "--output", tmp_path / "wrong")
    for options, message in [
        (("--residual-rank", 2), "belongs to --quantized"),
        (("--quantized",), "over quantized linear layers"),
    ]:
        outcome = run(*wrong, *options)
        assert outcome.status != 0 and message in outcome.err
        assert not (tmp_path / "wrong").exists()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_merge_of_some_layers_in_16_bits(run, tiny, data, tmp_path, dtype):
    """Layers that the adapter leaves alone are dequantized too."""
    words = ("--model", tiny, "--quantizer", "nf4")
    assert run(
        "train", *words, "--data", data, "--output-dir", tmp_path / "out", "--max-steps", 2,
        "--target-modules", "q_proj", "v_proj",
    ).status == 0  # fmt: skip
    output = tmp_path / "deep" / "merged"
    outcome = run(
        "merge", *words, "--adapter", tmp_path / "out", "--output", output, "--dtype", dtype
    )
    assert outcome.status == 0, outcome
    merged = lowrank.load_model(output, dtype=torch.float32)
    adapted = lowrank.load_model(tiny, quantizer="nf4")
    lowrank.load_adapter(adapted, tmp_path / "out")
    stored = load_file(output / "model.safetensors")
    assert {t.dtype for t in stored.values()} == {getattr(torch, dtype)}
    ids = torch.randint(0, 768, (2, 23))
    with torch.no_grad():
        difference = torch.nn.functional.kl_div(
            merged(ids).log_softmax(-1),
            adapted(ids).log_softmax(-1),
            log_target=True,
            reduction="batchmean",
        )
    assert difference / ids.shape[1] < 1e-3


def test_env_names_everything(run):
    outcome = run("env")
    assert (outcome.status, outcome.err) == (0, "")
    about, chosen, refused = outcome.out.split("\n\n")
    rows = dict(line.split(maxsplit=1) for line in about.splitlines())
    assert rows["torch"].startswith(torch.__version__) and "nf4" in rows["quantizers"]
    assert {"python", "lowrank", "CPU", "GPU", "triton", "tokenizers"} <= set(rows)
    assert [line.split()[0] for line in chosen.splitlines()[1:]] == [*ops.schema.OPERATORS]

    found = json.loads(run("env", "--json").out)
    assert found["torch"] in rows["torch"]
    for op, backends in found["operators"].items():
        for line in ops.explain(op).splitlines()[1:]:
            name, _, reason = line.strip().partition(": ")
            if reason == "here":
                assert name in [backends["chosen"]["cpu"], *backends["others"], "triton", "cuda"]
            elif name in backends["refused"]:
                assert backends["refused"][name] == reason
                assert re.search(rf"^{name} .*({op}|all|has none of these)", refused, re.MULTILINE)


def test_env_names_the_backend_that_runs(run):
    """The row of an operator is what `explain` says of arguments that no backend refuses."""
    weight = torch.randn(32, 64)
    for named in (None, "reference"):
        with ops.use_backend(named):
            operators = json.loads(run("env", "--json").out)["operators"]
            table = torch.linspace(-1, 1, 16)[None]
            said = ops.explain("codebook_quantize", weight, table, 32)
        assert f"  {operators['codebook_quantize']['chosen']['cpu']}: runs" in said


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS)])
def test_help(run, command):
    outcome = run(*command, "--help")
    assert (outcome.status, outcome.err) == (0, "")
    assert outcome.out.startswith(" ".join(["usage: lowrank", *command]))
    if not command:
        assert all(re.search(rf"^    {name} +\w", outcome.out, re.MULTILINE) for name in COMMANDS)


def test_a_flag_before_the_command_is_told_where_it_goes(run):
    outcome = run("--json", "env")
    assert outcome.status == 2 and "--json: it goes after lowrank env" in outcome.err


def test_version(run):
    assert re.fullmatch(r"lowrank \S.*\n", run("--version").out)


def test_python_dash_m(tmp_path):
    out, err = python("-m", "lowrank", "env", cwd=tmp_path).communicate(timeout=120)
    assert "torch" in out and err == ""
    process = python(
        "-m", "lowrank", "generate", "--model", "absent", "--prompt", "a", cwd=tmp_path
    )
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (2, "")
    assert err.startswith("lowrank: error: ") and err.count("\n") == 1


def wait_for(condition, process, seconds=90):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)


def test_ctrl_c_saves_what_is_whole(tiny, data, tmp_path):
    folder = tmp_path / "out"
    process = python(
        "-m", "lowrank", "train", "--model", tiny, "--data", data, "--output-dir", folder,
        "--max-steps", 100_000, "--quantizer", "nf4", "--disable-tqdm",
    )  # fmt: skip
    metrics = folder / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") >= 3, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=90)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    steps = len(metrics.read_text().splitlines())
    assert f"interrupted after {steps} of 100000 steps" in err and str(folder) in err
    for line in metrics.read_text().splitlines():
        json.loads(line)
    model = lowrank.load_model(tiny, quantizer="nf4")
    lowrank.load_adapter(model, folder)
    assert [p.name for p in folder.iterdir() if p.name.startswith(".")] == []


def test_a_reader_that_leaves_is_no_error(tmp_path):
    script = f'"{sys.executable}" -m lowrank train --help | head -n 1; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(
        ["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.stderr == ""
    assert done.stdout.startswith("usage: lowrank train")


@pytest.mark.parametrize(
    ("name", "words", "options"),
    [
        ("nf4", [], {}),
        ("fp4", ["--no-double-quant"], {"double_quant": False}),
        ("hqq", ["--block-size", "32"], {"block_size": 32}),
        ("int8", [], {}),
        ("none", [], {}),
    ],
)
def test_each_scheme_has_defaults_of_its_own(name, words, options, run, tiny):
    outcome = run(
        "generate", "--model", tiny, "--quantizer", name, *words,
        "--prompt", "What is 3 plus 4?\n", "--max-new-tokens", 4,
    )  # fmt: skip
    assert outcome.status == 0, outcome
    model = lowrank.load_model(tiny, quantizer=lowrank.quant.get(name, **options))
    tokenizer = lowrank.load_tokenizer(tiny)
    expected = lowrank.generate(model, tokenizer, "What is 3 plus 4?\n", max_new_tokens=4)
    assert outcome.out == expected + "\n"


def test_an_option_that_a_scheme_lacks_is_refused(run, tiny):
    words = ("generate", "--model", tiny, "--prompt", "x", "--quantizer", "int8")
    outcome = run(*words, "--block-size", 64)
    assert outcome.status == 2 and outcome.err.count("\n") == 1
    assert "quantizer 'int8': expected its own options, none; got 'block_size'" in outcome.err
