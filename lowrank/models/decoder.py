"""One decoder for all families, driven by its config, with Hugging Face's parameter names."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lowrank.errors import ShapeError
from lowrank.models.at_once import AtOnce
from lowrank.models.blocks import make_block
from lowrank.models.cache import KVCache
from lowrank.models.config import DecoderConfig
from lowrank.models.experts import Experts, Router, imbalance, watched_routers
from lowrank.models.parts import Part, make_norm, part
from lowrank.models.plan import make_plans
from lowrank.models.recompute import recompute
from lowrank.nn.fusible import is_patched
from lowrank.nn.lora_linear import LoRALinear
from lowrank.nn.quant_embedding import QuantEmbedding
from lowrank.nn.quant_linear import QuantLinear
from lowrank.ops import linear_cross_entropy

if TYPE_CHECKING:
    from lowrank.models.placement import Placement
    from lowrank.models.sharded import Unread

IGNORE = -100  # a label that asks for nothing
_CHUNK_ROWS = 256  # rows of logits alive at once where the head is not a frozen nn.Linear


class Body(Part):
    """Embedding, blocks and the last norm: everything below the head."""

    embedding, positions = part("embedding"), part("positions")
    blocks, norm = part("blocks"), part("norm")

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        H = config.hidden_size
        self.have(embedding=_table(config.vocab_size, H))
        if config.family.learned_positions:
            self.have(positions=_table(config.max_position_embeddings, H))
        layers = range(config.num_hidden_layers)
        self.have(blocks=nn.ModuleList(make_block(config, layer) for layer in layers))
        self.have(norm=make_norm(config, H))


class Decoder(Part):
    """A causal language model of one of the families.   Touvron et al., arXiv:2302.13971.

    Parameters are named as in transformers' class of the family. With `gradient_checkpointing`
    True, each block keeps only its input and is run again in the backward, but for its last
    projection; "selective" keeps a second sum and spares the attention's last projection, too.
    """

    supports_packing = True
    supports_selective_checkpointing = True
    body = part("body")

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        self.config = config
        self.name_or_path: str | None = None
        self.gradient_checkpointing: bool | str = False
        self.placement: Placement | None = None
        self.unread: Unread | None = None  # of a model whose weights are still to be read
        self.at_once = AtOnce()
        self.have(body=Body(config))
        H, V = config.hidden_size, config.vocab_size
        self.lm_head = nn.Linear(H, V, bias=config.family.head_bias)
        if not self.lm_head.weight.is_meta:
            self._initialise()
        self.tie_weights()
        self.register_load_state_dict_post_hook(_tie_again)

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding | Router | Experts):
                for parameter in module.parameters(recurse=False):
                    nn.init.normal_(parameter, std=self.config.initializer_range)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def tie_weights(self, compute_dtype: torch.dtype | None = None) -> None:
        """Make the head share the embedding's weight, if the config says so.

        `compute_dtype` is that of a quantized head, which a quantized embedding asks for.
        """
        if not self.config.tie_word_embeddings:
            return
        embedding = self.body.embedding
        if isinstance(embedding, QuantEmbedding):
            self.lm_head = QuantLinear.from_tied(embedding, None, compute_dtype)
        else:
            self.lm_head.weight = embedding.weight

    def _load_from_state_dict(self, state_dict, prefix, *rest) -> None:
        """A tied head is stored once, as the embedding."""
        if self.config.tie_word_embeddings:
            name = self.config.family.path("body", "embedding")
            start, head = f"{prefix}{name}.", f"{prefix}lm_head."
            of_adapters = set(self.body.embedding._modules) - {"base_layer"}
            for key in [key for key in state_dict if key.startswith(start)]:
                leaf = key[len(start) :].removeprefix("base_layer.")
                stored = f"{head}base_layer.{leaf}" in state_dict
                if not stored and leaf.split(".")[0] not in of_adapters:
                    state_dict.setdefault(head + leaf, state_dict[key])
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        logits_to_keep: int | Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Logits [B, S, V] of the token after each of input_ids [B, S].

        attention_mask [B, S] (with a cache [B, past + S]) is 0 at padding, left or right; positions
        then count from a row's first token. position_ids [B, S] without a mask mean packed
        examples: every position 0 starts one, and attention stays inside it. `logits_to_keep` n
        keeps the last n positions, a LongTensor those it indexes along S. A `cache` is read, and
        extended by S.
        """
        rows = None
        if logits_to_keep is not None and input_ids.ndim == 2:
            rows = _rows_to_keep(logits_to_keep, *input_ids.shape, input_ids.device)
        h = self._hidden(input_ids, attention_mask, position_ids, cache, rows)
        logits = self.lm_head(self.body.norm(h.view(len(input_ids), -1, h.shape[-1])))
        return _capped(logits, self.config.final_logit_softcapping)

    def loss(
        self,
        input_ids: Tensor,
        labels: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        copies: int | None = None,
        label_smoothing: float = 0.0,
    ) -> Tensor:
        """Sum over labelled tokens of the next-token cross entropy, a float32 scalar.

        Of a batch that is one repeated, `copies` times, each copy's own sum: [copies].

        labels [B, S] stand at their own token's position (the shift happens here); -100, and the
        first token of every example, ask for nothing, and where nothing is asked no logits are
        formed. A mixture whose config has `output_router_logits` adds the imbalance of its experts,
        times `router_aux_loss_coef` and the number of those tokens.
        """
        if labels.shape != input_ids.shape:
            raise ShapeError(
                f"labels: expected shape {tuple(input_ids.shape)}; got {tuple(labels.shape)}"
            )
        target = F.pad(
            labels[:, 1:], (0, 1), value=IGNORE
        )  # [B, S]: what each position is to predict
        if position_ids is not None:
            target = target.masked_fill(F.pad(position_ids[:, 1:] == 0, (0, 1)), IGNORE)
        target = target.flatten()
        rows = (target != IGNORE).nonzero().flatten()
        mixture = self.config.mixture
        balanced = mixture is not None and mixture.output_router_logits
        if balanced:  # all tokens count where experts are chosen
            with watched_routers(self) as routed:
                h = self._hidden(input_ids, attention_mask, position_ids, None, None)
            h = h.flatten(0, 1).index_select(0, rows)
        else:
            h = self._hidden(input_ids, attention_mask, position_ids, None, rows[None])
            h = h.flatten(0, 1)
        x, target = self.body.norm(h), target.index_select(0, rows)  # [T, H], [T]
        cap, n = self.config.final_logit_softcapping, copies or 1
        if len(target) % n:
            raise ShapeError(f"copies: expected a batch repeated {copies} times; it is not")
        parts = zip(x.chunk(n), target.chunk(n), strict=True)
        losses = [_head_loss(self.lm_head, *part, label_smoothing, cap) for part in parts]
        if balanced:
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            aux = mixture.router_aux_loss_coef * imbalance(routed, mask.flatten().float(), n)
            losses = [loss + len(target) / n * one for loss, one in zip(losses, aux, strict=True)]
        return torch.stack(losses) if copies else losses[0]

    def _hidden(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: KVCache | None,
        rows: Tensor | None,
    ) -> Tensor:
        """What the last block gives, before the last norm: [B, S, H], or [b, t, H] at `rows`.

        Only the keys and values of the last block need every row; the rest of it is as much work as
        five in six of its parameters.
        """
        if input_ids.ndim != 2:
            raise ShapeError(f"input_ids: expected shape [B, S]; got {tuple(input_ids.shape)}")
        B, S = input_ids.shape
        body, config = self.body, self.config
        self._check_length(S, position_ids, cache)
        h = body.embedding(input_ids)
        if config.family.scaled_embedding:
            h = h * torch.tensor(config.hidden_size**0.5, dtype=h.dtype)
        plans = make_plans(
            config, (B, S), attention_mask, position_ids, cache, device=h.device, dtype=h.dtype
        )
        if plans[0].lengths is not None:
            h = h.view(1, B * S, -1)
        if body.positions is not None:
            h = h + body.positions(plans[0].positions)
        blocks, last = body.blocks, len(body.blocks) - 1
        if self.placement is None and (rows is None or rows.shape[1] == 1):
            y = self.at_once.run(blocks, h, plans, cache)
            h, blocks = (h, blocks) if y is None else (y, [])
        for i, block in enumerate(blocks):
            plan, wanted = plans[block.kind], rows if i == last else None
            if self.placement is not None:
                self.placement.enter(i)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                selective = self.gradient_checkpointing == "selective"
                h = block.checkpointed(h, plan, wanted, selective)
            else:
                h = block(h, plan, wanted)
            if self.placement is not None:
                h = self.placement.leave(i, h)
        if cache is not None:
            cache.advance(S)
        return h

    def _check_length(self, S: int, position_ids: Tensor | None, cache: KVCache | None) -> None:
        """Learned positions end: beyond them there is no row to look up."""
        if self.body.positions is None:
            return
        most = self.config.max_position_embeddings
        if position_ids is None:
            end = S if cache is None else cache.length + S
        else:
            end = int(position_ids.max()) + 1
        if end > most:
            raise ShapeError(
                f"input_ids: expected at most max_position_embeddings={most} positions, as many as "
                f"were learned; got {end}"
            )


def _table(rows: int, size: int) -> nn.Embedding:
    # from_pretrained: initialising on meta imports 125 MB of symbolic algebra
    return nn.Embedding.from_pretrained(torch.empty(rows, size), freeze=False)


def _tie_again(model: Decoder, _: object) -> None:
    """After loading: what is quantized in another way by then is no longer the same parameters."""
    head, embedding = (getattr(m, "base_layer", m) for m in (model.lm_head, model.body.embedding))
    both = isinstance(head, QuantLinear) and isinstance(embedding, QuantEmbedding)
    if both and model.config.tie_word_embeddings:
        head.tie(embedding)


def _rows_to_keep(keep: int | Tensor, B: int, S: int, device: torch.device) -> Tensor | None:
    """Rows [B, n] of [B * S]: the last `keep` of each S, or those `keep` indexes; None for all."""
    if isinstance(keep, int) and not 0 < keep < S:
        return None
    along = torch.arange(S, device=device)
    along = along[-keep:] if isinstance(keep, int) else along[keep]
    return torch.arange(B, device=device)[:, None] * S + along


def _capped(logits: Tensor, cap: float | None) -> Tensor:
    """cap tanh(logits / cap).   Gemma 2, arXiv:2408.00118, §2."""
    return logits if cap is None else torch.tanh(logits / cap) * cap


def _head_loss(
    head: nn.Module, x: Tensor, target: Tensor, smoothing: float, cap: float | None
) -> Tensor:
    """Sum of the cross entropy of head(x), x [T, H], at target [T].

    Logits are in chunks of rows, and made again in the backward.

    With `smoothing` e, target t is a distribution of 1 - e on t and e spread over all words.
    """
    frozen = type(head) is nn.Linear and head.bias is None and not head.weight.requires_grad
    if frozen and cap is None:
        x = x.to(head.weight.dtype)
        loss = linear_cross_entropy(x, head.weight, target)
        return loss + smoothing * _over_the_mean(x, head.weight, target) if smoothing else loss

    def chunk_loss(target: Tensor, x: Tensor) -> tuple[Tensor]:
        logits = _capped(head(x).float(), cap)
        return (F.cross_entropy(logits, target, reduction="sum", label_smoothing=smoothing),)

    # another head may have trained tensors that are not its parameters
    known = type(head) in (nn.Linear, QuantLinear, LoRALinear) and not is_patched(head)
    total = x.new_zeros((), dtype=torch.float32)
    for x_chunk, target_chunk in zip(x.split(_CHUNK_ROWS), target.split(_CHUNK_ROWS), strict=True):
        if known and not torch.compiler.is_compiling():
            (loss,) = recompute(partial(chunk_loss, target_chunk), [head], [], x_chunk)
        else:
            (loss,) = checkpoint(chunk_loss, target_chunk, x_chunk, use_reentrant=False)
        total = total + loss
    return total


def _over_the_mean(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Sum over rows of x [T, H] of the target's logit over the mean of all logits of weight [V, H].

    Smoothing moves a loss by a share of it, as log-sum-exp is the same for every word: without a
    logit of the others, since the mean of all logits is the logit of the mean of all weights.
    """
    over = weight[target].float() - weight.mean(0, dtype=torch.float32)
    return (x.float() * over).sum()
