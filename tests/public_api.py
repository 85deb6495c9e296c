"""Never run: mypy reads it (`make lint`), as a caller's editor reads calls of the public API."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import lowrank
from lowrank import data, quant
from lowrank.optim import Budget, PagedAdamW, PagedAdamW8bit, PagedLion8bit
from lowrank.quant import bitsandbytes
from lowrank.train import TrainConfig, Trainer, held_out_loss


def layers() -> None:
    cfg = lowrank.LoRAConfig(r=16, lora_alpha=32, target_modules=["q_proj", "v_proj"])
    lowrank.LoRAConfig(target_parameters=["experts.down_proj"], target_rows={"qkv": [(0, 64)]})
    lowrank.register_layer(nn.Bilinear, lowrank.LoRALinear)
    layer = lowrank.LoRALinear(512, 512, bias=True, config=cfg)
    assert_type(lowrank.LoRALinear.wrap(nn.Linear(4, 4), cfg), lowrank.LoRALinear)
    lowrank.LoRALinear.wrap(nn.Linear(4, 4), cfg, quantizer="nf4")
    assert_type(layer.scaling["default"], float)
    frozen = lowrank.QuantLinear.from_linear(nn.Linear(64, 64), "nf4")
    assert_type(frozen, lowrank.QuantLinear)
    assert_type(frozen.dequantize(torch.float32), Tensor)
    table = lowrank.QuantEmbedding.from_embedding(nn.Embedding(64, 64), "nf4")
    assert_type(lowrank.QuantLinear.from_tied(table), lowrank.QuantLinear)


def editing(model: nn.Module, cfg: lowrank.LoRAConfig) -> None:
    model = lowrank.quantize(model, "nf4", compute_dtype=torch.bfloat16, skip=["lm_head"])
    model = lowrank.quantize(model, "nf4", embeddings=True)
    model = lowrank.quantize(model, load_in_4bit=True, bnb_4bit_compute_dtype="bfloat16")
    model = lowrank.prepare_for_kbit_training(model, upcast_norms=True)
    model = lowrank.inject(model, cfg, adapter="default")
    weights = lowrank.open_weights("path")
    model = lowrank.inject(model, cfg, quantizer="nf4", weights=weights)
    lowrank.load_adapter(model, "adapter", quantizer="nf4", weights=weights)
    lowrank.print_trainable_parameters(model)
    lowrank.set_adapter(model, "task_a")
    lowrank.scale_adapter(model, "task_a", 1.5)
    with lowrank.adapter_rows(model, ["task_a", None, "__base__"]):
        model(torch.zeros(3, 4))
    with lowrank.adapter_copies(model, ["task_a", "task_b"]):
        model(torch.zeros(6, 4))
    lowrank.combine_adapters(model, ["task_a", "task_b"], [0.7, 0.3], into="both")
    lowrank.combine_adapters(model, ["task_a"], [-1.0], "less", "ties", svd_rank=8, density=0.5)
    lowrank.hotswap_adapter(model, "adapter", "task_a")
    lowrank.delete_adapter(model, "task_a")
    with lowrank.disable_adapters(model):
        lowrank.merge(model)
    lowrank.unmerge(model)
    lowrank.save_adapter(model, "adapter", adapter="default")
    lowrank.load_adapter(model, "adapter", adapter="default", subfolder="b", token=None)
    assert_type(lowrank.push_adapter(model, "someone/adapter", private=True), str)
    lowrank.merge_and_unload(model).eval()
    print(lowrank.merge_quantized(model, ["default"], residual_rank=4, into="rest"))
    found = lowrank.extract_adapter(model, weights, cfg, adapter="found")
    assert_type(found.kept, float)
    assert_type(lowrank.unload(model), nn.Module)


def methods(model: nn.Module) -> None:
    assert_type(lowrank.adapters.names(), list[str])
    assert_type(lowrank.adapters.get("vera"), lowrank.adapters.Method)
    lowrank.LoRAConfig(method="lora_fa", init_lora_weights="eva", eva_config={"rho": 2.0})
    ids = torch.zeros(1, 4, dtype=torch.long)
    assert_type(lowrank.initialize_eva(model, [{"input_ids": ids}, ids]), nn.Module)
    assert_type(lowrank.convert_to_lora(model, lowrank.open_weights("path")), nn.Module)
    torch.optim.AdamW(lowrank.lora_plus_groups(model, lr=1e-4, ratio=16))


def optimizing(model: nn.Module) -> None:
    shared = Budget(2**30)
    PagedAdamW8bit(model.parameters(), lr=2e-4, device_budget=shared, host_budget=2**34)
    optimizer = PagedAdamW(model.named_parameters(), 2e-4, host_budget=2**28, page_dir="pages")
    PagedLion8bit([{"params": list(model.parameters()), "lr": 1e-5}], device_budget=shared)
    assert_type(optimizer.evict(), int)


def quantizing(w: Tensor) -> None:
    q = quant.get("nf4", block_size=64, double_quant=True)
    storage = q.quantize(w)
    assert_type(storage, quant.Storage)
    assert_type(q.dequantize(storage, torch.float32), Tensor)
    assert_type(quant.names(), list[str])
    assert_type(quant.quantizer_of(storage), quant.Quantizer)
    assert_type(storage.rows(0, 4), quant.Storage)
    assert_type(quant.gather(q, storage, torch.tensor([3, 5]), torch.float32), Tensor)
    assert_type(storage.bits_per_parameter, float)
    assert_type(quant.requantize_scales(storage), quant.Storage)
    assert_type(bitsandbytes.read(bitsandbytes.write(storage)), quant.Storage)
    fitted = quant.Fitted(per="row", block_size=128, double_quant=False)
    assert_type(quant.linear(fitted, w, fitted.quantize(w)), Tensor)
    assert_type(lowrank.ops.explain("codebook_linear"), str)


def comparing(model: nn.Module, tok: object) -> None:
    compared = quant.report(model, ["nf4", "nf4:block_size=128"], text="text", tokenizer=tok)
    quant.report(model, {"mine": quant.get("nf4"), "int4": "int4"}, speed=False)
    quant.report({"layer.weight": torch.zeros(4, 4)}, None)
    assert_type(compared.rows[0].error, float)
    assert_type(compared.loss, float | None)
    print(compared, compared.save("report"))


def models() -> None:
    plan = lowrank.plan_memory("path", lowrank.LoRAConfig(r=16), quantizer="nf4", max_length=512)
    assert_type(plan.peak, int)
    model = lowrank.load_model("path", quantizer="nf4", dtype=torch.bfloat16, device="cpu")
    lowrank.save_model(model, "directory", format="lowrank")
    assert_type(lowrank.load_quantized(nn.Linear(4, 4), "directory"), nn.Module)
    lowrank.save_quantized(model, "directory", max_shard_bytes=10**9)
    tok = lowrank.load_tokenizer("path")
    assert_type(tok.encode("text"), list[int])
    text = lowrank.generate(model, tok, "prompt", max_new_tokens=64, stop=["\n"])
    print(text, *lowrank.stream(model, tok, "prompt", repetition_penalty=1.2))
    config = TrainConfig(output_dir="out", learning_rate=2e-4)
    result = Trainer(model, config, "train.jsonl", "eval.jsonl", tokenizer=tok).train()
    assert_type(result.losses, list[float])
    examples = data.tokenize_all(data.load_examples("held_out.jsonl"), tok)
    assert_type(held_out_loss(model, examples, batch_size=4), float)
    held_out_loss(model, data.windows(tok.encode("text"), [1], max_length=512, stride=256))
    Trainer(model, config, [{"q": "a"}], tokenizer=tok, formatting_func=lambda row: str(row["q"]))
